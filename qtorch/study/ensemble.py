"""Combine several results into one: stitch rolling windows, average models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import pandas as pd

from qtorch.core.errors import DataError

DATETIME = "datetime"


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
            _check_frames(_flatten(ensemble_dict), "AverageEnsemble"), axis=1
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


def _flatten(mapping: Mapping[Any, Any], path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    leaves: dict[tuple[Any, ...], Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            leaves.update(_flatten(value, (*path, key)))
        else:
            leaves[(*path, key)] = value
    return leaves
