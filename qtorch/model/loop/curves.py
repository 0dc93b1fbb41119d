"""Curves of several trainings in one run: each training's metrics have names of their own."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from qtorch.core.files import atomic_write
from qtorch.tracking.recorder import TrainingRecorder

log = logging.getLogger(__name__)

TRAININGS_FILE = "trainings.json"  # in the checkpoint folder: {run ID: ["kind identity", ...]}

# The trainings of a run without checkpoints, in this process.
_trainings: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()


class NamedCurves:
    """A recorder whose metrics have the name of a training as prefix: "finetune/valid/loss"."""

    def __init__(self, recorder: TrainingRecorder, name: str) -> None:
        self.recorder, self.name = recorder, name
        # What RecorderLogger reads, as far as the recorder has it.
        self.client = getattr(recorder, "client", None)
        self.experiment_id = getattr(recorder, "experiment_id", None)

    @property
    def id(self) -> str | None:
        """The run ID."""
        return self.recorder.id

    @property
    def uri(self) -> str | None:
        """The URI of the tracking store."""
        return self.recorder.uri

    def log_batch(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log metrics of one step under the training's names."""
        self.recorder.log_batch({f"{self.name}/{k}": v for k, v in metrics.items()}, step)

    def log_params(self, **kwargs: Any) -> None:
        """Log params of the run."""
        self.recorder.log_params(**kwargs)

    def set_tags(self, **kwargs: Any) -> None:
        """Set tags of the run."""
        self.recorder.set_tags(**kwargs)

    def checkpoint_dir(self) -> Path:
        """Return the run's checkpoint folder."""
        return self.recorder.checkpoint_dir()


def name_curves(
    recorder: TrainingRecorder | None, folder: Path | None, kind: str, identity: str
) -> TrainingRecorder | None:
    """Return the recorder for a training's metrics.

    The first training of a run logs "valid/loss", a later one "finetune/valid/loss",
    "fit_2/valid/loss" and so on, by its `kind` and number. A training that is resumed has the same
    identity and therefore keeps its names; `folder`, of the checkpoints, remembers them.
    """
    if recorder is None:
        return None
    trainings = _read_trainings(recorder, folder)
    training = f"{kind} {identity}"
    if training not in trainings:
        trainings.append(training)
        _write_trainings(recorder, folder, trainings)
    position = trainings.index(training)
    if position == 0:
        return recorder
    number = 1 + sum(t.startswith(f"{kind} ") for t in trainings[:position])
    name = kind if number == 1 else f"{kind}_{number}"
    log.info(
        "run %s has another training (or a schedule over another length): the metrics of this one "
        "are %s/...",
        recorder.id,
        name,
    )
    return NamedCurves(recorder, name)


def _read_trainings(recorder: TrainingRecorder, folder: Path | None) -> list[str]:
    if folder is None:
        return list(_trainings.get(recorder, []))
    return list(_read_file(folder).get(str(recorder.id), []))


def _write_trainings(recorder: TrainingRecorder, folder: Path | None, trainings: list[str]) -> None:
    if folder is None:
        _trainings[recorder] = trainings
        return
    content = {**_read_file(folder), str(recorder.id): trainings}
    with atomic_write(folder / TRAININGS_FILE) as path:
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _read_file(folder: Path) -> dict[str, list[str]]:
    path = folder / TRAININGS_FILE
    if not path.exists():
        return {}
    try:
        content: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        log.warning("%s cannot be read, curves of earlier trainings may be mixed: %s", path, error)
        return {}
    return content
