"""A training from its first step, or from where it was, to its best weights; its checkpoints."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtorch.core.identity import digest
from qtorch.core.runtime import seed_everything
from qtorch.data.sample_set import Samples
from qtorch.model.checkpoint import LAST, checkpoint_to_resume, tidy
from qtorch.model.finetuning import FineTuning
from qtorch.model.generators import preserved_generators
from qtorch.model.interruption import Interruption, StopTraining, TrainingInterrupted
from qtorch.model.keeper import Keeper
from qtorch.model.ranks import StoppedRanks, check_devices, fit_by_ranks
from qtorch.model.training import Fitted as Fitted
from qtorch.model.training import Recipe as Recipe
from qtorch.model.training import Training, quiet_lightning
from qtorch.model.training_identity import training_identity


def fit_network(
    make_network: Callable[[], nn.Module],
    train: Samples,
    valid: Samples | None,
    recipe: Recipe,
    *,
    device: torch.device,
    recorder: Any,
    resume: str | Path | None,
    start: str = "fresh",
    tuning: FineTuning | None = None,
    optimizer_state: dict[str, Any] | None = None,
) -> Fitted:
    """Train and give the best weights. Global generators are afterwards as they were before.

    `make_network` is called with the generators seeded. `start` says where the weights come from,
    which tells this training's checkpoints from those of another one. `tuning` says what of a
    fitted network learns on, `optimizer_state` where its optimizer begins.
    """
    with preserved_generators(), quiet_lightning(), Interruption() as interruption:
        check_devices(recipe, train)
        seed_everything(recipe.seed)
        network = make_network().train()  # a fitted one comes in evaluation mode
        if tuning is not None:
            network = tuning.prepared(network)
            start = digest({"start": start, "tuning": tuning.description})
        identity = training_identity(network, train, valid, recipe, start)
        with _folder(recipe, recorder) as folder:
            found = checkpoint_to_resume(resume, folder, identity)
            if recipe.trainer.num_devices > 1:
                with _stoppable(folder, recorder):
                    return fit_by_ranks(
                        network,
                        (train, valid),
                        recipe,
                        folder=folder,
                        identity=identity,
                        found=found,
                        recorder=recorder,
                        interruption=interruption,
                        tuning=tuning,
                        optimizer_state=optimizer_state,
                    )
            moved = train.to(device), None if valid is None else valid.to(device)
            fit = Training(network, *moved, recipe, tuning, optimizer_state)
            keeper = fit.prepare(folder, identity, interruption, recorder)
            with _stoppable(folder, recorder, keeper):
                fit.run(found)
        return fit.result(found)


@contextmanager
def _stoppable(folder: Path | None, recorder: Any, keeper: Keeper | None = None) -> Iterator[None]:
    """TrainingInterrupted for what stops a training in order."""
    try:
        yield
    except StoppedRanks as stop:
        raise _interrupted(stop.at, stop.num_batches, folder, recorder) from None
    except (StopTraining, KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        at = None if keeper is None else keeper.stopped_at
        whole = 0 if keeper is None else keeper.loader.num_batches
        raise _interrupted(at, whole, folder, recorder) from None


@contextmanager
def _folder(recipe: Recipe, recorder: Any) -> Iterator[Path | None]:
    """Where checkpoints go: the given folder, the run's, or a temporary one that stays only when
    the training does not end well."""
    if recipe.checkpoint.get("enabled", True) is False:
        yield None
        return
    given = recipe.checkpoint.get("dir")
    if given is not None or recorder is not None:
        folder = Path(given) if given is not None else Path(recorder.checkpoint_dir())
        folder.mkdir(parents=True, exist_ok=True)
        tidy(folder, ended=False)
        ended = False
        try:
            yield folder
            ended = True
        finally:
            tidy(folder, ended=ended)
        return
    folder = Path(tempfile.mkdtemp(prefix="qtorch-fit-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _interrupted(
    at: tuple[int, int] | None, num_batches: int, folder: Path | None, recorder: Any
) -> TrainingInterrupted:
    path = None if folder is None or not (folder / LAST).exists() else folder / LAST
    where = ""
    if at is not None:
        where = f" in epoch {at[0]} after batch {at[1]} of {num_batches}"
    if path is None:
        return TrainingInterrupted(f"training interrupted{where}; there is no checkpoint.")
    how = f"fit(..., resume={str(path)!r})"
    if recorder is not None:
        how = f"the same fit in run {recorder.id} (R.start(recorder_id=..., resume=True))"
    return TrainingInterrupted(
        f"training interrupted{where}; the checkpoint {path} is kept. Go on with {how}.", str(path)
    )
