"""A block of instruments: its fields, and which rows of each instrument are stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from qtorch.core.errors import ExpressionError, unknown_name
from qtorch.data.expression.node import Field
from qtorch.data.expression.tokens import error_at
from qtorch.data.panel import Panel

NAN = float("nan")


class Block:
    """Some instruments (columns `start..stop`) of the bars, all rows.

    Values here are `[D, n]` tensors. A number is NaN outside its instrument's span; what a
    condition holds there is undefined, and `numbers` mends it. `others` are bars of instruments
    that `Mask` may name besides.
    """

    def __init__(self, bars: Panel, start: int, stop: int, others: Panel | None = None) -> None:
        self.bars, self.start, self.stop, self.others = bars, start, stop, others
        self.device = bars.device
        self.num_rows = len(bars.calendar)
        self.num_columns = stop - start
        spans = bars.spans[start:stop].to(self.device)
        self.first, self.last = spans[:, 0].contiguous(), spans[:, 1].contiguous()
        self.whole = bool(((self.first == 0) & (self.last == self.num_rows - 1)).all())
        self._tail = int(self.last.min()) + 1 if self.num_columns else self.num_rows

    @cached_property
    def rows(self) -> Tensor:
        """`[D, 1]` float64: the number of each row."""
        return torch.arange(self.num_rows, dtype=torch.float64, device=self.device)[:, None]

    @cached_property
    def inside(self) -> Tensor:
        """`[D, n]` bool: the rows within each instrument's span."""
        order = torch.arange(self.num_rows, device=self.device)[:, None]
        return (order >= self.first) & (order <= self.last)

    @cached_property
    def gap(self) -> Tensor:
        """`[D, n]` float32: 0 within the spans, NaN outside; adding it is the quickest mask."""
        return torch.zeros(self.inside.shape, device=self.device).masked_fill_(~self.inside, NAN)

    def window(self, asked: int) -> int:
        """The window that sees the same rows: 0 is all, and none is longer than the calendar."""
        rows = max(self.num_rows, 1)
        return rows if asked == 0 else min(asked, rows)

    def windows(self, asked: Iterable[int]) -> tuple[int, ...]:
        """The same for many, ascending and each once."""
        return tuple(sorted({self.window(w) for w in asked}))

    def first_row(self, window: int) -> Tensor:
        """`[D, 1]` or `[D, n]` float64: the first row of each window cut at the span's start."""
        start = (self.rows - (window - 1)).clamp_(min=0)
        return start if self.whole else torch.maximum(start, self.first.to(start.dtype))

    def lengths(self, window: int) -> Tensor:
        """Rows in each window, with or without a value: `[D, 1]` or `[D, n]` float64."""
        return (self.rows + 1 - self.first_row(window)).clamp_(min=0)

    def seal(self, values: Tensor, *, head: bool = False) -> Tensor:
        """NaN after the last stored row (and before the first: `head`), in place."""
        if self.whole:
            return values
        tail = 0 if head else self._tail
        if tail < self.num_rows:
            values[tail:] += self.gap[tail:]
        return values

    def numbers(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A condition as 0 and 1 (NaN outside the spans); numbers as they are, cast to `dtype`."""
        if values.dtype == torch.bool:
            return self.seal(values.to(dtype or torch.float32), head=True)
        return values if dtype is None else values.to(dtype)

    def empty(self, dtype: torch.dtype = torch.float32, rows: int | None = None) -> Tensor:
        """An uninitialised `[D, n]` tensor."""
        shape = (self.num_rows if rows is None else rows, self.num_columns)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def load(self, field: Field) -> Tensor:
        """A stored field `[D, n]`, contiguous.

        Raises ExpressionError with the nearest name where the bars lack it.
        """
        name = field_name(field, self.bars.fields)
        column = self.bars.column(name)[:, self.start : self.stop]
        values = column.to(torch.float32).contiguous()
        if self.whole:
            return values
        return values + self.gap


def field_name(field: Field, known: Sequence[str]) -> str:
    """The bars' own name of a field: as written, or in lower case (as Qlib stores names)."""
    for name in (field.name, field.name.lower()):
        if name in known:
            return name
    raise _unknown_field(field, known)


def _unknown_field(field: Field, known: Sequence[str]) -> ExpressionError:
    return error_at(field.span, unknown_name("field", field.name, known))
