"""Fit a network on one device or several: resume or start, and manage the checkpoint folder."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtorch.core.errors import ConfigError
from qtorch.core.identity import digest
from qtorch.core.runtime import reuse_freed_memory, seed_everything
from qtorch.core.session import resolve_path
from qtorch.data.dataset.samples import Samples
from qtorch.model.devices.numerics import numerical_settings
from qtorch.model.devices.ranks import RanksStopped, check_devices, fit_on_ranks
from qtorch.model.finetune import FineTuning
from qtorch.model.loop.checkpoint import (
    CALLBACK_STATE_KEY,
    ENDED_EARLY,
    LAST,
    PREVIOUS,
    READABLE_FORMATS,
    CheckpointError,
    get_format_version,
    newest_checkpoint,
    preserve_generators,
    read_checkpoint,
    remove_leftovers,
)
from qtorch.model.loop.curves import NamedCurves, name_curves
from qtorch.model.loop.interruption import Interruption, StopTraining, TrainingInterrupted
from qtorch.model.loop.options import FitLength
from qtorch.model.loop.training import Training, quiet_lightning, training_identity
from qtorch.model.network_description import describe_network
from qtorch.model.recipe import FitResult, Recipe
from qtorch.tracking.recorder import TrainingRecorder

log = logging.getLogger(__name__)

# What torch says of a layer whose inputs have another size than it was made for.
SHAPE_ERROR = re.compile(
    "shapes cannot be multiplied|must be equal to input_size|expected input with shape"
    "|to have [0-9]+ channels|running_mean should contain"
)


def fit_network(
    make_network: Callable[[], nn.Module],
    train: Samples,
    valid: Samples | None,
    recipe: Recipe,
    *,
    device: torch.device,
    recorder: TrainingRecorder | None,
    resume: str | Path | None,
    start: str = "fresh",
    tuning: FineTuning | None = None,
    optimizer_state: dict[str, Any] | None = None,
) -> FitResult:
    """Train a network and return it with its best weights.

    The global random generators are restored afterwards. `make_network` is called with the
    generators seeded. `start` describes where the initial weights come from, so that checkpoints of
    trainings with other initial weights are not resumed. `tuning` says which parts of a fitted
    network are trained, `optimizer_state` is the state that its optimizer starts from.
    """
    with (
        preserve_generators(),
        quiet_lightning(),
        reuse_freed_memory(),
        numerical_settings(recipe.trainer, recipe.matmul_precision),
        Interruption() as interruption,
    ):
        check_devices(
            recipe.trainer,
            recipe.batch,
            recipe.module,
            has_checkpoints=recipe.checkpoint.get("enabled", True) is not False,
        )
        if len(train) < recipe.trainer.num_devices:
            size = recipe.trainer.num_devices
            raise ConfigError(f"{len(train)} training samples are too few for {size} devices.")
        seed_everything(recipe.seed)
        network = make_network().train()  # a fitted network is in evaluation mode
        if tuning is not None:
            network = tuning.prepare_network(network)
            start = digest({"start": start, "tuning": tuning.description})
        log.info("%s", describe_network(network))
        identity = training_identity(network, train, valid, recipe, start)
        with ExitStack() as stack:
            folder = stack.enter_context(checkpoint_folder(recipe, recorder))
            kind = "fit" if tuning is None else "finetune"
            recorder = name_curves(recorder, folder, kind, identity)
            if folder is not None and isinstance(recorder, NamedCurves):
                # The first training of a run has the folder, a later one a folder in it.
                folder = stack.enter_context(hold_folder(folder / recorder.name))
            checkpoint = find_resume_checkpoint(resume, folder, identity, recipe.trainer.length)
            if recipe.trainer.num_devices > 1:
                with _convert_interruption(folder, recorder):
                    return fit_on_ranks(
                        network,
                        (train, valid),
                        recipe,
                        folder=folder,
                        identity=identity,
                        checkpoint=None if checkpoint is None else checkpoint[0],
                        recorder=recorder,
                        interruption=interruption,
                        tuning=tuning,
                        optimizer_state=optimizer_state,
                    )
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            device_samples = train.to(device), None if valid is None else valid.to(device)
            training = Training(
                network,
                *device_samples,
                recipe,
                tuning,
                optimizer_state,
                keeps_folder=recorder is not None or recipe.checkpoint.get("dir") is not None,
            )
            training.prepare(folder, identity, interruption, recorder)
            with _convert_interruption(folder, recorder, training, checkpoint), _name_shapes(train):
                training.run(checkpoint)
        result = training.result(checkpoint)
        training.release_memory()
        return result


@contextmanager
def _name_shapes(samples: Samples) -> Iterator[None]:
    """Raise ConfigError, with the sizes of the data, if a layer takes inputs of other sizes."""
    try:
        yield
    except RuntimeError as error:
        if SHAPE_ERROR.search(str(error)) is None:
            raise
        raise ConfigError(
            f"a layer of the network takes inputs of another size: {error}. The data have "
            f"{samples.num_features} features and {samples.num_steps} steps; an argument d_feat or "
            "step_len of the network's class is filled in with them."
        ) from error


def find_resume_checkpoint(
    resume: str | Path | None, folder: Path | None, identity: str, length: FitLength
) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint to resume from, or None to start from scratch.

    `resume` is None (start from scratch), "auto" (the folder's newest checkpoint if it belongs to
    the same training), or the path of a checkpoint or of a folder of checkpoints (ConfigError if it
    belongs to another training). If a shorter training ended inside an epoch, one of this `length`
    goes on from before that end, as if there had been none.
    """
    checkpoint = _find_newest_checkpoint(resume, folder, identity)
    if checkpoint is None or not checkpoint[1][CALLBACK_STATE_KEY].get(ENDED_EARLY):
        return checkpoint
    if not length.exceeds(checkpoint[1]):
        return checkpoint
    path, state = checkpoint
    earlier = _read_earlier_checkpoint(path.parent / PREVIOUS, state)
    if earlier is None and resume == "auto":
        log.info(
            "starting from scratch: there is no checkpoint from before the end of the training "
            "inside epoch %d",
            state["epoch"],
        )
        return None
    if earlier is None:
        log.warning(
            "%s is the end of a shorter training inside epoch %d, and %s, from which a longer one "
            "would go on, is not beside it: the rest of this epoch is left out.",
            path,
            state["epoch"],
            PREVIOUS,
        )
        return checkpoint
    return earlier


def _read_earlier_checkpoint(path: Path, end: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint of the same training from before its end; None if there is none."""
    if not path.is_file():
        return None
    try:
        content = read_checkpoint(path)
    except CheckpointError as error:
        log.warning("%s It is skipped.", error)
        return None
    state, end_state = content[CALLBACK_STATE_KEY], end[CALLBACK_STATE_KEY]
    is_same = state["identity"] == end_state["identity"] and not state.get(ENDED_EARLY)
    return (path, content) if is_same and content["global_step"] <= end["global_step"] else None


def _find_newest_checkpoint(
    resume: str | Path | None, folder: Path | None, identity: str
) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint that `resume` stands for, if it belongs to the training."""
    if resume is None:
        return None
    if resume == "auto":
        checkpoint = None if folder is None else newest_checkpoint(folder)
        if checkpoint is None:
            return None
    else:
        path = resolve_path(resume)
        checkpoint = newest_checkpoint(path) if path.is_dir() else (path, read_checkpoint(path))
        if checkpoint is None:
            raise ConfigError(f"{resume} contains no checkpoint to resume from.")
    path, state = checkpoint[0], checkpoint[1][CALLBACK_STATE_KEY]
    version = get_format_version(checkpoint[1])
    if version not in READABLE_FORMATS:
        readable = ", ".join(map(str, READABLE_FORMATS))
        raise ConfigError(
            f"{path} has checkpoint format {version}, but this version reads {readable}: "
            "finish the training with the version that started it, or start from scratch."
        )
    if state["identity"] == identity:
        return checkpoint
    if resume != "auto":
        raise ConfigError(
            f"{path} belongs to another training: model, data, batches or seed differ. "
            "Start from scratch (resume=None), or use finetune to train on other data."
        )
    log.warning(
        "%s belongs to another training (model, data, seed, or the length of its schedule differ): "
        "starting from scratch.",
        path,
    )
    return None


@contextmanager
def _convert_interruption(
    folder: Path | None,
    recorder: TrainingRecorder | None,
    training: Training | None = None,
    checkpoint: tuple[Path, dict[str, Any]] | None = None,
) -> Iterator[None]:
    """Context manager that raises TrainingInterrupted for every orderly stop of a training."""
    try:
        yield
    except RanksStopped as stop:
        interruption = _build_interruption(stop.position, stop.num_batches, folder, recorder)
        interruption.result = stop.result
        raise interruption from None
    except (StopTraining, KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        if training is None:
            raise _build_interruption(None, 0, folder, recorder) from None
        position, num_batches = training.checkpoint_callback.stop_position, training.num_batches
        interruption = _build_interruption(position, num_batches, folder, recorder)
        if training.has_best_weights:
            interruption.result = training.result(checkpoint)
        raise interruption from None


@contextmanager
def checkpoint_folder(recipe: Recipe, recorder: TrainingRecorder | None) -> Iterator[Path | None]:
    """Context manager for the folder of the checkpoints.

    It is the configured folder, or the run's, or a temporary one, which is removed unless training
    fails.
    """
    if recipe.checkpoint.get("enabled", True) is False:
        yield None
        return
    configured_folder = recipe.checkpoint.get("dir")
    if configured_folder is not None:
        folder = resolve_path(configured_folder)
    elif recorder is not None:
        folder = Path(recorder.checkpoint_dir())
    else:
        folder = Path(tempfile.mkdtemp(prefix="qtorch-fit-"))
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
        return
    with hold_folder(folder):
        yield folder


@contextmanager
def hold_folder(folder: Path) -> Iterator[Path]:
    """Create the folder of a training, and remove what killed processes have left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, is_finished=False)
    is_finished = False
    try:
        yield folder
        is_finished = True
    finally:
        remove_leftovers(folder, is_finished=is_finished)


def _build_interruption(
    position: tuple[int, int] | None,
    num_batches: int,
    folder: Path | None,
    recorder: TrainingRecorder | None,
) -> TrainingInterrupted:
    path = None if folder is None or not (folder / LAST).exists() else folder / LAST
    location = ""
    if position is not None:
        location = f" in epoch {position[0]} after batch {position[1]} of {num_batches}"
    if path is None:
        return TrainingInterrupted(f"training interrupted{location}; no checkpoint was saved.")
    instruction = f"fit(..., resume={str(path)!r})"
    if recorder is not None:
        instruction = f"the same fit in run {recorder.id} (R.start(recorder_id=..., resume=True))"
    return TrainingInterrupted(
        f"training interrupted{location}; saved checkpoint to {path}. Resume with {instruction}.",
        str(path),
    )
