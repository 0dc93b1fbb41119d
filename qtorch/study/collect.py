"""Collect results from many runs and process them: group, merge, average."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import Any

import pandas as pd

from qtorch.core.errors import ConfigError, DataError, LoadObjectError, unknown_name_message
from qtorch.tracking.experiment import Experiment
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

Process = Callable[..., Any]
PREDICTION: Mapping[str, str] = {"pred": "pred.pkl"}
DATETIME = "datetime"


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
    returns a run's key (None: its ID); lists in it, such as the segments of a stored task, become
    tuples. `rec_filter_func` says whether a run is included, `status` are
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
        self.rec_key_func = rec_key_func or attrgetter("id")
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
            name = _hashable_key(self.rec_key_func(recorder))
            for key in keys:
                try:
                    is_raw = key == self.ART_KEY_RAW
                    value = recorder if is_raw else recorder.load_object(self.artifacts_path[key])
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
                raise ConfigError(unknown_name_message("artifact", key, self.artifacts_path))
        return names

    def _list_recorders(self, is_included: Callable[[Recorder], bool] | None) -> list[Recorder]:
        experiment = self.experiment
        recorders: Any = (
            experiment.list_recorders(**self.list_kwargs)
            if isinstance(experiment, Experiment)
            else experiment()
        )
        runs = list(recorders.values() if isinstance(recorders, Mapping) else recorders)
        if isinstance(experiment, Experiment):
            runs.reverse()  # it lists the newest first
        with_status = (r for r in runs if self.status is None or r.status in self.status)
        return [r for r in with_status if is_included is None or is_included(r)]


def _hashable_key(key: Any) -> Any:
    """Return a key in which lists are tuples."""
    return tuple(map(_hashable_key, key)) if isinstance(key, list | tuple) else key


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


# -- combining the values --------------------------------------------------------------------------


class Ensemble(ABC):
    """Combines a mapping of objects into one object. Corresponds to qlib/model/ens/ensemble.py."""

    @abstractmethod
    def __call__(self, ensemble_dict: Any) -> Any:
        """Return the combined object."""


class SingleKeyEnsemble(Ensemble):
    """Replaces each mapping with a single key by its value, at every depth."""

    def __call__(self, ensemble_dict: Any, recursion: bool = True) -> Any:
        """Unwrap single keys; `recursion=False` only looks at the outermost level."""
        if not isinstance(ensemble_dict, Mapping):
            return ensemble_dict
        result = dict(ensemble_dict)
        if recursion:
            result = {key: self(value) for key, value in result.items()}
        return next(iter(result.values())) if len(result) == 1 else result


class RollingEnsemble(Ensemble):
    """Concatenates the frames or Series of rolling windows in order of time.

    If two windows have the same row, that of the window with the later start is used. The values
    need an index with a level "datetime"; a plain DatetimeIndex of that name (as of daily IC)
    works as well.
    """

    def __call__(self, ensemble_dict: Mapping[Any, Any]) -> Any:
        """Return the rows of all windows without duplicates, sorted."""
        parts = _check_frames(ensemble_dict, "RollingEnsemble")
        parts.sort(key=lambda part: part.index.get_level_values(DATETIME).min())
        rows: Any = pd.concat([p for p in parts if len(p)] or parts[:1])
        return rows[~rows.index.duplicated(keep="last")].sort_index()


class AverageEnsemble(Ensemble):
    """Averages several scores, each standardised by day first, into one Series.

    The mean and standard deviation (ddof 1) of a day are over its instruments. A score that is
    missing in some of the frames is averaged over the others. Nested mappings are flattened.
    """

    def __call__(self, ensemble_dict: Mapping[Any, Any]) -> pd.Series:
        """Return the averaged scores, sorted."""
        scores = pd.concat(
            _check_frames(_leaf_values(ensemble_dict), "AverageEnsemble"), axis=1
        ).sort_index()
        days = scores.groupby(level=DATETIME)
        # By position, because the columns of all frames have the same name.
        deviations = scores.to_numpy(dtype=float) - days.transform("mean").to_numpy(dtype=float)
        z_scores = deviations / days.transform("std").to_numpy(dtype=float)
        return pd.DataFrame(z_scores, index=scores.index).mean(axis=1)


def _check_frames(frames: Mapping[Any, Any], caller: str) -> list[Any]:
    """Return the values as a list; DataError unless each is a frame or Series with dates."""
    if not frames:
        raise DataError(f"{caller} has nothing to merge; check that the collector found any runs.")
    for key, value in frames.items():
        if not isinstance(value, pd.DataFrame | pd.Series):
            raise DataError(
                f"{caller} merges frames and Series, but {key!r} is a {type(value).__name__}."
            )
        if DATETIME not in value.index.names:
            raise DataError(
                f"{caller}: the index of {key!r} has the levels {list(value.index.names)}, but no "
                f"level {DATETIME!r}."
            )
    return list(frames.values())


def _leaf_values(
    mapping: Mapping[Any, Any], path: tuple[Any, ...] = ()
) -> dict[tuple[Any, ...], Any]:
    """Return the values at every depth by the tuple of their keys, which may be of any type."""
    values: dict[tuple[Any, ...], Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            values.update(_leaf_values(value, (*path, key)))
        else:
            values[(*path, key)] = value
    return values


class Group:
    """Groups a mapping, then reduces each group. Corresponds to qlib/model/ens/group.py.

    `group_func` turns `{(A, B, C1): x, (A, B, C2): y}` into `{(A, B): {C1: x, C2: y}}`. `ens` (an
    Ensemble or any callable) reduces the mapping of a group to one object.
    """

    def __init__(
        self,
        group_func: Callable[..., Mapping[Any, Any]] | None = None,
        ens: Callable[..., Any] | None = None,
    ) -> None:
        self._group_func = group_func
        self._ens_func = ens

    def group(self, *args: Any, **kwargs: Any) -> Mapping[Any, Any]:
        """Return the mapping of groups."""
        if self._group_func is None:
            raise ConfigError(
                f"{type(self).__name__} has no group_func; pass one to the constructor."
            )
        return self._group_func(*args, **kwargs)

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        """Reduce one group to one object."""
        if self._ens_func is None:
            raise ConfigError(f"{type(self).__name__} has no ens to reduce its groups with.")
        return self._ens_func(*args, **kwargs)

    def __call__(
        self,
        ungrouped_dict: Mapping[Any, Any],
        n_jobs: int = 1,
        verbose: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> dict[Any, Any]:
        """Return `{group: object}`; further arguments are passed to `group`.

        `n_jobs` threads reduce the groups; less than 1 stands for ThreadPoolExecutor's default.
        `verbose` is ignored; it exists for compatibility with Qlib.
        """
        groups = self.group(ungrouped_dict, *args, **kwargs)
        if n_jobs == 1:
            return {key: self.reduce(value) for key, value in groups.items()}
        with ThreadPoolExecutor(None if n_jobs < 1 else n_jobs) as pool:
            return dict(zip(groups, pool.map(self.reduce, groups.values()), strict=True))


class RollingGroup(Group):
    """Groups by all parts of a tuple key except the last, which identifies the window."""

    def __init__(self, ens: Callable[..., Any] | None = None) -> None:
        super().__init__(ens=RollingEnsemble() if ens is None else ens)

    def group(self, rolling_dict: Mapping[Any, Any]) -> dict[Any, dict[Any, Any]]:
        """Turn `{(A, B, window): x}` into `{(A, B): {window: x}}`; TypeError for other keys."""
        groups: dict[Any, dict[Any, Any]] = {}
        for key, value in rolling_dict.items():
            if not isinstance(key, tuple):
                raise TypeError(
                    f"RollingGroup expects tuple keys whose last part is the window, got {key!r}; "
                    "pass the collector a rec_key_func that returns a tuple."
                )
            groups.setdefault(key[:-1], {})[key[-1]] = value
        return groups
