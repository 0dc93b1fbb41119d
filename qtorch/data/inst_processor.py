"""Qlib's `inst_processors`: what is done to each instrument's rows when they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError
from qtorch.core.instantiate import init_instance_by_config, plain
from qtorch.data.columns import Columns
from qtorch.data.panel import normalise_calendar
from qtorch.data.processor.rows import TimeRangeFlt
from qtorch.data.view import View

MODULE = "qtorch.data.processor"


class InstrumentProcessor:
    """Runs `processor(frame, instrument=name) -> frame` on each instrument and group.

    The frame is indexed by date and holds the group's columns, a copy. What comes back may lack
    dates (they are no rows any more) and hold other values, but no new dates and no other
    columns.
    """

    def __init__(self, processor: Callable[..., pd.DataFrame]) -> None:
        self.processor = processor

    def __call__(self, view: View) -> View:
        rows = torch.zeros_like(view.rows)
        groups: dict[str, Columns] = {}
        for group, columns in view.groups.items():
            values, kept = self._group(columns, view.rows)
            rows |= kept
            written = dict(zip(columns.names, values, strict=True))
            groups[group] = columns.with_columns(written)
        return replace(view, groups=groups, rows=rows, history=rows)

    def _group(self, columns: Columns, rows: Tensor) -> tuple[Tensor, Tensor]:
        before = columns.block(columns.names)
        values = torch.full_like(before, float("nan"))
        kept = torch.zeros_like(rows)
        for k, name in enumerate(columns.instruments):
            at = torch.nonzero(rows[:, k])[:, 0]
            if not len(at):
                continue
            dates = columns.calendar[at.numpy()]
            frame = pd.DataFrame(before[:, at, k].t().numpy().copy(), dates, list(columns.names))
            result = self.processor(frame, instrument=name)
            place = self._places(result, columns, rows[:, k], name)
            kept[place, k] = True
            taken = result.to_numpy(dtype=np.float32, na_value=np.nan)
            values[:, place, k] = torch.from_numpy(taken.copy()).t()
        return values, kept

    def _places(self, result: Any, columns: Columns, rows: Tensor, name: str) -> Tensor:
        who = f"{type(self.processor).__name__} on {name!r}"
        if not isinstance(result, pd.DataFrame) or tuple(result.columns) != columns.names:
            raise DataError(f"{who} must give a frame of the same columns.")
        place = torch.from_numpy(columns.calendar.get_indexer(normalise_calendar(result.index)))
        if bool((place < 0).any()) or not bool(rows[place].all()):
            raise DataError(
                f"{who} gave dates that it was not handed; resampling is not supported here. "
                "Resample the data before, or load another frequency."
            )
        return place


def build_inst_processors(given: Any) -> list[Callable[[View], View]]:
    """The processors of each instrument, for views; DataError for forms that are not supported."""
    given = plain(given)
    if not given:
        return []
    if isinstance(given, Mapping):
        lists = [list(each) for each in given.values()]
        if any(each != lists[0] for each in lists):
            raise ConfigError(
                "inst_processors by group are supported only where every group has the same; "
                "give one list."
            )
        given = lists[0]
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ConfigError(f"inst_processors must be a list, got {given!r:.80}.")
    return [_build(item) for item in given if item]


def _build(item: Any) -> Callable[[View], View]:
    made = init_instance_by_config(item, MODULE) if isinstance(item, str | Mapping) else item
    if isinstance(made, TimeRangeFlt):
        return made
    if not callable(made):
        raise ConfigError(f"{type(made).__name__} is no inst_processor: it cannot be called.")
    return InstrumentProcessor(made)
