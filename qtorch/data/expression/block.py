"""A block of instruments: its fields, and the stored rows of each instrument."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from qtorch.core.errors import ExpressionError, unknown_name
from qtorch.data.expression.node import Field
from qtorch.data.expression.tokens import expression_error
from qtorch.data.panel import Panel

NAN = float("nan")


class Block:
    """All rows of the instruments in columns `start..stop` of the bars.

    Values are `[D, n]` tensors. Numbers are NaN outside the span of their instrument; conditions
    are undefined there until `as_numbers` converts them. `mask_bars` are the bars of further
    instruments that `Mask` may name.
    """

    def __init__(self, bars: Panel, start: int, stop: int, mask_bars: Panel | None = None) -> None:
        self.bars, self.start, self.stop, self.mask_bars = bars, start, stop, mask_bars
        self.device = bars.device
        self.num_rows = len(bars.calendar)
        self.num_columns = stop - start
        spans = bars.spans[start:stop].to(self.device)
        self.first, self.last = spans[:, 0].contiguous(), spans[:, 1].contiguous()
        self.is_full = bool(((self.first == 0) & (self.last == self.num_rows - 1)).all())
        self._tail = int(self.last.min()) + 1 if self.num_columns else self.num_rows

    @cached_property
    def rows(self) -> Tensor:
        """The row numbers, `[D, 1]` float64."""
        return torch.arange(self.num_rows, dtype=torch.float64, device=self.device)[:, None]

    @cached_property
    def is_stored(self) -> Tensor:
        """Whether a row is within the instrument's span, `[D, n]` bool."""
        order = torch.arange(self.num_rows, device=self.device)[:, None]
        return (order >= self.first) & (order <= self.last)

    @cached_property
    def span_mask(self) -> Tensor:
        """0 within the spans and NaN outside, `[D, n]` float32; adding it is the fastest mask."""
        return torch.zeros(self.is_stored.shape, device=self.device).masked_fill_(
            ~self.is_stored, NAN
        )

    def clip_window(self, window: int) -> int:
        """Limit a window to the length of the calendar; 0 means all past rows."""
        rows = max(self.num_rows, 1)
        return rows if window == 0 else min(window, rows)

    def clip_windows(self, windows: Iterable[int]) -> tuple[int, ...]:
        """Limit several windows and return them ascending and unique."""
        return tuple(sorted({self.clip_window(w) for w in windows}))

    def first_rows(self, window: int) -> Tensor:
        """Return the first row of each window within the span, `[D, 1]` or `[D, n]` float64."""
        start = (self.rows - (window - 1)).clamp_(min=0)
        return start if self.is_full else torch.maximum(start, self.first.to(start.dtype))

    def window_lengths(self, window: int) -> Tensor:
        """Return the number of rows in each window, including NaN: `[D, 1]` or `[D, n]` float64."""
        return (self.rows + 1 - self.first_rows(window)).clamp_(min=0)

    def mask_outside_span(self, values: Tensor, *, head: bool = False) -> Tensor:
        """Set values after the span (with `head` also those before it) to NaN in place."""
        if self.is_full:
            return values
        start = 0 if head else self._tail
        if start < self.num_rows:
            values[start:] += self.span_mask[start:]
        return values

    def as_numbers(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Convert conditions to 0 and 1 (NaN outside the spans), and cast numbers to `dtype`."""
        if values.dtype == torch.bool:
            return self.mask_outside_span(values.to(dtype or torch.float32), head=True)
        return values if dtype is None else values.to(dtype)

    def empty(self, dtype: torch.dtype = torch.float32, rows: int | None = None) -> Tensor:
        """Return an uninitialized `[D, n]` tensor."""
        shape = (self.num_rows if rows is None else rows, self.num_columns)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def load(self, field: Field) -> Tensor:
        """Load a stored field as a contiguous `[D, n]` tensor.

        Raises ExpressionError with the nearest name if the bars do not have the field.
        """
        name = field_name(field, self.bars.fields)
        column = self.bars.column(name)[:, self.start : self.stop]
        values = column.to(torch.float32).contiguous()
        if self.is_full:
            return values
        return values + self.span_mask


def field_name(field: Field, stored_names: Sequence[str]) -> str:
    """Find the stored name of a field: as written or in lower case, as Qlib stores names."""
    for name in (field.name, field.name.lower()):
        if name in stored_names:
            return name
    raise _unknown_field_error(field, stored_names)


def _unknown_field_error(field: Field, stored_names: Sequence[str]) -> ExpressionError:
    return expression_error(field.span, unknown_name("field", field.name, stored_names))
