"""Checkpoints: their files, what an exact resume needs, and the callback that writes them.

Files are written atomically, with a digest of their bytes (`qtorch.core.file_digest`). The previous
one is kept, and a damaged one is skipped.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import random
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping, ProgressBar, Timer
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError, QtorchError
from qtorch.core.file_digest import PLACEHOLDER, check_digest, insert_digest
from qtorch.core.files import atomic_write, remove_partial_files
from qtorch.model.loop.interruption import StopTraining
from qtorch.model.loop.lightning_internals import (
    can_stop,
    epoch_state,
    num_finished_epochs,
    restore_epoch_state,
    unsent_metrics,
    validates_next,
)
from qtorch.model.loop.loader import StepLoader
from qtorch.model.loop.module import ScoreModule
from qtorch.model.loop.progress import (
    METRICS,
    PRETRAIN_LOSS,
    TRAIN_LOSS,
    FitProgress,
    find_metric,
)
from qtorch.model.loop.rank_group import RankGroup
from qtorch.model.loop.sharding import gather_optimizer_state, gather_weights
from qtorch.process.heartbeat import beat, has_listeners
from qtorch.process.stops import StopRequest

log = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
EARLIER_BEST = "earlier-best.ckpt"  # the best one before an epoch that ended early was one
CALLBACK_STATE_KEY = "qtorch_keeper"
ENDED_EARLY = "ended_early"  # why the training ended inside an epoch: one of the next line
MAX_STEPS, MAX_TIME, STOPPED_BY_CALLBACK = "max_steps", "max_time", "callback"
TIMER = "Timer"  # the key of Lightning's timer (max_time) in a checkpoint
GENERATORS, ACCUMULATORS, THREADS = "generators", "tallies", "threads"  # keys of RankStates
FORMAT_VERSION = 4  # of the entry under CALLBACK_STATE_KEY
# Format 2 holds one member, without a list of members; formats 2 and 3 have no digest.
READABLE_FORMATS = (2, 3, 4)
FIRST_FORMAT_WITH_DIGEST = 4


class CheckpointError(QtorchError, OSError):
    """A checkpoint could not be written or read."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically: to a temporary file, flushed to disk, then renamed.

    A crash leaves either the old file or the new one. Files hold tensors and plain values only, and
    are read with `weights_only=True`. The digest is the comment of the zip that torch writes.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        try:
            with atomic_write(path) as temporary:
                torch.save(checkpoint, temporary)
                with zipfile.ZipFile(temporary, "a") as archive:
                    archive.comment = PLACEHOLDER.encode()
                with temporary.open("rb+") as file:
                    insert_digest(file)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"could not write checkpoint {path}: {error}. Is the disk full? The existing "
                "checkpoint is unchanged."
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint with its tensors on the CPU; see `read_checkpoint`."""
        return read_checkpoint(path)


def save_and_rotate(
    save: Any, folder: Path, *, rotate: bool = True, keep_previous: bool = False
) -> Path:
    """Save the folder's last checkpoint by calling `save(path)`; keep the old one as the previous.

    `rotate` is False in a process that only takes part in a collective save, whose file another one
    writes. `keep_previous`: the old last one is damaged, so that the previous one stays as it is.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    new_path = _temporary_path(folder, LAST)
    save(str(new_path))
    if not rotate:
        return last
    if last.exists() and not keep_previous:
        os.replace(last, previous)
    os.replace(new_path, last)
    return last


def link_best_checkpoint(folder: Path, *, keep_earlier: bool = False) -> None:
    """Make the last checkpoint the best one, as a hard link to the same file.

    `keep_earlier`: the last checkpoint is the end of a training inside an epoch. A longer training
    has no such end, so that the best one of its whole epochs is kept for it.
    """
    if keep_earlier and (folder / BEST).exists():
        os.replace(folder / BEST, folder / EARLIER_BEST)
    elif not keep_earlier:
        (folder / EARLIER_BEST).unlink(missing_ok=True)
    link = _temporary_path(folder, BEST)
    link.unlink(missing_ok=True)
    try:
        os.link(folder / LAST, link)
    except OSError:  # the file system has no hard links
        link.write_bytes((folder / LAST).read_bytes())
    os.replace(link, folder / BEST)


def restore_earlier_best(folder: Path) -> None:
    """Undo `link_best_checkpoint(folder, keep_earlier=True)`, if it was the last one."""
    if (folder / EARLIER_BEST).exists():
        os.replace(folder / EARLIER_BEST, folder / BEST)


def remove_leftovers(folder: Path, *, is_finished: bool) -> None:
    """Remove what a process left in the folder that was killed while writing a checkpoint.

    A complete checkpoint that has not been renamed yet is removed only if the training is finished:
    otherwise another process may be about to rename it, and the next checkpoint replaces it anyway.
    """
    remove_partial_files(folder)
    for name in (LAST, BEST) if is_finished else ():
        _temporary_path(folder, name).unlink(missing_ok=True)


def _temporary_path(folder: Path, name: str) -> Path:
    return folder / f".new-{name}"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint; raise CheckpointError if it is damaged or not written by qtorch."""
    path = Path(path)
    try:
        is_intact = check_digest(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {first}") from error
    if not isinstance(content, dict) or CALLBACK_STATE_KEY not in content:
        raise CheckpointError(f"{path} is not a checkpoint written by qtorch.")
    if not is_intact and get_format_version(content) >= FIRST_FORMAT_WITH_DIGEST:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: its digest is missing.")
    return content


def get_format_version(content: dict[str, Any]) -> int:
    return int(content[CALLBACK_STATE_KEY].get("format", 1))


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest readable checkpoint of a folder; skip a damaged one with a warning."""
    paths = [path for path in (folder / LAST, folder / PREVIOUS) if path.is_file()]
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            log.warning("%s It is skipped.", error)
    if paths:
        log.warning("%s contains no intact checkpoint.", folder)
    return None


def get_generator_states(device: torch.device | None = None) -> dict[str, Any]:
    """Return the states of torch (CPU and CUDA), numpy and Python as tensors and plain values.

    Plain values let a checkpoint load without running any code. Of the CUDA devices only `device`
    is included, none if it is the CPU, and all of them if it is None.
    """
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - other libraries use the global generator
    name, keys, position, has_gauss, gauss = numpy_state
    version, numbers, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": _cuda_states(device),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(numbers), next_gauss],
    }


def restore_generators(states: dict[str, Any], device: torch.device | None = None) -> None:
    """Restore the states that `get_generator_states` returned.

    Those of a single CUDA device are restored on `device`, whose number may differ. A warning tells
    if there are none for it.
    """
    torch.set_rng_state(states["torch"].cpu())
    _restore_cuda_states([s.cpu() for s in states["cuda"]], device)
    name, keys, position, has_gauss, gauss = states["numpy"]
    state = (name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss)
    np.random.set_state(state)  # noqa: NPY002 - as above
    version, numbers, next_gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), next_gauss))


def _cuda_states(device: torch.device | None) -> list[torch.Tensor]:
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return []
    # Asking other devices for their state would initialize them.
    return torch.cuda.get_rng_state_all() if device is None else [torch.cuda.get_rng_state(device)]


def _restore_cuda_states(states: list[torch.Tensor], device: torch.device | None) -> None:
    if device is None:
        if states and len(states) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states)
        return
    if device.type != "cuda":
        return
    number = 0 if len(states) == 1 else device.index or 0  # older checkpoints hold all devices
    if number < len(states):
        torch.cuda.set_rng_state(states[number], device)
    else:
        log.warning(
            "the checkpoint holds the random generators of %d GPUs, not that of %s: random draws "
            "(dropout) differ from those of an uninterrupted training.",
            len(states),
            device,
        )


@contextmanager
def preserve_generators() -> Iterator[None]:
    """Context manager that restores the random generators at the end of the block."""
    states = get_generator_states()
    try:
        yield
    finally:
        restore_generators(states)


@dataclass
class RankStates:
    """Random generators and loss sums of every rank, with their position in the training.

    For a user's module `accumulators` holds, instead of loss sums, what it has logged in the
    running epoch. `seed_parts` is (seed, epoch, position).
    """

    generators: list[dict[str, Any]]
    accumulators: list[Any]
    seed_parts: tuple[int, ...] = ()
    threads: int = 0

    @classmethod
    def collect(cls, ranks: RankGroup, module: pl.LightningModule) -> RankStates:
        """Collect the current states. Must be called by every rank."""
        if isinstance(module, ScoreModule):
            accumulator: Any = module.accumulator.sums().cpu()
        else:
            accumulator = epoch_state(module)
        states = get_generator_states(module.device)
        rank_states = ranks.gather((states, accumulator))
        parts = [g for g, _ in rank_states], [t for _, t in rank_states]
        return cls(*parts, threads=torch.get_num_threads())

    def to_checkpoint(self) -> dict[str, Any]:
        """Return the entries of a checkpoint."""
        is_single_rank = len(self.generators) == 1
        generators = self.generators[0] if is_single_rank else self.generators
        return {GENERATORS: generators, ACCUMULATORS: self.accumulators, THREADS: self.threads}

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any], seed: int) -> RankStates:
        """Read a checkpoint of any number of ranks; `seed` is the training's seed."""
        state = checkpoint[CALLBACK_STATE_KEY]
        seed_parts = (seed, int(checkpoint["epoch"]), int(state.get("position", 0)))
        generators, threads = state[GENERATORS], state[THREADS]
        is_single_rank = not isinstance(generators, list)
        return cls(
            [generators] if is_single_rank else generators, state[ACCUMULATORS], seed_parts, threads
        )

    def restore(self, ranks: RankGroup, module: pl.LightningModule) -> None:
        """Restore the state of this rank.

        If the number of ranks has changed, the epoch goes on with the samples that were not used
        yet, but with other random draws: generators are seeded by (seed, epoch, position, size,
        rank). The loss sums so far are counted once. What a user's module has logged in the epoch
        so far cannot be split and is dropped.
        """
        num_saved_ranks = len(self.generators)
        if num_saved_ranks == ranks.size:
            self._warn_thread_change(module.device)
            restore_generators(self.generators[ranks.rank], module.device)
            state = self.accumulators[ranks.rank]
        else:
            log.warning(
                "the checkpoint was written with %d devices, this training resumes with %d: the "
                "epoch continues with its unused samples, but random draws (dropout) differ.",
                num_saved_ranks,
                ranks.size,
            )
            ranks.seed(*self.seed_parts)
            state = (
                torch.stack(self.accumulators).sum(0) if isinstance(module, ScoreModule) else None
            )
            if state is not None and not ranks.is_first:
                state = torch.zeros_like(state)
        if isinstance(module, ScoreModule):
            module.accumulator.load_sums(state, module.device)
        elif state is not None:
            restore_epoch_state(module, state)

    def _warn_thread_change(self, device: torch.device) -> None:
        """Warn if the number of CPU threads differs, which changes the order of float sums."""
        num_threads = torch.get_num_threads()
        if device.type == "cpu" and self.threads != num_threads:
            log.warning(
                "the checkpoint was written with %d threads, this training resumes with %d: "
                "results may differ in the last bits (set OMP_NUM_THREADS to use the same number).",
                self.threads,
                num_threads,
            )


class CheckpointCallback(Checkpoint):
    """Record history and best weights, and write checkpoints that training resumes from exactly.

    To Lightning's checkpoint it adds what an exact resume needs: the states of the random
    generators (torch, CUDA, numpy, Python), the best weights with their metric value, and the
    metrics so far. It writes a checkpoint after each epoch and within an epoch at each multiple of
    `every_n_steps` batches (one batch later if a validation comes in between). A requested stop is
    answered at the next such place: a checkpoint, then StopTraining. With several ranks, the first
    rank writes the checkpoint, which holds the state of every rank, and all ranks stop after the
    same step.

    `members` holds the progress of each member that the fit trains; a usual fit has one.

    `monitor` is the metric that decides the best epoch, `mode` is "min" or "max". This callback
    must be the last one to see the end of an epoch, and its `progress_callback` the first of those
    that save checkpoints.

    The weights that are kept are those that were validated: also if a validation takes place within
    an epoch, and if a callback (weight averaging) or the optimizer (schedule-free) exchanges the
    weights for the validation. Each validation is a point of the history. Points are numbered by
    epoch, or by optimizer steps if there are validations within epochs.
    """

    def __init__(
        self,
        loader: StepLoader,
        *,
        folder: Path | None,
        identity: str,
        monitor: str,
        mode: str,
        interruption: StopRequest,
        ranks: RankGroup,
        every_n_steps: int | None = None,
        log_epochs: bool = True,
    ) -> None:
        self.loader, self.folder, self.identity = loader, folder, identity
        self.ranks = ranks
        self.monitor, self.mode = monitor, mode
        self.every_n_steps, self.interruption = every_n_steps, interruption
        self.log_epochs = log_epochs
        self.members = [FitProgress()]
        self.seconds = self.train_seconds = 0.0
        self.num_train_samples = 0  # samples that were trained on in train_seconds
        self.stop_position: tuple[int, int] | None = None
        self._resume_states: RankStates | None = None
        self.resumed_from: Path | None = None  # until the first checkpoint is written
        self._start_time = self._epoch_start_time = time.perf_counter()
        self._valid_seconds = 0.0
        self._has_validated = self._has_ever_validated = False
        self.validation_names: set[str] = set()  # metrics of a user's module from its validation
        self._metrics_before_validation: dict[str, Tensor] = {}
        self._validated_weights: dict[str, Tensor] | None = None
        self._is_new_best = False  # and not yet in a checkpoint
        self._is_checkpoint_due = False  # within the epoch, not yet written
        self._ended_early: str | None = None  # why the training ended inside an epoch
        self._unsent_metrics: list[tuple[dict[str, float], int]] = []
        self.progress_callback = ProgressCallback(self)

    # -- hooks ---------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.ranks.connect()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do not train on after a checkpoint in which early stopping had ended the training."""
        early_stops = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]  # a list, in spite of its annotation
        if any(0 < c.wait_count >= c.patience for c in early_stops) or all(
            member.is_stopped for member in self.members
        ):
            trainer.should_stop = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_time = self._epoch_start_time = time.perf_counter()
        self._valid_seconds = 0.0
        self.resend_metrics(trainer)
        if self._resume_states is not None:
            self._resume_states.restore(self.ranks, pl_module)
            self._resume_states = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_start_time = time.perf_counter()
        self._valid_seconds = 0.0
        self._has_validated = False
        for logger in trainer.loggers:
            logger.save()  # what Lightning has sent at the end of the last epoch

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            # What the device has not computed yet belongs to the training time.
            torch.cuda.synchronize(pl_module.device)
        self._valid_start_time = time.perf_counter()
        self._metrics_before_validation = dict(trainer.callback_metrics)
        # Each rank has batch norm statistics of its own. Validate what is saved: the first rank's.
        self.ranks.broadcast(pl_module.buffers())

    def on_validation_batch_end(self, *_: Any) -> None:
        beat("validation")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated_weights = None
        if not trainer.sanity_checking and _exchanges_weights(trainer):
            # Other callbacks have exchanged the weights by now, and will have put them back later.
            self._validated_weights = gather_weights(get_network(pl_module))

    def record_validation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record a validation that has ended; one within an epoch is a point of the history."""
        self._valid_seconds += time.perf_counter() - self._valid_start_time
        if trainer.sanity_checking:
            return
        self._has_validated = self._has_ever_validated = True
        before = self._metrics_before_validation
        logged = trainer.callback_metrics
        self.validation_names |= {k for k, v in logged.items() if before.get(k) is not v}
        if self.loader.position < self.loader.num_batches:
            self._finish_inner_validation(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        position = self.loader.position
        if has_listeners():
            self._send_heartbeat(trainer, position)
        if has_reached_max_steps(trainer):
            trainer.should_stop = True  # then a validation follows, as at the end of an epoch
        if isinstance(pl_module, ScoreModule):
            num_pending = pl_module.weight_update.num_pending
        else:
            num_pending = position % trainer.accumulate_grad_batches
        if position >= self.loader.num_batches or num_pending:
            return  # a checkpoint cannot hold accumulated gradients
        if self.every_n_steps is not None and position % self.every_n_steps == 0:
            self._is_checkpoint_due = True
        if self._ends_in_front_of_batches(trainer):
            self._save_checkpoint(trainer)  # a longer training goes on from here
        if validates_next(trainer):
            return  # a training resumed from here would skip this validation
        stop = self.ranks.any_rank(self.interruption.stop_requested)
        if stop or self._is_checkpoint_due:
            self._save_checkpoint(trainer)
        if stop:
            self._stop(trainer.current_epoch, position)

    def _ends_in_front_of_batches(self, trainer: pl.Trainer) -> bool:
        """Whether the training ends here where a longer one would go on with the next batch."""
        is_end = has_reached_max_steps(trainer) or (trainer.should_stop and can_stop(trainer))
        return is_end and self.loader.can_resume and not validates_next(trainer, ignore_stop=True)

    def record_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record an epoch that has ended, and judge its weights."""
        member_values = self._epoch_values(trainer, pl_module)
        end_time = time.perf_counter()
        self.train_seconds += end_time - self._epoch_start_time - self._valid_seconds
        source = self.loader.source
        num_batches = self.loader.num_batches - self.loader.start_position
        self.num_train_samples += round(len(source.samples) * num_batches / len(source))
        for member, values in zip(self.members, member_values, strict=True):
            member.epochs += 1
            member.add_point(values, self._curve_step(trainer))
            self._log_epoch(trainer, values, end_time - self._epoch_start_time)
            if has_listeners():
                self._send_heartbeat(trainer, self.loader.position, values)
            self._update_best(trainer, pl_module, member, values)
            if isinstance(pl_module, ScoreModule):
                # Send before the checkpoint: after a crash between the two, a resume sends again.
                self._send_metrics(trainer, values, member.steps[-1])
                self._check_loss(trainer, member, values)
            else:
                _warn_nonfinite(values, trainer.current_epoch)
        self._validated_weights = None
        if all(member.is_stopped for member in self.members):
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.loader.position < self.loader.num_batches:
            self._ended_early = _end_reason(trainer)
        self._save_checkpoint(trainer)
        if self.ranks.any_rank(self.interruption.stop_requested):
            self._stop(trainer.current_epoch + 1, 0)

    def _finish_inner_validation(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Add the metrics of a validation within an epoch to the history, and judge its weights."""
        if isinstance(module, ScoreModule):
            member_values = [dict(metrics) for metrics in module.accumulator.epoch_metrics]
            module.accumulator.clear_metrics()  # they do not belong to the end of the epoch
        else:
            names = self.validation_names
            member_values = [self._read_logged_metrics(trainer, lambda name: name in names)]
        self._has_validated = False  # what the epoch's end has to report
        for member, values in zip(self.members, member_values, strict=True):
            member.add_point(values, self._curve_step(trainer))
            self._log_epoch(trainer, values, time.perf_counter() - self._epoch_start_time)
            self._update_best(trainer, module, member, values)
            if isinstance(module, ScoreModule):
                self._send_metrics(trainer, values, member.steps[-1])
        self._validated_weights = None

    def _curve_step(self, trainer: pl.Trainer) -> int:
        """Return the place of the current metrics on the axis of the curves."""
        return trainer.global_step if validates_within_epochs(trainer) else trainer.current_epoch

    def _epoch_values(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> list[dict[str, float]]:
        """Return the metrics of the finished epoch, of each member."""
        if isinstance(module, ScoreModule):
            return [
                {k: metrics[k] for k in METRICS if k in metrics}
                for metrics in module.accumulator.epoch_metrics
            ]
        # Without a validation at the epoch's end, the metrics of an earlier one are not repeated.
        old_names = set() if self._has_validated else self.validation_names
        values = self._read_logged_metrics(trainer, lambda name: name not in old_names)
        if self._has_ever_validated:
            self._require_monitor(self.validation_names | set(values))
        return [values]

    def _read_logged_metrics(
        self, trainer: pl.Trainer, is_included: Callable[[str], bool]
    ) -> dict[str, float]:
        """Return what a user's module has logged, the same on all ranks."""
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if is_included(k)}
        # All ranks need the same history and best epoch.
        rank_values: list[dict[str, float]] = self.ranks.gather(values)
        values = rank_values[0]
        self.monitor = find_metric(self.monitor, values)
        return values

    def resend_metrics(self, trainer: pl.Trainer) -> None:
        """Send once the metrics that a killed process may not have delivered.

        For a ScoreModule these are all metrics of the history. For a user's own module they are the
        ones that Lightning would have sent after the checkpoint.
        """
        unsent, self._unsent_metrics = self._unsent_metrics, []
        for values, step in unsent:
            self._send_metrics(trainer, values, step)

    # -- best weights, metrics, saving ---------------------------------------------------------

    def _update_best(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        member: FitProgress,
        values: dict[str, float],
    ) -> None:
        value = values.get(self.monitor, math.nan)
        if not member.is_improvement(value, self.mode):
            return
        network, weights = get_network(module), None
        if self.monitor in self.validation_names:
            weights = self._validated_weights
        member.best_weights = gather_weights(network) if weights is None else weights
        member.best_optimizer = None
        if trainer.optimizers:
            state = gather_optimizer_state(trainer.strategy, trainer.optimizers[0], network)
            member.best_optimizer = _clone_tensors(state)
        member.best_epoch, member.best_value = trainer.current_epoch, value
        member.best_step = trainer.global_step
        self._is_new_best = True

    def _check_loss(
        self, trainer: pl.Trainer, member: FitProgress, values: dict[str, float]
    ) -> None:
        loss = values.get(TRAIN_LOSS, values.get(PRETRAIN_LOSS, math.nan))
        if math.isfinite(loss):
            return
        problem = f"training loss of epoch {trainer.current_epoch} is {loss}"
        if member.best_weights is None:
            raise DataError(
                f"{problem}. Check for NaN features (add a Fillna processor) and for very large "
                "ones (normalize them), or lower the learning rate or set gradient_clip_val."
            )
        log.warning(
            "%s: stopping early; using the best weights, of epoch %d.", problem, member.best_epoch
        )
        member.is_stopped = True

    def _require_monitor(self, names: set[str]) -> None:
        """Raise ConfigError if a user's module has not logged the monitored metric.

        Such a module chooses its metric names itself, so this can only be checked after an epoch
        with its validation.
        """
        if self.monitor in names:
            return
        raise ConfigError(
            f"the LightningModule did not log the metric to monitor, {self.monitor!r}, in an "
            f"epoch; it logged {', '.join(sorted(names)) or 'nothing'}. "
            "Set monitor to one of its metrics, or log the monitored one with self.log."
        )

    def _send_metrics(self, trainer: pl.Trainer, values: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
            logger.save()  # a CSVLogger writes its file only now

    def _save_checkpoint(self, trainer: pl.Trainer) -> None:
        self._is_checkpoint_due = False
        if self.folder is None:
            return
        self.update_seconds()
        beat("checkpoint")
        # Every rank takes part in gathering the state; only the first one writes the file.
        save_and_rotate(
            trainer.save_checkpoint,
            self.folder,
            rotate=self.ranks.is_first,
            keep_previous=self.resumed_from == self.folder / PREVIOUS,
        )
        if self.ranks.is_first:
            if self.resumed_from == self.folder / PREVIOUS:
                restore_earlier_best(self.folder)
            if self._is_new_best:  # the checkpoint holds the best weights
                link_best_checkpoint(self.folder, keep_earlier=self._ended_early is not None)
        self.resumed_from = None
        self._is_new_best = False

    def _send_heartbeat(
        self, trainer: pl.Trainer, position: int, values: dict[str, float] | None = None
    ) -> None:
        num_batches = position - self.loader.start_position
        seconds = time.perf_counter() - self._epoch_start_time - self._valid_seconds
        batch_size = len(self.loader.source.samples) / max(len(self.loader.source), 1)
        details: dict[str, Any] = {"metrics": values} if values else {}
        beat(
            "training",
            epoch=trainer.current_epoch,
            epochs=trainer.max_epochs,
            batch=position,
            batches=self.loader.num_batches,
            samples_per_second=round(num_batches * batch_size / seconds) if seconds > 0 else None,
            **details,
        )

    def update_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._start_time
        self._start_time = now

    def _stop(self, epoch: int, position: int) -> None:
        self.stop_position = (epoch, position)
        raise StopTraining

    def _log_epoch(self, trainer: pl.Trainer, values: dict[str, float], seconds: float) -> None:
        metrics = "  ".join(f"{k} {v:.6g}" for k, v in values.items())
        place = f"epoch {trainer.current_epoch}"
        if self.loader.position < self.loader.num_batches:
            place += f", step {trainer.global_step}"
        # A progress bar shows the same, but not to the log file of the run.
        extra = {"file_only": not self.log_epochs}
        log.info("%s: %s  (%.2f s)", place, metrics, seconds, extra=extra)

    # -- state ---------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CALLBACK_STATE_KEY] = {
            "format": FORMAT_VERSION,
            "identity": self.identity,
            **RankStates.collect(self.ranks, pl_module).to_checkpoint(),
            "members": [member.state_dict() for member in self.members],
            "due": [] if isinstance(pl_module, ScoreModule) else unsent_metrics(trainer),
            "validation_names": sorted(self.validation_names),
            "has_validated": self._has_validated,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "num_trained": self.num_train_samples,
            "inner_steps": self.loader.inner_steps,
            "cut_every": self.loader.cut_every,
            "position": self.loader.position,
            ENDED_EARLY: self._ended_early,
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint[CALLBACK_STATE_KEY]
        self._resume_states = RankStates.from_checkpoint(checkpoint, self.loader.source.seed)
        self.members = FitProgress.from_states(state.get("members", [state]))
        if num_finished_epochs(checkpoint) > max(member.epochs for member in self.members):
            raise ConfigError(
                f"a callback saved this checkpoint at the end of epoch {checkpoint['epoch']}, "
                f"before its metrics were complete: resume from {LAST} of the training, or save "
                "with Lightning's ModelCheckpoint."
            )
        if isinstance(pl_module, ScoreModule):
            self._unsent_metrics = [
                point for m in self.members for point in zip(m.history, m.steps, strict=True)
            ]
        else:
            self._unsent_metrics = list(state["due"])
        self.validation_names = set(state.get("validation_names", ()))
        self._has_validated = bool(state.get("has_validated", False))
        self.seconds, self.train_seconds = state["seconds"], state["train_seconds"]
        self.num_train_samples = state["num_trained"]


class ProgressCallback(EarlyStopping):
    """Record validations and epochs before a ModelCheckpoint of the user's saves them.

    A training that resumes from such a file would otherwise lack the epoch. It is of the kind of
    callbacks that see the end of an epoch after the module has logged its metrics.
    """

    def __init__(self, checkpoint_callback: CheckpointCallback) -> None:
        super().__init__(checkpoint_callback.monitor)
        self.checkpoint_callback = checkpoint_callback

    @property
    def state_key(self) -> str:
        return type(self).__qualname__

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Do nothing: the choices of early stopping have no meaning here."""

    def state_dict(self) -> dict[str, Any]:
        return {}  # CheckpointCallback holds the progress

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.checkpoint_callback.record_validation(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.checkpoint_callback.record_epoch(trainer, pl_module)


def has_reached_max_steps(trainer: pl.Trainer) -> bool:
    """Whether the fit has as many optimizer steps as `max_steps` allows."""
    return trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps


def _end_reason(trainer: pl.Trainer) -> str | None:
    """Return why a training ends here; None if only the epoch ends, by a hook of the user's."""
    if has_reached_max_steps(trainer):
        return MAX_STEPS
    if not (trainer.should_stop and can_stop(trainer)):
        return None
    timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]  # a list, in spite of its annotation
    remaining = [timer.time_remaining() for timer in timers]
    return MAX_TIME if any(r is not None and r <= 0 for r in remaining) else STOPPED_BY_CALLBACK


def validates_within_epochs(trainer: pl.Trainer) -> bool:
    """Whether validations take place at other times than at the end of epochs."""
    interval = getattr(trainer, "val_check_interval", None)  # Lightning does not set it for a time
    return not is_whole_epoch(interval) or trainer.check_val_every_n_epoch is None


def is_whole_epoch(interval: Any) -> bool:
    """Whether a `val_check_interval` is a whole epoch: the fraction 1.0; 1 is a single batch."""
    return isinstance(interval, float) and interval == 1.0


def _exchanges_weights(trainer: Any) -> bool:
    """Whether the weights may be exchanged for a validation, by a callback or the optimizer."""
    hooks = (
        ("on_validation_start", "on_validation_epoch_start"),
        ("on_validation_epoch_end", "on_validation_end"),
    )
    return any(callable(getattr(o, "eval", None)) for o in trainer.optimizers) or any(
        all(any(is_overridden(name, callback, pl.Callback) for name in names) for names in hooks)
        for callback in trainer.callbacks
        if not isinstance(callback, ProgressBar | CheckpointCallback | ProgressCallback)
    )


def _warn_nonfinite(values: dict[str, float], epoch: int) -> None:
    """Warn about metrics of a user's module that are NaN or infinite."""
    for word, is_such in (("NaN", math.isnan), ("infinite", math.isinf)):
        names = [name for name, value in values.items() if is_such(value)]
        if names:
            log.warning("epoch %d: %s is %s.", epoch, ", ".join(names), word)


def get_network(module: pl.LightningModule) -> torch.nn.Module:
    """Return what holds the weights: a ScoreModule's network, or the user's module itself."""
    return module.network if isinstance(module, ScoreModule) else module


def _clone_tensors(state: Any) -> Any:
    """Copy a nested state, with its tensors."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {k: _clone_tensors(v) for k, v in state.items()}
    return [_clone_tensors(v) for v in state] if isinstance(state, list) else state
