"""A training on several devices: its ranks started, heard and ended by the process that asked."""

from __future__ import annotations

import base64
import logging
import pickle
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtorch.core.errors import ConfigError, QtorchError
from qtorch.core.heartbeat import beat
from qtorch.core.session import session
from qtorch.data.sample_set import Samples
from qtorch.data.shares import check_size
from qtorch.model.external import Launch, check_alone, launched
from qtorch.model.factories import configured_factory
from qtorch.model.finetuning import FineTuning
from qtorch.model.generators import generator_states
from qtorch.model.interruption import Stoppable
from qtorch.model.rank_process import RankHandle, RankProcess, threads_of
from qtorch.model.rank_request import RESULT, RankRequest
from qtorch.model.training import Fitted, Recipe

log = logging.getLogger(__name__)

PAUSE, GRACE, LEAVE = 0.03, 3.0, 10.0
PREFIX = ".ranks-"
# What a rank says when another one has left it alone.
ECHOES = ("DistBackendError", "DistNetworkError", "DistStoreError")
ECHO_WORDS = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket")


class RankError(QtorchError, RuntimeError):
    """A rank ended without a word, or with an error that cannot be handed on."""


class StoppedRanks(Exception):
    """All ranks stopped after the same step: `at` (epoch, position) of `num_batches`."""

    def __init__(self, at: tuple[int, int] | None, num_batches: int) -> None:
        super().__init__()
        self.at, self.num_batches = at, num_batches


def fit_by_ranks(
    network: nn.Module,
    samples: Sequence[Samples | None],
    recipe: Recipe,
    *,
    folder: Path | None,
    identity: str,
    found: tuple[Path, dict[str, Any]] | None,
    recorder: Any,
    interruption: Stoppable,
    tuning: FineTuning | None,
    optimizer_state: dict[str, Any] | None,
) -> Fitted:
    """Train `network` on all devices of the recipe and give the best weights.

    Metrics and heartbeats of the ranks are this process's. Each rank has this process's threads
    shared out among the machine's ranks, at least one. Raises StoppedRanks after an interruption,
    and the first rank's error that is no mere answer to another's.
    """
    options = recipe.trainer
    _warn_of_norms(network, options.num_devices, options.rest.get("sync_batchnorm"))
    launch = launched(options.num_local, int(options.rest.get("num_nodes", 1)))
    with _workplace(folder) as work:
        request = RankRequest(
            network=network,
            recipe=recipe,
            tuning=tuning,
            optimizer_state=optimizer_state,
            generators=generator_states(),
            identity=identity,
            folder=None if folder is None else str(folder.absolute()),
            checkpoint=None if found is None else str(found[0].absolute()),
            run_id=None if recorder is None else str(recorder.id),
            uri=getattr(recorder, "uri", None),
            size=options.num_devices,
            num_local=options.num_local,
            address=launch.address,
            port=_free_port(),
            log_level=logging.getLogger("qtorch").getEffectiveLevel(),
            session=session(),
        )
        digest = request.write(work, list(samples), local=launch.local)
        handles = _started(launch, work, digest, options.num_devices)
        try:
            Team(handles, recorder, interruption).wait()
        finally:
            for handle in handles:
                handle.kill()
        fitted: Fitted = pickle.loads((work / RESULT).read_bytes())
    if isinstance(network, pl.LightningModule):
        network.load_state_dict(fitted.network)  # type: ignore[arg-type]  # see train_rank
        fitted.network = network
    if fitted.report["resumed_from"] is not None and found is not None:
        fitted.report["resumed_from"] = str(found[0])
    return fitted


def _warn_of_norms(network: nn.Module, size: int, together: Any) -> None:
    if together or not any(isinstance(m, _BatchNorm) for m in network.modules()):
        return
    log.warning(
        "the batch norms of %s see each device's share of a batch alone: the numbers are those of "
        "batches %d times smaller there. On GPUs trainer.sync_batchnorm=true puts them together.",
        type(network).__name__,
        size,
    )


def _started(launch: Launch, work: Path, digest: str, size: int) -> list[RankHandle]:
    threads = threads_of(launch.num_local)
    handles: list[RankHandle] = []
    try:
        for local_rank in launch.own:
            rank = RankProcess(
                local_rank,
                local_rank,
                size,
                threads=threads,
                folder=work,
                digest=digest,
                local=launch.local,
            )
            handles.append(rank)
        handles += launch.others(str(work), digest)
    except BaseException:
        for handle in handles:
            handle.kill()
        raise
    return handles


class Team:
    """The ranks of one training, until all have come to an end."""

    def __init__(
        self, handles: Sequence[RankHandle], recorder: Any, interruption: Stoppable
    ) -> None:
        self.handles = handles
        self.recorder, self.interruption = recorder, interruption
        self.ended: dict[int, dict[str, Any]] = {}
        self.errors: dict[int, dict[str, Any]] = {}
        self._asked = False

    def wait(self) -> None:
        """Until every rank is done; raises what went wrong."""
        heard = False
        while len(self.ended) < len(self.handles):
            if not heard:
                beat("starting ranks")
            heard = self._hear() or heard
            if self.errors:
                raise self._error()
            if self.interruption.requested and not self._asked:
                self._asked = True
                for handle in self.handles:
                    handle.stop()
            time.sleep(PAUSE)
        self._let_go()
        stopped = self.ended[0].get("stopped", False)
        if stopped is not False:
            at = None if stopped is None else (int(stopped[0]), int(stopped[1]))
            raise StoppedRanks(at, self.ended[0]["batches"])

    def _hear(self) -> bool:
        """Take what the ranks have said; whether there was anything."""
        any_word = False
        for handle in self.handles:
            code = handle.exit_code()  # before its words: what it said last is not overlooked
            for message in handle.messages():
                any_word = True
                self._take(handle.rank, message)
            silent = handle.rank not in self.ended and handle.rank not in self.errors
            if code is not None and silent:
                self.errors[handle.rank] = {"exit": code}
        return any_word

    def _take(self, rank: int, message: dict[str, Any]) -> None:
        if "beat" in message:
            stage, details = message["beat"]
            beat(stage, **details)
        elif "metrics" in message:
            self.recorder.log_batch(message["metrics"][0], step=message["metrics"][1])
        elif "tags" in message:
            self.recorder.set_tags(**message["tags"])
        elif "log" in message:
            name, level, text = message["log"]
            logging.getLogger(name).log(level, "%s", text if rank == 0 else f"rank {rank}: {text}")
        elif "error" in message:
            self.errors.setdefault(rank, message["error"])
        else:
            self.ended[rank] = message

    def _error(self) -> BaseException:
        """The error of the rank that began: one that says more than that another one left."""
        end = time.monotonic() + GRACE
        while time.monotonic() < end and all(_is_echo(e) for e in self.errors.values()):
            time.sleep(PAUSE)
            self._hear()
        rank = min(self.errors, key=lambda r: (_is_echo(self.errors[r]), r))
        error, size = self.errors[rank], len(self.handles)
        if "exit" in error:
            return RankError(
                f"rank {rank} of {size} {_ending(error['exit'])} in the middle of the training. "
                "Its log says why, or the system's (was it out of memory?); the last checkpoint "
                "is kept, the same fit goes on from it."
            )
        log.error("rank %d of %d failed:\n%s", rank, size, error["traceback"])
        found = _rebuilt(error)
        found.add_note(f"in rank {rank} of {size}")
        return found

    def _let_go(self) -> None:
        """A moment for the ranks to leave by themselves."""
        end = time.monotonic() + LEAVE
        while time.monotonic() < end and any(h.exit_code() is None for h in self.handles):
            time.sleep(PAUSE)
            self._hear()


def _is_echo(error: dict[str, Any]) -> bool:
    if "exit" in error:
        return False
    text = error["message"].lower()
    return error["type"] in ECHOES or (
        error["type"] == "RuntimeError" and any(word in text for word in ECHO_WORDS)
    )


def _ending(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def _rebuilt(error: dict[str, Any]) -> BaseException:
    """The very error; another of its words where it cannot be."""
    try:
        found = pickle.loads(base64.b64decode(error["pickle"]))
        if isinstance(found, BaseException):
            return found
    except Exception as failure:  # whatever its class does when it is built
        log.debug("an error of a rank cannot be rebuilt: %s", failure)
    return RankError(f"{error['type']}: {error['message']}")


@contextmanager
def _workplace(folder: Path | None) -> Iterator[Path]:
    """A folder for request, samples and result; what a killed process left beside it goes."""
    if folder is not None:
        for old in folder.glob(f"{PREFIX}*"):
            shutil.rmtree(old, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder)).absolute()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        port: int = found.getsockname()[1]
    return port


def check_devices(recipe: Recipe, train: Samples) -> None:
    """ConfigError for a training that its devices cannot share, before they are started."""
    options = recipe.trainer
    size = options.num_devices
    if size == 1:
        check_alone()
        return
    check_size(recipe.batch["order"], recipe.batch["size"], recipe.batch["days_per_batch"], size)
    if len(train) < size:
        raise ConfigError(f"{len(train)} training samples are too few for {size} devices.")
    if recipe.module is not None:
        _check_step(configured_factory(recipe.module, "module"), size)
    num_nodes = int(options.rest.get("num_nodes", 1))
    if num_nodes > 1 and recipe.checkpoint.get("enabled", True) is False:
        raise ConfigError(
            "several nodes meet in the folder of the checkpoints: leave them on "
            "(checkpoint.enabled), in a folder that all nodes see (checkpoint.dir)."
        )


def _check_step(make: Callable[..., Any], size: int) -> None:
    kind = getattr(make, "func", make)
    if not isinstance(kind, type):
        return
    steps = ("training_sums", "training_step", "sums_of", "loss_sums", "on_train_epoch_start")
    for each in kind.__mro__:
        if "undivided" in vars(each):
            reason = vars(each)["undivided"]
            if reason is None:
                return
            raise ConfigError(
                f"{kind.__name__} does not train on {size} devices: {reason}. Use one: "
                "trainer.devices=1."
            )
        if any(step in vars(each) for step in steps):
            raise ConfigError(
                f"{kind.__name__} has a training step of its own and does not say whether several "
                "devices can share a batch. Where its sums over parts of a batch add up to those "
                "of the whole, say so in the class: undivided = None."
            )
