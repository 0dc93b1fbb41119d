"""The base class of loaders of raw data."""

from __future__ import annotations

from abc import ABC
from typing import Any

import pandas as pd

from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError
from qtorch.core.trust import trust_subclasses
from qtorch.data.frames import view_fingerprint, view_from_frame, view_to_frame
from qtorch.data.processor.base import Names
from qtorch.data.source.base import Source
from qtorch.data.view import View


@trust_subclasses
class DataLoader(Configured, ABC):
    """The source of a handler's raw data.

    `view` returns columns by group over a calendar and instruments; `load` returns the same as a
    frame, as in Qlib. A user's loader overrides either of them: with only `load` (Qlib's protocol,
    a `(datetime, instrument)` frame) the view is built from the frame. Loaded values may be
    infinite, e.g. after a division in an expression; handling them is left to the processors.
    Answers to qlib/data/dataset/loader.py.
    """

    def view(
        self,
        instruments: Any = None,
        start_time: Any = None,
        end_time: Any = None,
        *,
        source: Source | None = None,
        columns: Names | None = None,
    ) -> View:
        """Load the raw data between two dates, both inclusive; None is open.

        `source` is used by a loader that has no source of its own. `columns` names the requested
        columns by group; others may be left out.
        """
        if type(self).load is DataLoader.load:
            raise ConfigError(f"{type(self).__name__} must override view(...) or load(...).")
        return view_from_frame(self.load(instruments, start_time, end_time))

    def load(
        self, instruments: Any = None, start_time: Any = None, end_time: Any = None
    ) -> pd.DataFrame:
        """Load the raw data as a `(datetime, instrument)` frame, float32."""
        return view_to_frame(self.view(instruments, start_time, end_time))

    def names(self) -> Names | None:
        """Return the columns by group if they are known before loading, else None."""
        return None

    def horizon(self, group: str = "label") -> int | None:
        """Return how many calendar rows a group's values look ahead; None if unknown."""
        return None

    def needs_source(self) -> bool:
        """Whether the loader reads a source of bars and has none of its own."""
        return False

    def fingerprint(self, source: Source | None = None) -> str:
        """Return a hash of the content that is loaded."""
        return view_fingerprint(self.view(source=source))


class LoaderAdapter(DataLoader):
    """Wrap any object with Qlib's `load(instruments, start_time, end_time) -> frame`."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def load(
        self, instruments: Any = None, start_time: Any = None, end_time: Any = None
    ) -> pd.DataFrame:
        frame: pd.DataFrame = self.loader.load(instruments, start_time, end_time)
        return frame
