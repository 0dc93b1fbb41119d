"""Collect results from many runs and process them: group, merge, average."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qtorch.core.errors import ConfigError, LoadObjectError, unknown_name
from qtorch.tracking.experiment import Experiment
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

Process = Callable[..., Any]
PREDICTION: Mapping[str, str] = {"pred": "pred.pkl"}


class Collector(ABC):
    """Collects a mapping `{key: value}` and passes each value through a list of processes.

    Calling a collector does both steps. `process_list`: one callable or several, which are applied
    in order to the value of each key: `[RollingGroup(), AverageEnsemble()]`. Corresponds to
    qlib/workflow/task/collect.py.
    """

    def __init__(self, process_list: Process | Sequence[Process] = ()) -> None:
        self.process_list = _as_list(process_list)

    @abstractmethod
    def collect(self) -> dict[Any, Any]:
        """The unprocessed values by key."""

    @staticmethod
    def process_collect(
        collected_dict: Mapping[Any, Any],
        process_list: Process | Sequence[Process] = (),
        *args: Any,
        **kwargs: Any,
    ) -> dict[Any, Any]:
        """Pass each value through the processes; further arguments go to each of them."""
        processes = _as_list(process_list)
        results = {}
        for key, value in collected_dict.items():
            for process in processes:
                value = process(value, *args, **kwargs)
            results[key] = value
        return results

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return self.process_collect(self.collect(), self.process_list, *args, **kwargs)


class MergeCollector(Collector):
    """Merges the results of several collectors into one mapping by `(collector's key, its key)`.

    `merge_func(collector_key, key)` builds another key from the two.
    """

    def __init__(
        self,
        collector_dict: Mapping[Any, Collector],
        process_list: Process | Sequence[Process] = (),
        merge_func: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        super().__init__(process_list)
        self.collector_dict = dict(collector_dict)
        self.merge_func = merge_func or _pair

    def collect(self) -> dict[Any, Any]:
        """Call each collector (its own processes included) and merge the results."""
        return {
            self.merge_func(outer, inner): value
            for outer, collector in self.collector_dict.items()
            for inner, value in collector().items()
        }


class RecorderCollector(Collector):
    """Collects artifacts from the runs of an experiment: `{artifact: {run's key: object}}`.

    `experiment`: its name, an Experiment, or a callable that returns recorders. `rec_key_func`
    returns a run's key (None: its ID), `rec_filter_func` whether a run is included, `status` are
    the accepted statuses (None: all). `artifacts_path` maps names to artifact paths in a run,
    `artifacts_key` selects some of these names (None: all; `ART_KEY_RAW` is the recorder itself).
    `list_kwargs` are passed to `list_recorders`.
    """

    ART_KEY_RAW = "__raw"

    def __init__(
        self,
        experiment: str | Experiment | Callable[[], Iterable[Recorder]],
        process_list: Process | Sequence[Process] = (),
        rec_key_func: Callable[[Recorder], Any] | None = None,
        rec_filter_func: Callable[[Recorder], bool] | None = None,
        artifacts_path: Mapping[str, str] = PREDICTION,
        artifacts_key: str | Sequence[str] | None = None,
        list_kwargs: Mapping[str, Any] | None = None,
        status: Iterable[str] | None = (Recorder.STATUS_FI,),
    ) -> None:
        super().__init__(process_list)
        if isinstance(experiment, str):
            experiment = R.get_exp(experiment_name=experiment, create=False)
        if not isinstance(experiment, Experiment) and not callable(experiment):
            raise ConfigError(
                f"experiment is a {type(experiment).__name__}; expected its name, an Experiment, "
                "or a callable that returns recorders."
            )
        self.experiment = experiment
        self.artifacts_path = dict(artifacts_path)
        self.artifacts_key = self._validate_keys(artifacts_key)
        self.rec_key_func = rec_key_func or _recorder_id
        self.rec_filter_func = rec_filter_func
        self.list_kwargs = dict(list_kwargs or {})
        self.status = None if status is None else frozenset(_string_list(status))

    def collect(
        self,
        artifacts_key: str | Sequence[str] | None = None,
        rec_filter_func: Callable[[Recorder], bool] | None = None,
        only_exist: bool = True,
    ) -> dict[Any, Any]:
        """Load the artifacts, the oldest run first.

        A run without an artifact is skipped with a warning; `only_exist=False` raises its
        LoadObjectError instead. If two runs have the same key, the later run is used, with a
        warning.
        """
        keys = self.artifacts_key if artifacts_key is None else self._validate_keys(artifacts_key)
        recorders = self._list_recorders(rec_filter_func or self.rec_filter_func)
        log.info("runs collected: %s", dict(Counter(r.status for r in recorders)) or "none")
        results: dict[Any, Any] = {}
        for recorder in recorders:
            name = self.rec_key_func(recorder)
            for key in keys:
                try:
                    value = self._load_artifact(recorder, key)
                except LoadObjectError as error:
                    if not only_exist:
                        raise
                    log.warning("run %s is skipped: %s", recorder.id, error)
                    continue
                group = results.setdefault(key, {})
                if name in group:
                    log.warning("two runs have the key %r; the later one is used", name)
                group[name] = value
        return results

    def get_exp_name(self) -> str:
        """The experiment's name."""
        if isinstance(self.experiment, Experiment):
            return self.experiment.name
        raise ConfigError("this collector's recorders come from a callable, not an experiment.")

    def _validate_keys(self, keys: str | Sequence[str] | None) -> list[str]:
        if keys is None:
            return list(self.artifacts_path)
        names = _string_list(keys)
        for key in names:
            if key != self.ART_KEY_RAW and key not in self.artifacts_path:
                raise ConfigError(unknown_name("artifact", key, self.artifacts_path))
        return names

    def _list_recorders(self, is_included: Callable[[Recorder], bool] | None) -> list[Recorder]:
        if isinstance(self.experiment, Experiment):
            recorders = self.experiment.list_recorders(**self.list_kwargs)
            runs = list(recorders.values() if isinstance(recorders, Mapping) else recorders)[::-1]
        else:
            custom_recorders = self.experiment()
            runs = list(
                custom_recorders.values()
                if isinstance(custom_recorders, Mapping)
                else custom_recorders
            )
        with_status = (r for r in runs if self.status is None or r.status in self.status)
        return [r for r in with_status if is_included is None or is_included(r)]

    def _load_artifact(self, recorder: Recorder, key: str) -> Any:
        if key == self.ART_KEY_RAW:
            return recorder
        return recorder.load_object(self.artifacts_path[key])


def _recorder_id(recorder: Recorder) -> Any:
    return recorder.id


def _pair(outer: Any, inner: Any) -> tuple[Any, Any]:
    return outer, inner


def _as_list(processes: Process | Sequence[Process]) -> list[Process]:
    process_list = [processes] if callable(processes) else list(processes)
    for process in process_list:
        if not callable(process):
            raise ConfigError(f"a process must be callable; got a {type(process).__name__}.")
    return process_list


def _string_list(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
