"""The training of one rank, from its request to its result."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import cloudpickle
import pytorch_lightning as pl
import torch

from qtorch.core.files import atomic_write
from qtorch.core.heartbeat import listen
from qtorch.core.runtime import seed_everything
from qtorch.model.checkpoint import read_checkpoint
from qtorch.model.generators import restore_generators
from qtorch.model.interruption import StopTraining
from qtorch.model.keeper import get_network
from qtorch.model.rank_environment import RankInfo
from qtorch.model.rank_link import LinkLogHandler, LinkRecorder, RankLink, serialize_error
from qtorch.model.rank_request import RESULT, RankRequest, read_request
from qtorch.model.trainer_options import device_name, parse_devices
from qtorch.model.training import Training, quiet_lightning


def train_rank(link: RankLink, folder: str, digest: str, rank: int, local_rank: int) -> None:
    """Train this rank's share, and tell the parent when it is done or was stopped.

    Errors are raised.
    """
    request, (train, valid) = read_request(Path(folder), digest)
    assert train is not None, "the train segment has samples"
    _forward_log(link, request.log_level if rank == 0 else logging.ERROR)
    rank_info = RankInfo(
        rank=rank,
        size=request.size,
        local_rank=local_rank,
        node_rank=rank // request.num_local,
        address=request.address,
        port=request.port,
    )
    device = _select_device(request, local_rank)
    recipe = request.recipe
    training = Training(
        request.network,
        train.to(device),
        None if valid is None else valid.to(device),
        recipe,
        request.tuning,
        request.optimizer_state,
        rank_info,
    )
    recorder = None
    if rank == 0 and request.run_id is not None:
        recorder = LinkRecorder(link, request.run_id, request.uri)
    seed_everything(recipe.seed)
    if rank == 0:
        restore_generators({**request.generators, "cuda": []})
    else:
        training.ranks.seed(recipe.seed, "begin")
        warnings.simplefilter("ignore")  # the first rank shows them too
    with quiet_lightning():
        checkpoint_folder = None if request.folder is None else Path(request.folder)
        checkpoint_callback = training.prepare(checkpoint_folder, request.identity, link, recorder)
        training.trainer.callbacks.append(ErrorReporter(link))  # type: ignore[attr-defined]  # a list, in spite of its annotation
        checkpoint_path = None if request.checkpoint is None else Path(request.checkpoint)
        checkpoint = (
            None if checkpoint_path is None else (checkpoint_path, read_checkpoint(checkpoint_path))
        )
        if rank == 0:
            with listen(link.send_heartbeat):
                is_finished = _run_until_stop(training, checkpoint)
        else:
            is_finished = _run_until_stop(training, checkpoint)
        if not is_finished:
            link.send(
                stopped=checkpoint_callback.stop_position,
                batches=checkpoint_callback.loader.num_batches,
            )
            return
        fit_result = training.result(checkpoint)
    if rank == 0:
        network = get_network(training.module)
        if isinstance(
            network, pl.LightningModule
        ):  # it refers to its trainer, which cannot be pickled
            fit_result.network = network.state_dict()  # type: ignore[assignment]  # the parent loads it into its module
        with atomic_write(Path(folder) / RESULT) as path:
            path.write_bytes(cloudpickle.dumps(fit_result))
    link.send(done=True)


def _run_until_stop(training: Training, checkpoint: tuple[Path, dict[str, Any]] | None) -> bool:
    """Train; return False if training was stopped on request."""
    try:
        training.run(checkpoint)
    except StopTraining:
        return False
    return True


class ErrorReporter(pl.Callback):
    """Send an error to the parent before Lightning's teardown makes the other ranks fail too."""

    def __init__(self, link: RankLink) -> None:
        self._link = link

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if not isinstance(exception, StopTraining):
            self._link.send(error=serialize_error(exception))


def _select_device(request: RankRequest, local_rank: int) -> torch.device:
    options = request.recipe.trainer
    if device_name(options) == "cpu":
        return torch.device("cpu")
    devices = parse_devices(options.arguments)
    device = torch.device("cuda", devices[local_rank] if isinstance(devices, list) else local_rank)
    torch.cuda.set_device(device)
    return device


def _forward_log(link: RankLink, level: int) -> None:
    logger = logging.getLogger("qtorch")
    logger.handlers[:] = [LinkLogHandler(link, level)]
    logger.setLevel(level)
    logger.propagate = False
