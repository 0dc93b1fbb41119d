"""A rank: a child process that trains its share of each batch of a training on several devices.

Recorder, prediction and records belong to its parent process, which gets these messages: `metrics`,
`params` and `tags` for the recorder, `log` lines, `beat` (heartbeats), and at the end `done`,
`stopped` with the position, or `error`.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import pickle
import sys
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytorch_lightning as pl
import torch
from torch import nn

from qtorch.core.errors import ConfigError
from qtorch.core.files import atomic_write
from qtorch.core.runtime import reuse_freed_memory, seed_everything
from qtorch.core.session import Session, set_defaults
from qtorch.data.dataset.samples import Samples
from qtorch.data.dataset.shared_samples import read_samples, write_samples
from qtorch.model.devices.numerics import numerical_settings
from qtorch.model.finetune import FineTuning
from qtorch.model.loop.checkpoint import get_network, read_checkpoint, restore_generators
from qtorch.model.loop.interruption import StopTraining
from qtorch.model.loop.options import TrainerOptions, device_name, parse_devices
from qtorch.model.loop.rank_group import RankInfo
from qtorch.model.loop.training import Training, quiet_lightning
from qtorch.model.recipe import Recipe
from qtorch.process.child import Parent
from qtorch.process.heartbeat import listen

REQUEST, RESULT = "request.pkl", "result.pkl"


@dataclass
class RankRequest:
    """A training for its ranks: network with initial weights, recipe, checkpoint to resume from.

    `generators` are the random generator states of the first rank. The samples are written to files
    beside the request.
    """

    network: nn.Module
    recipe: Recipe
    tuning: FineTuning | None
    optimizer_state: dict[str, Any] | None
    generators: dict[str, Any]
    identity: str
    folder: str | None
    checkpoint: str | None
    run_id: str | None
    uri: str | None
    size: int
    num_local: int
    address: str
    port: int
    log_level: int
    session: Session

    def write(self, folder: Path, samples: list[Samples | None], *, is_single_node: bool) -> str:
        """Write request and samples to `folder`; return the request's hash.

        Raises ConfigError for live objects that cannot be pickled.
        """
        try:
            content = cloudpickle.dumps(self)
        except (TypeError, pickle.PicklingError, AttributeError) as error:
            raise ConfigError(
                f"cannot send the training to its ranks: {error}. Define network, callbacks, "
                "loss and factories by configuration, or as objects that can be pickled."
            ) from error
        payload = pickle.dumps((list(sys.path), content))
        (folder / REQUEST).touch(mode=0o600)
        (folder / REQUEST).write_bytes(payload)
        write_samples(samples, folder, local=is_single_node)
        return hashlib.sha256(payload).hexdigest()


def read_request(folder: Path, digest: str) -> tuple[RankRequest, list[Samples | None]]:
    """Read the request with this hash, and its samples as memory maps.

    Modules are imported from the parent's `sys.path`.
    """
    payload = (folder / REQUEST).read_bytes()
    if hashlib.sha256(payload).hexdigest() != digest:
        raise ConfigError(f"{folder / REQUEST} is not the request that this rank was started with.")
    path, content = pickle.loads(payload)
    sys.path[:] = path
    request: RankRequest = pickle.loads(content)
    set_defaults(**{k: v for k, v in asdict(request.session).items() if v})
    return request, read_samples(folder)


def serve_rank(call: Mapping[str, Any], parent: Parent) -> int:
    """Run a rank; return 0 if it ended in a way that the parent was told about."""
    try:
        train_rank(parent, call["folder"], call["digest"], call["rank"], call["local_rank"])
    except BaseException as error:
        parent.send({"error": serialize_error(error)})
        return 1
    return 0


def train_rank(parent: Parent, folder: str, digest: str, rank: int, local_rank: int) -> None:
    """Train this rank's share, and tell the parent when it is done or was stopped.

    Errors are raised.
    """
    request, (train, valid) = read_request(Path(folder), digest)
    assert train is not None, "the train segment has samples"
    _forward_log(parent, request.log_level if rank == 0 else logging.ERROR)
    recipe = request.recipe
    with reuse_freed_memory(), numerical_settings(recipe.trainer, recipe.matmul_precision):
        device, rank_info, recipe.trainer = place_rank(request, rank, local_rank)
        _train_share(parent, Path(folder), request, (train, valid), rank_info, device)


def _train_share(
    parent: Parent,
    folder: Path,
    request: RankRequest,
    segments: tuple[Samples, Samples | None],
    rank_info: RankInfo,
    device: torch.device,
) -> None:
    """Train a rank's share on its device, and tell the parent how it ended."""
    (train, valid), recipe, rank = segments, request.recipe, rank_info.rank
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
        recorder = ParentRecorder(parent, request.run_id, request.uri)
    seed_everything(recipe.seed)
    if rank == 0:
        restore_generators(request.generators, torch.device("cpu"))
    else:
        training.ranks.seed(recipe.seed, "begin")
        warnings.simplefilter("ignore")  # the first rank shows them too
    with quiet_lightning():
        checkpoint_folder = None if request.folder is None else Path(request.folder)
        checkpoint_callback = training.prepare(
            checkpoint_folder, request.identity, parent, recorder
        )
        training.trainer.callbacks.append(ErrorReporter(parent))  # type: ignore[attr-defined]  # a list, in spite of its annotation
        checkpoint_path = None if request.checkpoint is None else Path(request.checkpoint)
        checkpoint = (
            None if checkpoint_path is None else (checkpoint_path, read_checkpoint(checkpoint_path))
        )
        if rank == 0:
            with listen(lambda stage, details: parent.send({"beat": [stage, details]})):
                is_finished = _run_until_stop(training, checkpoint)
        else:
            is_finished = _run_until_stop(training, checkpoint)
        if not is_finished:
            if rank == 0 and training.has_best_weights:
                _write_result(training, checkpoint, folder)
            parent.send(
                {
                    "stopped": checkpoint_callback.stop_position,
                    "batches": checkpoint_callback.loader.num_batches,
                }
            )
            return
        if rank == 0:
            _write_result(training, checkpoint, folder)
        else:
            training.result(checkpoint)  # the ranks gather sharded weights together
    parent.send({"done": True})


def _write_result(
    training: Training, checkpoint: tuple[Path, dict[str, Any]] | None, folder: Path
) -> None:
    """Write the result with the best weights for the parent."""
    fit_result = training.result(checkpoint)
    network = get_network(training.module)
    if isinstance(network, pl.LightningModule):  # it refers to its trainer: not to be pickled
        fit_result.network = network.state_dict()  # type: ignore[assignment]  # the parent loads it into its module
    with atomic_write(folder / RESULT) as path:
        path.write_bytes(cloudpickle.dumps(fit_result))


def _run_until_stop(training: Training, checkpoint: tuple[Path, dict[str, Any]] | None) -> bool:
    """Train; return False if training was stopped on request."""
    try:
        training.run(checkpoint)
    except StopTraining:
        return False
    return True


class ErrorReporter(pl.Callback):
    """Send an error to the parent before Lightning's teardown makes the other ranks fail too."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if not isinstance(exception, StopTraining):
            self._parent.send({"error": serialize_error(exception)})


def place_rank(
    request: RankRequest, rank: int, local_rank: int
) -> tuple[torch.device, RankInfo, TrainerOptions]:
    """Return a rank's device, its place among the ranks, and the trainer options for it.

    A launcher may let each rank see one GPU only, its own (srun --gpus-per-task=1). Each such rank
    then counts as a node with one device. Raises ConfigError if the rank's GPU is not there.
    """
    options, num_local = request.recipe.trainer, request.num_local
    device = torch.device("cpu")
    if device_name(options) != "cpu":
        devices, num_visible = parse_devices(options.arguments), torch.cuda.device_count()
        index = devices[local_rank] if isinstance(devices, list) else local_rank
        if num_visible == 1 and num_local > 1:
            index, local_rank, num_local = 0, 0, 1
            places = {"devices": 1, "num_nodes": request.size}
            options = replace(options, arguments={**options.arguments, **places})
        if index >= num_visible:
            raise ConfigError(
                f"rank {rank} trains on GPU {index} of its node, but sees {num_visible} GPUs: "
                "check trainer.devices and the GPUs that the launcher gives to each task."
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    rank_info = RankInfo(
        rank=rank,
        size=request.size,
        local_rank=local_rank,
        node_rank=rank // num_local,
        address=request.address,
        port=request.port,
    )
    return device, rank_info, options


def _forward_log(parent: Parent, level: int) -> None:
    logger = logging.getLogger("qtorch")
    logger.handlers[:] = [ParentLogHandler(parent, level)]
    logger.setLevel(level)
    logger.propagate = False


class ParentLogHandler(logging.Handler):
    """A logging handler that sends log lines to the parent."""

    def __init__(self, parent: Parent, level: int) -> None:
        super().__init__(level)
        self._parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{logging.Formatter().formatException(record.exc_info)}"
        self._parent.send({"log": [record.name, record.levelno, text]})


class ParentRecorder:
    """A stand-in for the parent's recorder that sends metrics and tags to it."""

    def __init__(self, parent: Parent, run_id: str, uri: str | None = None) -> None:
        self._parent, self.id, self.uri = parent, run_id, uri

    def log_batch(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send metrics to the parent, which logs them."""
        self._parent.send({"metrics": [dict(metrics), step]})

    def log_params(self, **params: Any) -> None:
        """Send params to the parent, which logs them."""
        self._parent.send({"params": {name: str(value) for name, value in params.items()}})

    def set_tags(self, **tags: Any) -> None:
        """Send tags to the parent, which sets them."""
        self._parent.send({"tags": tags})


def serialize_error(error: BaseException) -> dict[str, Any]:
    """Return an error as plain values; the exception itself too if it can be pickled."""
    try:
        pickled_error = base64.b64encode(cloudpickle.dumps(error)).decode()
    except Exception:  # pickling runs arbitrary code of the exception's class
        pickled_error = ""
    lines = traceback.format_exception(error)
    return {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(lines),
        "pickle": pickled_error,
    }
