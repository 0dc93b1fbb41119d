"""The training of one rank, from its request to its result."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import cloudpickle
import pytorch_lightning as pl
import torch

from qtorch.core.files import whole_file
from qtorch.core.heartbeat import listening
from qtorch.core.runtime import seed_everything
from qtorch.model.checkpoint import read_checkpoint
from qtorch.model.generators import restore_generators
from qtorch.model.interruption import StopTraining
from qtorch.model.keeper import weights_of
from qtorch.model.rank_environment import RankPlace
from qtorch.model.rank_link import LinkHandler, LinkRecorder, RankLink, told
from qtorch.model.rank_request import RESULT, RankRequest, read_request
from qtorch.model.trainer_options import device_name, devices_of
from qtorch.model.training import Training, quiet_lightning


def train_rank(link: RankLink, folder: str, digest: str, rank: int, local_rank: int) -> None:
    """Train a rank's share; tells the parent how it ended, unless by an error."""
    request, (train, valid) = read_request(Path(folder), digest)
    assert train is not None, "there is something to learn from"
    _hand_over_log(link, request.log_level if rank == 0 else logging.ERROR)
    place = RankPlace(
        rank=rank,
        size=request.size,
        local_rank=local_rank,
        node_rank=rank // request.num_local,
        address=request.address,
        port=request.port,
    )
    device = _device(request, local_rank)
    recipe = request.recipe
    fit = Training(
        request.network,
        train.to(device),
        None if valid is None else valid.to(device),
        recipe,
        request.tuning,
        request.optimizer_state,
        place,
    )
    recorder = None
    if rank == 0 and request.run_id is not None:
        recorder = LinkRecorder(link, request.run_id, request.uri)
    seed_everything(recipe.seed)
    if rank == 0:
        restore_generators({**request.generators, "cuda": []})
    else:
        fit.ranks.seed(recipe.seed, "begin")
        warnings.simplefilter("ignore")  # the first rank gives them too
    with quiet_lightning():
        home = None if request.folder is None else Path(request.folder)
        keeper = fit.prepare(home, request.identity, link, recorder)
        fit.trainer.callbacks.append(FirstWord(link))  # type: ignore[attr-defined]  # a list
        path = None if request.checkpoint is None else Path(request.checkpoint)
        found = None if path is None else (path, read_checkpoint(path))
        if rank == 0:
            with listening(link.beat):
                ended = _run(fit, found)
        else:
            ended = _run(fit, found)
        if not ended:
            link.say(stopped=keeper.stopped_at, batches=keeper.loader.num_batches)
            return
        fitted = fit.result(found)
    if rank == 0:
        own = weights_of(fit.module)
        if isinstance(own, pl.LightningModule):  # with its trainer, which cannot be sent
            fitted.network = own.state_dict()  # type: ignore[assignment]  # put in there
        with whole_file(Path(folder) / RESULT) as path_:
            path_.write_bytes(cloudpickle.dumps(fitted))
    link.say(done=True)


def _run(fit: Training, found: tuple[Path, dict[str, Any]] | None) -> bool:
    """Train; False where it was stopped."""
    try:
        fit.run(found)
    except StopTraining:
        return False
    return True


class FirstWord(pl.Callback):
    """An error is told before Lightning tears down what the other ranks wait for."""

    def __init__(self, link: RankLink) -> None:
        self._link = link

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if not isinstance(exception, StopTraining):
            self._link.say(error=told(exception))


def _device(request: RankRequest, local_rank: int) -> torch.device:
    options = request.recipe.trainer
    if device_name(options) == "cpu":
        return torch.device("cpu")
    devices = devices_of(options.rest)
    device = torch.device("cuda", devices[local_rank] if isinstance(devices, list) else local_rank)
    torch.cuda.set_device(device)
    return device


def _hand_over_log(link: RankLink, level: int) -> None:
    logger = logging.getLogger("qtorch")
    logger.handlers[:] = [LinkHandler(link, level)]
    logger.setLevel(level)
    logger.propagate = False
