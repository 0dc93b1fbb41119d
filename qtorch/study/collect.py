"""Results gathered from many runs, then processed: grouped, merged, averaged."""

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
    """Collects `{key: things}` and runs each through its processes; calling it does both.

    `process_list`: one callable or several, applied in order to the value of each key:
    `[RollingGroup(), AverageEnsemble()]`. Answers to qlib/workflow/task/collect.py.
    """

    def __init__(self, process_list: Process | Sequence[Process] = ()) -> None:
        self.process_list = _as_list(process_list)

    @abstractmethod
    def collect(self) -> dict[Any, Any]:
        """What there is, before any processing."""

    @staticmethod
    def process_collect(
        collected_dict: Mapping[Any, Any],
        process_list: Process | Sequence[Process] = (),
        *args: Any,
        **kwargs: Any,
    ) -> dict[Any, Any]:
        """Each value run through the processes; further arguments are passed to every one."""
        processes = _as_list(process_list)
        made = {}
        for key, value in collected_dict.items():
            for process in processes:
                value = process(value, *args, **kwargs)
            made[key] = value
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return self.process_collect(self.collect(), self.process_list, *args, **kwargs)


class MergeCollector(Collector):
    """What several collectors give, in one mapping by `(collector's key, its key)`.

    `merge_func(collector_key, key)` makes another key of the two.
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
        """Each collector is called, its processes run too."""
        return {
            self.merge_func(outer, inner): value
            for outer, collector in self.collector_dict.items()
            for inner, value in collector().items()
        }


class RecorderCollector(Collector):
    """Artifacts of the runs of an experiment: `{artifact: {run's key: object}}`.

    `experiment`: its name, an Experiment, or a callable that gives recorders. `rec_key_func`
    makes a run's key (None: its id), `rec_filter_func` says which runs count, `status` which
    statuses (None: all). `artifacts_path` names artifacts by their place in a run,
    `artifacts_key` those that are wanted (None: all; `ART_KEY_RAW` is the recorder itself).
    `list_kwargs` go to `list_recorders`.
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
                "or a callable that gives recorders."
            )
        self.experiment = experiment
        self.artifacts_path = dict(artifacts_path)
        self.artifacts_key = self._known(artifacts_key)
        self.rec_key_func = rec_key_func or _id_of
        self.rec_filter_func = rec_filter_func
        self.list_kwargs = dict(list_kwargs or {})
        self.status = None if status is None else frozenset(_texts(status))

    def collect(
        self,
        artifacts_key: str | Sequence[str] | None = None,
        rec_filter_func: Callable[[Recorder], bool] | None = None,
        only_exist: bool = True,
    ) -> dict[Any, Any]:
        """The artifacts, the oldest run first.

        A run that does not hold an artifact is left out with a warning; `only_exist=False` raises
        its LoadObjectError. Of two runs with one key the later counts, with a warning.
        """
        keys = self.artifacts_key if artifacts_key is None else self._known(artifacts_key)
        found = self._recorders(rec_filter_func or self.rec_filter_func)
        log.info("runs collected: %s", dict(Counter(r.status for r in found)) or "none")
        collected: dict[Any, Any] = {}
        for recorder in found:
            name = self.rec_key_func(recorder)
            for key in keys:
                try:
                    value = self._artifact(recorder, key)
                except LoadObjectError as error:
                    if not only_exist:
                        raise
                    log.warning("run %s is left out: %s", recorder.id, error)
                    continue
                group = collected.setdefault(key, {})
                if name in group:
                    log.warning("two runs have the key %r; the later one counts", name)
                group[name] = value
        return collected

    def get_exp_name(self) -> str:
        """The experiment's name."""
        if isinstance(self.experiment, Experiment):
            return self.experiment.name
        raise ConfigError("this collector's recorders come from a callable, not an experiment.")

    def _known(self, keys: str | Sequence[str] | None) -> list[str]:
        if keys is None:
            return list(self.artifacts_path)
        wanted = _texts(keys)
        for key in wanted:
            if key != self.ART_KEY_RAW and key not in self.artifacts_path:
                raise ConfigError(unknown_name("artifact", key, self.artifacts_path))
        return wanted

    def _recorders(self, wanted: Callable[[Recorder], bool] | None) -> list[Recorder]:
        if isinstance(self.experiment, Experiment):
            listed = self.experiment.list_recorders(**self.list_kwargs)
            runs = list(listed.values() if isinstance(listed, Mapping) else listed)[::-1]
        else:
            given = self.experiment()
            runs = list(given.values() if isinstance(given, Mapping) else given)
        of_status = (r for r in runs if self.status is None or r.status in self.status)
        return [r for r in of_status if wanted is None or wanted(r)]

    def _artifact(self, recorder: Recorder, key: str) -> Any:
        if key == self.ART_KEY_RAW:
            return recorder
        return recorder.load_object(self.artifacts_path[key])


def _id_of(recorder: Recorder) -> Any:
    return recorder.id


def _pair(outer: Any, inner: Any) -> tuple[Any, Any]:
    return outer, inner


def _as_list(processes: Process | Sequence[Process]) -> list[Process]:
    listed = [processes] if callable(processes) else list(processes)
    for process in listed:
        if not callable(process):
            raise ConfigError(f"a process is callable; got a {type(process).__name__}.")
    return listed


def _texts(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
