"""Training on several devices: the parent process starts the ranks, supervises and ends them."""

from __future__ import annotations

import base64
import logging
import os
import pickle
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtorch.core.errors import ConfigError, QtorchError
from qtorch.core.session import session
from qtorch.data.dataset.batches import check_size
from qtorch.data.dataset.samples import Samples
from qtorch.model.devices.launcher import (
    Launch,
    check_launch,
    check_single_process,
    is_launched,
    plan_launch,
)
from qtorch.model.devices.rank_process import RankHandle, start_rank
from qtorch.model.devices.rank_training import RESULT, RankRequest
from qtorch.model.finetune import FineTuning
from qtorch.model.loop.checkpoint import get_generator_states
from qtorch.model.loop.factories import build_factory
from qtorch.model.loop.options import TrainerOptions, device_name, parse_devices
from qtorch.model.recipe import FitResult, Recipe
from qtorch.process.heartbeat import beat
from qtorch.process.stops import StopRequest

log = logging.getLogger(__name__)

POLL_SECONDS = 0.03
ERROR_GRACE_SECONDS = 3.0  # for the first error to arrive, after one that is a consequence of it
EXIT_SECONDS = 10.0  # for the ranks to exit by themselves, after all have reported their end
FOLDER_PREFIX = ".ranks-"
# Errors that a rank raises because another rank has gone.
SECONDARY_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")
CONNECTION_WORDS = (
    "gloo",
    "nccl",
    "connection closed",
    "connection reset",
    "broken pipe",
    "socket",
)


class RankError(QtorchError, RuntimeError):
    """A rank ended without reporting an error, or its exception cannot be rebuilt here."""


class RanksStopped(Exception):
    """All ranks stopped after the same step.

    `position` is (epoch, batch), `num_batches` the number of batches of the epoch; `result` the
    training so far with its best weights, or None before the first validation.
    """

    result: FitResult | None = None

    def __init__(self, position: tuple[int, int] | None, num_batches: int) -> None:
        super().__init__()
        self.position, self.num_batches = position, num_batches


def fit_on_ranks(
    network: nn.Module,
    samples: Sequence[Samples | None],
    recipe: Recipe,
    *,
    folder: Path | None,
    identity: str,
    checkpoint: Path | None,
    recorder: Any,
    interruption: StopRequest,
    tuning: FineTuning | None,
    optimizer_state: dict[str, Any] | None,
) -> FitResult:
    """Train `network` on all devices of the recipe; return it with the best weights.

    Metrics and heartbeats of the ranks are forwarded to this process. The threads of this process
    are divided among the ranks of this machine, at least one each. Raises RanksStopped after an
    interruption, or the error of the rank that failed first (not one that failed because another
    rank had gone).

    `folder` holds the checkpoints, and `checkpoint` is the file to resume from. `identity` is the
    training's hash, which is stored in checkpoints (`training_identity`). `optimizer_state` is the
    state that the optimizer starts from if nothing is resumed.
    """
    options = recipe.trainer
    _warn_batch_norms(network, options.num_devices, options.arguments.get("sync_batchnorm"))
    launch = plan_launch(options.num_local, int(options.arguments.get("num_nodes", 1)))
    with _rank_folder(folder) as rank_folder:
        request = RankRequest(
            network=network,
            recipe=recipe,
            tuning=tuning,
            optimizer_state=optimizer_state,
            generators=get_generator_states(torch.device("cpu")),
            identity=identity,
            folder=None if folder is None else str(folder.absolute()),
            checkpoint=None if checkpoint is None else str(checkpoint.absolute()),
            run_id=None if recorder is None else str(recorder.id),
            uri=getattr(recorder, "uri", None),
            size=options.num_devices,
            num_local=options.num_local,
            address=launch.address,
            port=_find_free_port(),
            log_level=logging.getLogger("qtorch").getEffectiveLevel(),
            session=session(),
        )
        digest = request.write(rank_folder, list(samples), is_single_node=launch.is_single_node)
        handles = _start_ranks(launch, rank_folder, digest)
        try:
            RankSupervisor(handles, recorder, interruption).wait()
        except RanksStopped as stop:
            if (rank_folder / RESULT).is_file():
                stop.result = _read_result(rank_folder, network)
            raise
        finally:
            for handle in handles:
                handle.kill()
        fit_result = _read_result(rank_folder, network)
    if fit_result.report["resumed_from"] is not None and checkpoint is not None:
        # The ranks got the absolute path; the report of one device has the path as it was passed.
        fit_result.report["resumed_from"] = str(checkpoint)
    return fit_result


def _read_result(rank_folder: Path, network: nn.Module) -> FitResult:
    """Read what the first rank has written; `network` is that of this process."""
    fit_result: FitResult = pickle.loads((rank_folder / RESULT).read_bytes())
    if isinstance(network, pl.LightningModule):
        network.load_state_dict(fit_result.network)  # type: ignore[arg-type]  # a state dict, see train_rank
        fit_result.network = network
    return fit_result


def _warn_batch_norms(network: nn.Module, size: int, sync_batchnorm: Any) -> None:
    if sync_batchnorm or not any(isinstance(m, _BatchNorm) for m in network.modules()):
        return
    log.warning(
        "the batch norms of %s normalize each device's share of a batch separately, as if batches "
        "were %d times smaller. On GPUs, set trainer.sync_batchnorm=true to synchronize them.",
        type(network).__name__,
        size,
    )


def _start_ranks(launch: Launch, folder: Path, digest: str) -> list[RankHandle]:
    handles: list[RankHandle] = []
    try:
        for local_rank in launch.own_ranks:
            rank = start_rank(
                local_rank,
                local_rank,
                launch.size,
                threads=launch.threads,
                folder=folder,
                digest=digest,
                is_single_node=launch.is_single_node,
            )
            handles.append(rank)
        handles += launch.start_remote_ranks(str(folder), digest)
    except BaseException:
        for handle in handles:
            handle.kill()
        raise
    return handles


class RankSupervisor:
    """Supervise the ranks of one training until all of them have ended."""

    def __init__(
        self, handles: Sequence[RankHandle], recorder: Any, interruption: StopRequest
    ) -> None:
        self.handles = handles
        self.recorder, self.interruption = recorder, interruption
        self.final_messages: dict[int, dict[str, Any]] = {}
        self.errors: dict[int, dict[str, Any]] = {}
        self._is_stop_sent = False

    def wait(self) -> None:
        """Wait until every rank has ended; raise the error of a failed one."""
        has_messages = False
        while len(self.final_messages) < len(self.handles):
            if not has_messages:
                beat("starting ranks")
            has_messages = self._read_messages() or has_messages
            if self.errors:
                raise self._root_error()
            if self.interruption.stop_requested and not self._is_stop_sent:
                self._is_stop_sent = True
                for handle in self.handles:
                    handle.stop()
            time.sleep(POLL_SECONDS)
        self._wait_for_exit()
        message = self.final_messages[0]
        if "stopped" in message:
            position = message["stopped"]  # None: before the first batch
            if position is not None:
                position = int(position[0]), int(position[1])
            raise RanksStopped(position, message["batches"])

    def _read_messages(self) -> bool:
        """Handle the messages of all ranks; return whether there were any."""
        has_messages = False
        for rank, handle in enumerate(self.handles):
            for message in handle.receive(0.0):
                has_messages = True
                self._handle_message(rank, message)
            is_unreported = rank not in self.final_messages and rank not in self.errors
            if handle.exit_status is not None and is_unreported:
                self.errors[rank] = {"exit": handle.exit_status.description}
        return has_messages

    def _handle_message(self, rank: int, message: dict[str, Any]) -> None:
        if "beat" in message:
            stage, details = message["beat"]
            beat(stage, **details)
        elif "metrics" in message:
            self.recorder.log_batch(message["metrics"][0], step=message["metrics"][1])
        elif "params" in message:
            self.recorder.log_params(**message["params"])
        elif "tags" in message:
            self.recorder.set_tags(**message["tags"])
        elif "log" in message:
            name, level, text = message["log"]
            logging.getLogger(name).log(level, "%s", text if rank == 0 else f"rank {rank}: {text}")
        elif "error" in message:
            self.errors.setdefault(rank, message["error"])
        else:
            self.final_messages[rank] = message

    def _root_error(self) -> BaseException:
        """Return the error of the rank that failed first, not one caused by another rank's exit."""
        deadline = time.monotonic() + ERROR_GRACE_SECONDS
        while time.monotonic() < deadline and all(_is_secondary(e) for e in self.errors.values()):
            time.sleep(POLL_SECONDS)
            self._read_messages()
        rank = min(self.errors, key=lambda r: (_is_secondary(self.errors[r]), r))
        error, size = self.errors[rank], len(self.handles)
        if "exit" in error:
            return RankError(
                f"rank {rank} of {size} {error['exit']} during training. Check "
                "its log and the system's (out of memory?). The last checkpoint is kept: run the "
                "same fit again to resume."
            )
        log.error("rank %d of %d failed:\n%s", rank, size, error["traceback"])
        exception = _deserialize_error(error)
        exception.add_note(f"in rank {rank} of {size}")
        return exception

    def _wait_for_exit(self) -> None:
        """Give the ranks some time to exit by themselves."""
        deadline = time.monotonic() + EXIT_SECONDS
        while time.monotonic() < deadline and any(h.exit_status is None for h in self.handles):
            time.sleep(POLL_SECONDS)
            self._read_messages()


def _is_secondary(error: dict[str, Any]) -> bool:
    if "exit" in error:
        return False
    text = error["message"].lower()
    return error["type"] in SECONDARY_ERRORS or (
        error["type"] == "RuntimeError" and any(word in text for word in CONNECTION_WORDS)
    )


def _deserialize_error(error: dict[str, Any]) -> BaseException:
    """Return the original exception, or a RankError with its message if it cannot be unpickled."""
    try:
        exception = pickle.loads(base64.b64decode(error["pickle"]))
        if isinstance(exception, BaseException):
            return exception
    except Exception as failure:  # unpickling runs arbitrary code of the exception's class
        log.debug("cannot unpickle the error of a rank: %s", failure)
    return RankError(f"{error['type']}: {error['message']}")


@contextmanager
def _rank_folder(folder: Path | None) -> Iterator[Path]:
    """Context manager for the folder of request, samples and result.

    Removes folders that a killed process left beside it.
    """
    if folder is not None:
        # Two fits cannot share a folder of checkpoints, or they would overwrite each other's. Tasks
        # of pools and jobs of sweeps make sure of it by a lease or a claim.
        for leftover in folder.glob(f"{FOLDER_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
    rank_folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=folder)).absolute()
    try:
        yield rank_folder
    finally:
        shutil.rmtree(rank_folder, ignore_errors=True)


def _find_free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        port: int = sock.getsockname()[1]
    return port


def check_devices(
    options: TrainerOptions, batch: Mapping[str, Any], module: Any, *, has_checkpoints: bool
) -> None:
    """Raise ConfigError if a training cannot be shared among its devices, whatever its data.

    `module`: the configuration of the module, or None.
    """
    size = options.num_devices
    if size == 1:
        check_single_process()
        return
    check_visible_gpus(options)
    check_size(batch["order"], batch["size"], batch["days_per_batch"], size)
    if module is not None:
        _check_batch_sharing(build_factory(module, "module"), size)
    num_nodes = int(options.arguments.get("num_nodes", 1))
    if num_nodes > 1 and not has_checkpoints:
        raise ConfigError(
            "several nodes exchange files in the checkpoint folder: keep checkpoints enabled "
            "(checkpoint.enabled), in a folder that all nodes can access (checkpoint.dir)."
        )
    check_launch(options.num_local, num_nodes)


def check_visible_gpus(options: TrainerOptions) -> None:
    """Raise ConfigError if a fit that starts its ranks here needs more GPUs than there are."""
    if device_name(options) == "cpu" or is_launched():
        return
    devices, num_visible = parse_devices(options.arguments), torch.cuda.device_count()
    if (devices if isinstance(devices, int) else max(devices) + 1) <= num_visible:
        return
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    reason = "" if variable is None else f" (CUDA_VISIBLE_DEVICES={variable})"
    if variable is not None and "MIG-" in variable:
        reason += ", because CUDA shows one part of divided GPUs (MIG) to a process"
    raise ConfigError(
        f"trainer.devices is {options.arguments['devices']!r}, but this process sees "
        f"{num_visible} GPUs{reason}: use fewer devices, or make more of them visible."
    )


def _check_batch_sharing(factory: Callable[..., Any], size: int) -> None:
    """Raise ConfigError unless the class that defines the training step allows several devices."""
    module_class = getattr(factory, "func", factory)
    if not isinstance(module_class, type):
        return
    steps = (
        "training_sums",
        "training_step",
        "loss_sums_from_scores",
        "loss_sums",
        "on_train_epoch_start",
    )
    for base in module_class.__mro__:
        if "single_device_reason" in vars(base):
            reason = vars(base)["single_device_reason"]
            if reason is None:
                return
            raise ConfigError(
                f"{module_class.__name__} cannot train on {size} devices: {reason}. Set "
                "trainer.devices=1."
            )
        if any(step in vars(base) for step in steps):
            raise ConfigError(
                f"{module_class.__name__} has its own training step, but does not declare whether "
                "several devices can share a batch. If its sums over the parts of a batch add up "
                "to those of the whole batch, set single_device_reason = None in the class."
            )
