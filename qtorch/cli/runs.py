"""Load the model and dataset of a finished run."""

from __future__ import annotations

from typing import Any

from qtorch.core.errors import ConfigError, unknown_name_message
from qtorch.core.instantiate import init_instance_by_config
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import Recorder


def load_finished_run(run_id: str | float) -> Recorder:
    """Return the run with this ID; raise ConfigError unless it is finished.

    A mistyped ID without letters is a number for Hydra.
    """
    recorder: Recorder = R.get_recorder(recorder_id=str(run_id))
    if recorder.status != Recorder.STATUS_FI:
        raise ConfigError(
            f"run {recorder.id} is {recorder.status}; only a finished run has a fitted model."
        )
    return recorder


def load_model_and_dataset(
    recorder: Recorder, source: dict[str, Any] | None, *, allow_nonfinite: bool
) -> tuple[Any, Any]:
    """Load a run's model and dataset.

    If `source` is given, the dataset reads that source with the run's fitted processors.
    `allow_nonfinite` sets this attribute of the model, see `LightningModel`.
    """
    model, dataset = recorder.load_object("params.pkl"), recorder.load_object("dataset")
    if allow_nonfinite:
        model.allow_nonfinite = True
    if source is not None:
        dataset.setup_data(source=init_instance_by_config(source))
    return model, dataset


def parse_segment(segment: Any, dataset: Any) -> Any:
    """Return a segment's name, or two dates as a slice; raise ConfigError for an unknown name."""
    if isinstance(segment, list | tuple):
        if len(segment) != 2:
            raise ConfigError(f"segment={segment}: expected a name or two dates.")
        return slice(*(str(date) for date in segment))
    segments = getattr(dataset, "segments", {})
    if segment not in segments:
        raise ConfigError(unknown_name_message("segment", str(segment), segments))
    return segment
