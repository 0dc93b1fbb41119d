"""Several results made into one: windows stitched, models averaged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import pandas as pd

from qtorch.core.errors import DataError

DATETIME = "datetime"


class Ensemble(ABC):
    """Makes one object of a mapping of objects. Answers to qlib/model/ens/ensemble.py."""

    @abstractmethod
    def __call__(self, ensemble_dict: Any) -> Any:
        """The one object."""


class SingleKeyEnsemble(Ensemble):
    """A mapping with one key becomes its value, at every depth; any other stays as it is."""

    def __call__(self, ensemble_dict: Any, recursion: bool = True) -> Any:
        """What is in the mapping; `recursion=False` looks at the outermost level alone."""
        if not isinstance(ensemble_dict, Mapping):
            return ensemble_dict
        made = dict(ensemble_dict)
        if recursion:
            made = {key: self(value) for key, value in made.items()}
        return next(iter(made.values())) if len(made) == 1 else made


class RollingEnsemble(Ensemble):
    """Frames or Series of windows as one, in order; of a doubled row the later window's counts.

    A window is later that begins later. The values have an index with a level "datetime"
    (a plain DatetimeIndex of that name too: daily IC).
    """

    def __call__(self, ensemble_dict: Mapping[Any, Any]) -> Any:
        """All rows of all windows, each once, sorted."""
        parts = _frames(ensemble_dict, "RollingEnsemble")
        parts.sort(key=lambda part: part.index.get_level_values(DATETIME).min())
        whole: Any = pd.concat([p for p in parts if len(p)] or parts[:1])
        return whole[~whole.index.duplicated(keep="last")].sort_index()


class AverageEnsemble(Ensemble):
    """The mean of several scores, each first standardised by day: a Series.

    A day's mean and standard deviation (ddof 1) are over its instruments; scores missing in some
    of the frames are averaged over the others. Nested mappings are flattened.
    """

    def __call__(self, ensemble_dict: Mapping[Any, Any]) -> pd.Series:
        """The averaged scores, sorted."""
        scores = pd.concat(_frames(_flat(ensemble_dict), "AverageEnsemble"), axis=1).sort_index()
        days = scores.groupby(level=DATETIME)
        # By position: columns of several frames have one name.
        centred = scores.to_numpy(dtype=float) - days.transform("mean").to_numpy(dtype=float)
        scaled = centred / days.transform("std").to_numpy(dtype=float)
        return pd.DataFrame(scaled, index=scores.index).mean(axis=1)


def _frames(given: Mapping[Any, Any], who: str) -> list[Any]:
    """The values, each a frame or Series with dates."""
    if not given:
        raise DataError(f"{who} was given nothing to merge: did the collector find no run?")
    for key, value in given.items():
        if not isinstance(value, pd.DataFrame | pd.Series):
            raise DataError(
                f"{who} merges DataFrames and Series; {key!r} holds a {type(value).__name__}."
            )
        if DATETIME not in value.index.names:
            raise DataError(
                f"{who}: the index of {key!r} has the levels {list(value.index.names)}, but none "
                f"called {DATETIME!r}."
            )
    return list(given.values())


def _flat(nested: Mapping[Any, Any], trail: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    flat: dict[tuple[Any, ...], Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, (*trail, key)))
        else:
            flat[(*trail, key)] = value
    return flat
