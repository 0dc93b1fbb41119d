"""Datasets whose samples are windows of days."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.dataset import DatasetH, parse_span
from qtorch.data.fetch import CS_ALL, select_groups
from qtorch.data.gather import check_fill
from qtorch.data.raw_handler import DK_I
from qtorch.data.sampler import TSDataSampler


class TSDatasetH(DatasetH):
    """Windows of the last `step_len` days of each sample, including its own day.

    Windows reach back before the segment's start. `fillna_type` ("none", "ffill",
    "ffill+bfill") selects what a network's window shows for days on which the instrument has no
    row; Qlib's models set "ffill+bfill". `flt_col`: a group with one boolean column; rows where
    it is false or missing are not samples, but windows include them. `prepare` returns a
    `TSDataSampler`, which starts with "none", as Qlib's does.
    """

    def __init__(
        self,
        handler: Any,
        segments: Mapping[str, Any],
        step_len: int = 30,
        flt_col: str | None = None,
        fetch_kwargs: Mapping[str, Any] | None = None,
        *,
        fillna_type: str = "ffill+bfill",
        horizon: int | None = None,
        allow_overlap: bool = False,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        check_fill(fillna_type)
        self.step_len = _check_step_len(step_len)
        self.flt_col = flt_col
        self.fillna_type = fillna_type
        super().__init__(
            handler,
            segments,
            fetch_kwargs,
            horizon=horizon,
            allow_overlap=allow_overlap,
            extras=extras,
        )

    def prepare(  # type: ignore[override]  # returns samplers, as in Qlib
        self,
        segments: Any,
        col_set: str | Sequence[str] = CS_ALL,
        data_key: str = DK_I,
        *,
        flt_col: str | None = None,
        dtype: Any = None,
    ) -> Any:
        """Return samplers of segments; names, lists and dates as in `DatasetH.prepare`."""

        def sampler(selector: Any, name: str | None) -> TSDataSampler:
            view = self.view(data_key)
            start, end = parse_span(name or "segment", selector)
            span = view.date_rows(start, end)
            ts_sampler = TSDataSampler(
                view,
                span,
                step_len=self.step_len,
                groups=select_groups(view, col_set) or list(view.groups),
                samples=self._sample_mask(data_key, flt_col),
                dtype=dtype,
            )
            if name is not None and ts_sampler.empty:
                raise DataError(self._empty_segment_message(name, view))
            return ts_sampler

        return self._prepare_each(segments, sampler)

    def _sample_mask(self, data_key: str, flt_col: str | None = None) -> Tensor | None:
        group = self.flt_col if flt_col is None else flt_col
        if group is None:
            return None
        columns = self.view(data_key).group(group)
        if len(columns.names) != 1:
            raise ConfigError(
                f"flt_col={group!r} must be a group of one column, it has {len(columns.names)}."
            )
        value = columns.column(columns.names[0])
        return (value != 0) & ~torch.isnan(value)

    def _step_len(self) -> int:
        return self.step_len

    def _fill_method(self) -> str:
        return self.fillna_type

    def config(
        self,
        dump_all: bool | None = None,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
        recursive: bool = False,
        *,
        handler_kwargs: Mapping[str, Any] | None = None,
        segments: Mapping[str, Any] | None = None,
        step_len: int | None = None,
    ) -> None:
        """Extend DatasetH's `config` by another `step_len`."""
        if step_len is not None:
            self.step_len = _check_step_len(step_len)
            self._arguments = {**self._arguments, "step_len": step_len}
        super().config(
            dump_all, exclude, include, recursive, handler_kwargs=handler_kwargs, segments=segments
        )


def _check_step_len(step_len: int) -> int:
    if step_len < 1:
        raise ConfigError(f"step_len must be at least 1, got {step_len}.")
    return int(step_len)
