"""Datasets whose samples are windows of days."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.dataset import DatasetH, span_of
from qtorch.data.fetch import CS_ALL, chosen_groups
from qtorch.data.gather import check_fill
from qtorch.data.raw_handler import DK_I
from qtorch.data.sampler import TSDataSampler


class TSDatasetH(DatasetH):
    """Windows of the last `step_len` days of each sample, its own day included.

    Windows reach back before the segment's start. `fillna_type` ("none", "ffill",
    "ffill+bfill") says what stands in a network's window for days on which the instrument has no
    row; Qlib's models set "ffill+bfill". `flt_col`: a group of one column of truth values; where
    it is false or missing a row is no sample, but windows see it. `prepare` gives a
    `TSDataSampler`, which begins with "none", as Qlib's does.
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
        self.step_len = _positive(step_len)
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

    def prepare(  # type: ignore[override]  # samplers for frames, as in Qlib
        self,
        segments: Any,
        col_set: str | Sequence[str] = CS_ALL,
        data_key: str = DK_I,
        *,
        flt_col: str | None = None,
        dtype: Any = None,
    ) -> Any:
        """Samplers of segments; names, lists and dates as in `DatasetH.prepare`."""

        def sampler(which: Any, name: str | None) -> TSDataSampler:
            view = self.view(data_key)
            start, end = span_of(name or "segment", which)
            span = view.date_rows(start, end)
            found = TSDataSampler(
                view,
                span,
                step_len=self.step_len,
                groups=chosen_groups(view, col_set) or list(view.groups),
                samples=self._sample_mask(data_key, flt_col),
                dtype=dtype,
            )
            if name is not None and found.empty:
                raise DataError(self._empty(name, view))
            return found

        return self._each(segments, sampler)

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

    def _fill(self) -> str:
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
        """As DatasetH's, and another `step_len`."""
        if step_len is not None:
            self.step_len = _positive(step_len)
            self._arguments = {**self._arguments, "step_len": step_len}
        super().config(
            dump_all, exclude, include, recursive, handler_kwargs=handler_kwargs, segments=segments
        )


def _positive(step_len: int) -> int:
    if step_len < 1:
        raise ConfigError(f"step_len must be at least 1, got {step_len}.")
    return int(step_len)
