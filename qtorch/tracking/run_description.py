"""What a run is of: params and name of a run made in Python, and MLflow's dataset column."""

from __future__ import annotations

import json
import logging
from typing import Any

from qtorch.core.configured import describe_value
from qtorch.core.errors import QtorchError
from qtorch.core.instantiate import flatten_dict
from qtorch.tracking.experiment import Experiment
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

NAME_LENGTH, DIGEST_LENGTH = 120, 36  # MLflow allows 500 and 36


def is_unnamed(recorder: Any) -> bool:
    """Whether a run has the name that a run made in Python gets without one."""
    return isinstance(recorder, Recorder) and recorder.name == Experiment.default_recorder_name


def describe_run(recorder: Any, model: Any, dataset: Any) -> None:
    """Log the arguments of model and dataset as params, name the run, and log its dataset.

    A run of a task has its params already, and stays as it is. So does a stand-in for a recorder.
    """
    if not isinstance(recorder, Recorder):
        return
    if any(name.partition(".")[0] == "model" for name in recorder.list_params()):
        return
    parts = {"model": describe_value(model), "dataset": describe_value(dataset)}
    recorder.log_params(**flatten_dict(parts))
    if is_unnamed(recorder):
        network = parts["model"].get("network") if isinstance(parts["model"], dict) else None
        name = network.get("_target_") if isinstance(network, dict) else network
        recorder.rename(str(name or type(model).__name__).rpartition(".")[2][:NAME_LENGTH])
    log_dataset(recorder, dataset)


def log_dataset(recorder: Recorder, dataset: Any, fingerprint: str | None = None) -> None:
    """Log the run's data for MLflow's dataset column: source, hash and the dates of the segments.

    An error here is only logged. `fingerprint`: None computes that of the dataset, if it has one.
    """
    try:
        if fingerprint is None:
            fingerprint = str(dataset.fingerprint())
        handler = getattr(dataset, "handler", None)
        source = type(getattr(handler, "source", None) or dataset).__name__
        universe = getattr(handler, "instruments", None)
        name = f"{source} {universe}" if isinstance(universe, str) else source
        segments = {
            str(segment): [str(date)[:10] for date in dates]
            for segment, dates in getattr(dataset, "segments", {}).items()
        }
        recorder.log_input(
            name[:NAME_LENGTH],
            fingerprint[:DIGEST_LENGTH],
            source=source,
            profile=json.dumps({"segments": segments}),
            context=", ".join(f"{k} {'..'.join(v)}" for k, v in segments.items()),
        )
    except (QtorchError, AttributeError, TypeError, ValueError, OSError) as error:
        log.debug("the dataset of run %s is not logged: %s", recorder.id, error)
