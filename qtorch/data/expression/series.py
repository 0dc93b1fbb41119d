"""A series as rolling windows see it: its values and their rolling sums."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from qtorch.data.expression.block import NAN, Block
from qtorch.data.expression.chain import rolling_sums
from qtorch.data.expression.rows import Rows

WindowsOf: TypeAlias = Callable[..., tuple[int, ...]]
"""The windows that the plan asks of some families of sums (of all, where none is named)."""
RowsOf: TypeAlias = Callable[[Tensor], Rows]

# Relative to the sum of squares: below this a sum of squared deviations is rounding.
_FLAT = 1e-15


class Series:
    """One step's values and what rolling operators need of them, computed when first asked.

    Sums are float64; those of conditions are float32, which counts exactly.
    """

    def __init__(self, block: Block, values: Tensor, asked: WindowsOf, rows_of: RowsOf) -> None:
        self.block, self.values, self._asked, self._rows_of = block, values, asked, rows_of
        self._sums: dict[str, dict[int, Tensor]] = {}
        self._cache: dict[tuple[str, int], Tensor] = {}
        self.quantiles: dict[tuple[int, float], Tensor] | None = None

    def windows(self, *families: str) -> tuple[int, ...]:
        """All windows that the plan wants of the families, ascending."""
        return self.block.windows(self._asked(*families))

    # -- values --------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> Rows:
        """Where there is a finite value."""
        return self._rows_of(self.values)

    @cached_property
    def filled(self) -> Tensor:
        """Values with NaN and infinity as 0; conditions in float32, numbers in float64."""
        if self.values.dtype == torch.bool:
            values = self.values if self.block.whole else self.values & self.block.inside
            return values.to(torch.float32)
        if self.rows.solid:
            values = self.values.to(torch.float64, copy=self.rows.lead > 0)
            values[: self.rows.lead] = 0
            return values
        return torch.nan_to_num(self.values, nan=0.0, posinf=0.0, neginf=0.0).to(torch.float64)

    @cached_property
    def numbers(self) -> Tensor:
        """Values with infinity as NaN, in the type they are stored in; conditions as 0 and 1."""
        if self.values.dtype == torch.bool:
            return self.block.numbers(self.values)
        return self.values if self.rows.solid and not self.rows.lead else self._finite()

    def _finite(self) -> Tensor:
        return self.values + self.values * 0

    # -- sums ----------------------------------------------------------------------------------

    def sum(self, family: str, window: int) -> Tensor:
        """The rolling sum of a family: sum, square, position (row number x value)."""
        return self.built(family, lambda s: rolling_sums(s.base(family), s.windows(family)))[window]

    def base(self, family: str) -> Tensor:
        """What a family sums."""
        if family == "sum":
            return self.filled
        if family == "square":  # less what rounding may add, so that a flat window deviates by 0
            values = self.filled.to(torch.float64)
            return (values * values).mul_(1 - _FLAT)
        assert family == "position", family
        return self.filled * self.block.rows

    def built(self, family: str, build: Callable[[Series], dict[int, Tensor]]) -> dict[int, Tensor]:
        """What `build` makes of the series, by window; kept for all operators of the family."""
        if family not in self._sums:
            self._sums[family] = build(self)
        return self._sums[family]

    def variance(self, window: int) -> Tensor:
        """Variance (n - 1) in float64; NaN under two values, 0 exactly on flat windows."""
        return self._cached("variance", window, lambda: self._variance(window))

    def _variance(self, window: int) -> Tensor:
        total = self.sum("sum", window).to(torch.float64)
        mean_part = (total * total).mul_(self.rows.per_count(window))
        deviation = torch.sub(self.sum("square", window), mean_part, out=mean_part)
        return deviation.clamp_(min=0).mul_(self.rows.per_freedom(window))

    def guarded_variance(self, window: int) -> Tensor:
        """Variance, NaN where the deviation is at most 2e-5 (Qlib's guard in Corr and Rsquare)."""
        return self._cached(
            "guarded", window, lambda: torch.threshold(self.variance(window), 4e-10, NAN)
        )

    def _cached(self, what: str, window: int, make: Callable[[], Tensor]) -> Tensor:
        key = (what, window)
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


class Pair:
    """Two series as Corr and Cov see them: the rows where both have a value."""

    def __init__(self, left: Series, right: Series, asked: WindowsOf, rows_of: RowsOf) -> None:
        self.alone = (left, right)
        if left.rows is right.rows:
            self.left, self.right = left, right
        else:
            block, x, y = left.block, left.numbers, right.numbers
            self.left = Series(block, x + y * 0, lambda *_: asked(), rows_of)
            self.right = Series(block, y + x * 0, lambda *_: asked(), rows_of)
        self._windows = left.block.windows(asked())
        self._products: dict[int, Tensor] | None = None

    def codeviation(self, window: int) -> Tensor:
        """Sum of the products of both sides' deviations, float64."""
        if self._products is None:
            base = self.left.filled.to(torch.float64) * self.right.filled
            self._products = rolling_sums(base, self._windows)
        means = self.left.sum("sum", window).to(torch.float64) * self.right.sum("sum", window)
        means.mul_(self.left.rows.per_count(window))
        return torch.sub(self._products[window], means, out=means)
