"""Qlib's `inst_processors`, which process each instrument's rows when they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError
from qtorch.core.instantiate import init_instance_by_config, resolve_config
from qtorch.data.panel.columns import Columns
from qtorch.data.panel.panel import normalise_calendar
from qtorch.data.panel.view import View
from qtorch.data.processor.selection import TimeRangeFlt

MODULE = "qtorch.data.processor"


class InstrumentProcessor:
    """Run `processor(frame, instrument=name) -> frame` on each instrument and group.

    The frame is a copy, indexed by date, with the group's columns. The result may lack dates (they
    are then no rows any more) and have other values, but no new dates and no other columns.
    """

    def __init__(self, processor: Callable[..., pd.DataFrame]) -> None:
        self.processor = processor

    def __call__(self, view: View) -> View:
        rows = torch.zeros_like(view.rows)
        groups: dict[str, Columns] = {}
        for group, columns in view.groups.items():
            values, is_kept = self._process_group(columns, view.rows)
            rows |= is_kept
            new_values = dict(zip(columns.names, values, strict=True))
            groups[group] = columns.with_columns(new_values)
        return replace(view, groups=groups, rows=rows, history=rows)

    def _process_group(self, columns: Columns, rows: Tensor) -> tuple[Tensor, Tensor]:
        before = columns.block(columns.names)
        values = torch.full_like(before, float("nan"))
        is_kept = torch.zeros_like(rows)
        for k, name in enumerate(columns.instruments):
            row_index = torch.nonzero(rows[:, k])[:, 0]
            if not len(row_index):
                continue
            dates = columns.calendar[row_index.numpy()]
            frame = pd.DataFrame(
                before[:, row_index, k].t().numpy().copy(), dates, list(columns.names)
            )
            result = self.processor(frame, instrument=name)
            result_rows = self._result_rows(result, columns, rows[:, k], name)
            is_kept[result_rows, k] = True
            result_values = result.to_numpy(dtype=np.float32, na_value=np.nan)
            values[:, result_rows, k] = torch.from_numpy(result_values.copy()).t()
        return values, is_kept

    def _result_rows(self, result: Any, columns: Columns, rows: Tensor, name: str) -> Tensor:
        source = f"{type(self.processor).__name__} on {name!r}"
        if not isinstance(result, pd.DataFrame) or tuple(result.columns) != columns.names:
            raise DataError(f"{source} must return a frame with the same columns.")
        result_rows = torch.from_numpy(
            columns.calendar.get_indexer(normalise_calendar(result.index))
        )
        if bool((result_rows < 0).any()) or not bool(rows[result_rows].all()):
            raise DataError(
                f"{source} returned dates that were not in its input; resampling is not supported "
                "here. Resample the data beforehand, or load another frequency."
            )
        return result_rows


def build_inst_processors(config: Any) -> list[Callable[[View], View]]:
    """Build view processors from `inst_processors`; raise ConfigError for unsupported forms."""
    config = resolve_config(config)
    if not config:
        return []
    if isinstance(config, Mapping):
        lists = [list(processors) for processors in config.values()]
        if any(processors != lists[0] for processors in lists):
            raise ConfigError(
                "inst_processors by group must be the same for every group; pass one list instead."
            )
        config = lists[0]
    if isinstance(config, str) or not isinstance(config, Sequence):
        raise ConfigError(f"inst_processors must be a list, got {config!r:.80}.")
    return [_build(item) for item in config if item]


def _build(item: Any) -> Callable[[View], View]:
    processor = init_instance_by_config(item, MODULE) if isinstance(item, str | Mapping) else item
    if isinstance(processor, TimeRangeFlt):
        return processor
    if not callable(processor):
        raise ConfigError(
            f"{type(processor).__name__} is not an inst_processor: it is not callable."
        )
    return InstrumentProcessor(processor)
