"""A user's pandas processor (Qlib's protocol, Qlib's own too) as a processor of views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.configured import plain_value
from qtorch.core.errors import ConfigError, DataError
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.serial import State
from qtorch.data.columns import PanelColumns
from qtorch.data.panel import NAMES, Panel, normalise_calendar
from qtorch.data.processor.base import FLAT, Processor
from qtorch.data.view import View


class PandasProcessor(Processor):
    """Runs `processor.fit(frame)` and `processor(frame) -> frame` on the view's rows as a frame.

    `processor` is an object with Qlib's protocol, or its configuration (which can be stored).
    The frame is a copy in Qlib's form: `(datetime, instrument)` by `(group, column)`, float32;
    writing into it harms nobody. With an attribute `mends_infinite = True` it says that it puts
    something in the place of infinite values, as Qlib's ProcessInf does. The frame that comes back
    may have fewer rows, and other columns; rows that were not handed over are refused.

    It costs a full frame for each call: for a few columns, or where nothing else is there.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        live = not isinstance(processor, str | Mapping)
        self.inner = processor if live else init_instance_by_config(processor)
        if not callable(self.inner):
            raise ConfigError(
                f"a {type(self.inner).__name__} is no processor: it cannot be called with a frame."
            )
        self.fit_start_time = getattr(self.inner, "fit_start_time", None)
        self.fit_end_time = getattr(self.inner, "fit_end_time", None)
        named = type(self.inner).__name__ == "ProcessInf"  # Qlib's
        self.mends_infinite = bool(getattr(self.inner, "mends_infinite", named))

    def has_fit_window(self) -> bool:
        return hasattr(self.inner, "fit")

    def is_for_infer(self) -> bool:
        asked = getattr(self.inner, "is_for_infer", None)
        return bool(asked()) if callable(asked) else True

    def fit(self, view: View) -> None:
        if hasattr(self.inner, "fit"):
            self.inner.fit(frame_of(view))

    def __call__(self, view: View) -> View:
        result = self.inner(frame_of(view))
        if not isinstance(result, pd.DataFrame):
            raise DataError(
                f"{type(self.inner).__name__} gave a {type(result).__name__}; expected the "
                "processed DataFrame."
            )
        return self._merged(view, result)

    def _merged(self, view: View, frame: pd.DataFrame) -> View:
        date, instrument = _places(view, frame, type(self.inner).__name__)
        rows = torch.zeros_like(view.rows)
        rows[date, instrument] = True
        learning = not self.is_for_infer()
        groups = {}
        for group, part in _by_group(frame).items():
            values = torch.full((part.shape[1], *view.rows.shape), float("nan"))
            known = view.groups.get(group)
            for k, name in enumerate(part.columns):
                if learning and known is not None and name in known.names:
                    values[k] = known.column(name)  # a row dropped for learning stays in windows
                values[k][date, instrument] = torch.as_tensor(
                    part.iloc[:, k].to_numpy(dtype=np.float32, na_value=np.nan).copy()
                )
            panel = Panel(
                values.permute(1, 2, 0),
                view.calendar,
                view.instruments,
                [str(c) for c in part.columns],
                mask=rows,
            )
            groups[group] = PanelColumns(panel)
        history = view.history if learning else view.history & rows
        return replace(view, groups=groups, rows=rows, history=history)

    # -- what was learnt -----------------------------------------------------------------------

    def fitted_state(self) -> State | None:
        if not self.has_fit_window():
            return None
        state = State({"attributes": {}})
        for name, value in vars(self.inner).items():
            where = f"{type(self.inner).__name__}.{name}"
            if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
                state.tensors[name] = torch.as_tensor(value.copy())
            elif isinstance(value, pd.Index):
                state.config["attributes"][name] = {"index": plain_value(value.tolist(), where)}
            else:
                state.config["attributes"][name] = {"value": plain_value(value, where)}
        return state

    def load_fitted(self, state: State) -> None:
        for name, tensor in state.tensors.items():
            setattr(self.inner, name, tensor.numpy())
        for name, stored in state.config["attributes"].items():
            value = _index_again(stored["index"]) if "index" in stored else stored["value"]
            setattr(self.inner, name, value)


def frame_of(view: View) -> pd.DataFrame:
    """The view's rows in Qlib's form; columns without groups have one level."""
    frame = view.frame()
    return frame.droplevel(0, axis=1) if set(view.groups) == {FLAT} else frame


def _index_again(items: Sequence[Any]) -> pd.Index[Any]:
    if items and isinstance(items[0], list):
        return pd.MultiIndex.from_tuples([tuple(i) for i in items])
    index: pd.Index[Any] = pd.Index(items)
    return index


def _by_group(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    if not isinstance(frame.columns, pd.MultiIndex):
        return {FLAT: frame}
    groups = frame.columns.get_level_values(0)
    return {str(g): frame.loc[:, groups == g].droplevel(0, axis=1) for g in groups.unique()}


def _places(view: View, frame: pd.DataFrame, who: str) -> tuple[Tensor, Tensor]:
    """(date row, instrument column) of each row of the frame; each must be a row of the view."""
    if set(frame.index.names) != set(NAMES):
        raise DataError(f"{who} gave a frame indexed by {list(frame.index.names)}, not {NAMES}.")
    dates = normalise_calendar(frame.index.get_level_values(NAMES[0]))
    names = pd.Index(frame.index.get_level_values(NAMES[1]), dtype="str")
    date = torch.as_tensor(view.calendar.get_indexer(dates))
    instrument = torch.as_tensor(view.instruments.get_indexer(names))
    known = (date >= 0) & (instrument >= 0)
    if bool(known.all()):
        known = view.rows[date, instrument]
    if not bool(known.all()):
        k = int(torch.nonzero(~known)[0])
        raise DataError(
            f"{who} gave the row ({dates[k]:%Y-%m-%d}, {names[k]}), which it was not handed "
            f"({int((~known).sum())} such rows); a processor may drop rows, not add them."
        )
    return date, instrument
