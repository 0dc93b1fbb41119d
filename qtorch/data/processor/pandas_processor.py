"""Processors on DataFrames with Qlib's protocol, and the adapter that runs them on views."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.configured import Configured, plain_value
from qtorch.core.errors import ConfigError, DataError
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.serial import Serializable, State
from qtorch.core.trust import trust_subclasses
from qtorch.data.panel.columns import PanelColumns
from qtorch.data.panel.frames import view_to_frame
from qtorch.data.panel.panel import NAMES, Panel, normalise_calendar
from qtorch.data.panel.view import FLAT, View
from qtorch.data.processor.base import Processor


@trust_subclasses
class FrameProcessor(Configured, Serializable, ABC):
    """Base class of a processor of your own on DataFrames: Qlib's Processor, for its programs.

    `fit(df)` and `processor(df) -> df` take frames of Qlib's form (see `PandasProcessor`, which
    runs them). Our processors on tensors are instances of it too, as those of Qlib are.
    """

    def fit(self, df: pd.DataFrame | None = None) -> None:
        """Compute statistics from the rows of the fit window."""

    @abstractmethod
    def __call__(self, df: pd.DataFrame) -> pd.DataFrame:
        """Return the processed frame; it may be changed in place."""

    def is_for_infer(self) -> bool:
        """Whether the processor may be used for inference, when no label is known."""
        return True

    def readonly(self) -> bool:
        """Whether `processor(df)` leaves its frame unchanged."""
        return False

    def config(self, **kwargs: Any) -> None:  # type: ignore[override]  # by name only, as in Qlib
        """Set the fit window (`fit_start_time`, `fit_end_time`), and how the object is pickled."""
        for name in ("fit_start_time", "fit_end_time"):
            if name in kwargs:
                value = kwargs.pop(name)
                if hasattr(self, name):
                    setattr(self, name, value)
        super().config(**kwargs)


FrameProcessor.register(Processor)  # type: ignore[type-abstract]  # any class can be registered


class PandasProcessor(Processor):
    """Runs `processor.fit(frame)` and `processor(frame) -> frame` on the rows of a view.

    `processor` is an object with Qlib's protocol, or its configuration (which can be stored).
    The frame is a copy in Qlib's format, float32 with index `(datetime, instrument)` and columns
    `(group, column)`; the processor may modify it. A processor that replaces infinite values, as
    Qlib's ProcessInf does, declares this with an attribute `replaces_infinite = True`. The
    returned frame may have fewer rows and other columns, but no new rows.

    Every call builds a DataFrame of the whole view, which is slow: use it for few columns, or if
    there is no processor on tensors.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        is_object = not isinstance(processor, str | Mapping)
        self.inner = processor if is_object else init_instance_by_config(processor)
        if not callable(self.inner):
            raise ConfigError(
                f"a {type(self.inner).__name__} is not a processor: it is not callable."
            )
        self.fit_start_time = getattr(self.inner, "fit_start_time", None)
        self.fit_end_time = getattr(self.inner, "fit_end_time", None)
        is_process_inf = type(self.inner).__name__ == "ProcessInf"  # the class of Qlib
        self.replaces_infinite = bool(getattr(self.inner, "replaces_infinite", is_process_inf))

    def has_fit_window(self) -> bool:
        fit = getattr(type(self.inner), "fit", None)
        return fit is not None and fit is not FrameProcessor.fit

    def is_for_infer(self) -> bool:
        method = getattr(self.inner, "is_for_infer", None)
        return bool(method()) if callable(method) else True

    def fit(self, view: View) -> None:
        if self.has_fit_window():
            self.inner.fit(view_to_frame(view))

    def __call__(self, view: View) -> View:
        result = self.inner(view_to_frame(view))
        if not isinstance(result, pd.DataFrame):
            raise DataError(
                f"{type(self.inner).__name__} returned a {type(result).__name__}; expected a "
                "DataFrame."
            )
        return self._merge_frame(view, result)

    def _merge_frame(self, view: View, frame: pd.DataFrame) -> View:
        date, instrument = _locate_rows(view, frame, type(self.inner).__name__)
        rows = torch.zeros_like(view.rows)
        rows[date, instrument] = True
        is_for_learning = not self.is_for_infer()
        groups = {}
        for group, part in _split_groups(frame).items():
            values = torch.full((part.shape[1], *view.rows.shape), float("nan"))
            old_columns = view.groups.get(group)
            for k, name in enumerate(part.columns):
                if is_for_learning and old_columns is not None and name in old_columns.names:
                    # Rows that are dropped for learning keep their values, which windows may use.
                    values[k] = old_columns.column(name)
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
        history = view.history if is_for_learning else view.history & rows
        return replace(view, groups=groups, rows=rows, history=history)

    # -- fitted state --------------------------------------------------------------------------

    def get_fitted_state(self) -> State | None:
        if not self.has_fit_window():
            return None
        state = State({"attributes": {}})
        for name, value in vars(self.inner).items():
            attribute_path = f"{type(self.inner).__name__}.{name}"
            if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
                state.tensors[name] = torch.as_tensor(value.copy())
            elif isinstance(value, pd.Index):
                state.config["attributes"][name] = {
                    "index": plain_value(value.tolist(), attribute_path)
                }
            else:
                state.config["attributes"][name] = {"value": plain_value(value, attribute_path)}
        return state

    def load_fitted_state(self, state: State) -> None:
        for name, tensor in state.tensors.items():
            setattr(self.inner, name, tensor.numpy())
        for name, stored_value in state.config["attributes"].items():
            value = (
                _restore_index(stored_value["index"])
                if "index" in stored_value
                else stored_value["value"]
            )
            setattr(self.inner, name, value)


def _restore_index(items: Sequence[Any]) -> pd.Index[Any]:
    if items and isinstance(items[0], list):
        return pd.MultiIndex.from_tuples([tuple(i) for i in items])
    index: pd.Index[Any] = pd.Index(items)
    return index


def _split_groups(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    if not isinstance(frame.columns, pd.MultiIndex):
        return {FLAT: frame}
    groups = frame.columns.get_level_values(0)
    return {str(g): frame.loc[:, groups == g].droplevel(0, axis=1) for g in groups.unique()}


def _locate_rows(view: View, frame: pd.DataFrame, processor_name: str) -> tuple[Tensor, Tensor]:
    """Return the date row and the instrument column of each row of the frame.

    Raises DataError for a row that is not a row of the view.
    """
    if set(frame.index.names) != set(NAMES):
        raise DataError(
            f"{processor_name} returned a frame with index {list(frame.index.names)}, not {NAMES}."
        )
    dates = normalise_calendar(frame.index.get_level_values(NAMES[0]))
    names = pd.Index(frame.index.get_level_values(NAMES[1]), dtype="str")
    date = torch.as_tensor(view.calendar.get_indexer(dates))
    instrument = torch.as_tensor(view.instruments.get_indexer(names))
    is_view_row = (date >= 0) & (instrument >= 0)
    if bool(is_view_row.all()):
        is_view_row = view.rows[date, instrument]
    if not bool(is_view_row.all()):
        k = int(torch.nonzero(~is_view_row)[0])
        raise DataError(
            f"{processor_name} returned the row ({dates[k]:%Y-%m-%d}, {names[k]}), which is not in "
            f"its input ({int((~is_view_row).sum())} such rows); a processor must not add rows."
        )
    return date, instrument
