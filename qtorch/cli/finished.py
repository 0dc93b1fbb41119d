"""What a finished run holds, for the commands that go on from it."""

from __future__ import annotations

from typing import Any

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.instantiate import init_instance_by_config
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder


def finished_run(run_id: str) -> Recorder:
    """The run of that id; ConfigError unless it is finished."""
    recorder: Recorder = R.get_recorder(recorder_id=run_id)
    if recorder.status != Recorder.STATUS_FI:
        raise ConfigError(
            f"run {recorder.id} is {recorder.status}; only a finished run holds a fitted model."
        )
    return recorder


def model_and_dataset(recorder: Recorder, source: dict[str, Any] | None) -> tuple[Any, Any]:
    """A run's model and dataset; on another source, with its fitted processors as they are."""
    model, dataset = recorder.load_object("params.pkl"), recorder.load_object("dataset")
    if source is not None:
        dataset.setup_data(source=init_instance_by_config(source))
    return model, dataset


def segment_of(given: Any, dataset: Any) -> Any:
    """A segment's name, or two dates as a slice; ConfigError for another name."""
    if isinstance(given, list | tuple):
        if len(given) != 2:
            raise ConfigError(f"segment={given}: expected a name or two dates.")
        return slice(*(str(date) for date in given))
    known = getattr(dataset, "segments", {})
    if given not in known:
        raise ConfigError(unknown_name("segment", str(given), known))
    return given
