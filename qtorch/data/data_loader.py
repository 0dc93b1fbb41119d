"""What a loader of raw data is."""

from __future__ import annotations

from abc import ABC
from typing import Any

import pandas as pd

from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError
from qtorch.core.trust import trusted_type
from qtorch.data.frames import fingerprint_of, flat_or_grouped, view_of_frame
from qtorch.data.processor.base import Names
from qtorch.data.source.base import Source
from qtorch.data.view import View


@trusted_type
class DataLoader(Configured, ABC):
    """Where a handler's raw data comes from.

    `view` gives columns by group over a calendar and instruments; `load` the same as a frame, as
    in Qlib. A loader of one's own overrides either: with `load` alone (Qlib's protocol, a
    `(datetime, instrument)` frame) the view is made of the frame. What it computes may be
    infinite, as what expressions divide may: that is left to the processors.
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
        """The raw data between two dates, both inclusive; None is open.

        `source` serves a loader that has none of its own. `columns` says which columns of which
        groups are wanted; others may be left out.
        """
        if type(self).load is DataLoader.load:
            raise ConfigError(f"{type(self).__name__} overrides neither view(...) nor load(...).")
        return view_of_frame(self.load(instruments, start_time, end_time))

    def load(
        self, instruments: Any = None, start_time: Any = None, end_time: Any = None
    ) -> pd.DataFrame:
        """The raw data as a `(datetime, instrument)` frame, float32."""
        return flat_or_grouped(self.view(instruments, start_time, end_time))

    def names(self) -> Names | None:
        """The columns by group, where they are known before anything is loaded."""
        return None

    def horizon(self, group: str = "label") -> int | None:
        """Calendar rows that a group's values look ahead; None where it is not known."""
        return None

    def needs_source(self) -> bool:
        """Whether it reads a source of bars and was not given one."""
        return False

    def fingerprint(self, source: Source | None = None) -> str:
        """A hash of the content of what it loads."""
        return fingerprint_of(self.view(source=source))


class ForeignLoader(DataLoader):
    """Any object with Qlib's `load(instruments, start_time, end_time) -> frame`."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def load(
        self, instruments: Any = None, start_time: Any = None, end_time: Any = None
    ) -> pd.DataFrame:
        frame: pd.DataFrame = self.loader.load(instruments, start_time, end_time)
        return frame
