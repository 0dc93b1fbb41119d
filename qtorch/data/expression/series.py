"""A series as rolling windows see it: its valid values, their counts and rolling sums.

Every sum is built in float64 from shorter windows by shifted slices, `S10[i] = S5[i] + S5[i-5]`;
one pass serves all windows of a family. A window is cut at the first row, so a window of 0 (all
rows so far) is a window of D rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from qtorch.data.expression.block import Block
from qtorch.data.expression.plan import chain_for

WindowsOf: TypeAlias = Callable[..., tuple[int, ...]]
"""The windows that the plan asks of some families of sums (of all, where none is named)."""

# Relative to the sum of squares: below this a sum of squared deviations is rounding.
_FLAT = 1e-15


def rolling_sums(base: Tensor, windows: tuple[int, ...]) -> dict[int, Tensor]:
    """Sums `[D, n]` over each window of rows, cut at the first row; `base` holds no NaN."""
    built = {1: base}
    chain = chain_for(windows, len(base))
    for at, link in enumerate(chain):
        newer, older, cut = built[link.newer], built[link.older], link.shift
        total = torch.empty_like(base)
        torch.add(newer[cut:], older[:-cut], out=total[cut:])
        total[:cut] = newer[:cut]
        built[link.window] = total
        needed = {w for later in chain[at + 1 :] for w in (later.newer, later.older)}
        for spent in [w for w in built if w not in needed and w not in windows]:
            del built[spent]
    return {w: built[w] for w in windows}


class Series:
    """One step's values and what rolling operators need of them, computed when first asked."""

    def __init__(self, block: Block, values: Tensor, asked: WindowsOf) -> None:
        self.block, self.values, self._asked = block, values, asked
        self._sums: dict[str, dict[int, Tensor]] = {}
        self._cache: dict[tuple[str, int], Tensor] = {}
        self.quantiles: dict[tuple[int, float], Tensor] | None = None

    def effective(self, window: int) -> int:
        """The window that sees the same rows: 0 is all, and none is longer than the calendar."""
        rows = max(self.block.num_rows, 1)
        return rows if window == 0 else min(window, rows)

    def windows(self, *families: str) -> tuple[int, ...]:
        """All windows that the plan wants of the families."""
        return tuple(sorted({self.effective(w) for w in self._asked(*families)}))

    # -- values --------------------------------------------------------------------------------

    @cached_property
    def is_condition(self) -> bool:
        """Whether the values are true and false."""
        return self.values.dtype == torch.bool

    @cached_property
    def complete(self) -> bool:
        """Whether every cell holds a finite value; then counts need one column only."""
        if self.is_condition or not self.block.whole:
            return self.block.whole
        # 0 * x is 0 exactly for finite x: one vectorised pass, against four of isfinite.
        return bool((self.values * 0).sum() == 0)

    @cached_property
    def filled(self) -> Tensor:
        """Values with NaN and infinity as 0; conditions in float32, numbers in float64."""
        if self.is_condition:
            values = self.values if self.block.whole else self.values & self.block.inside
            return values.to(torch.float32)
        values = self.values.to(torch.float64)
        if self.complete:
            return values
        return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)

    @cached_property
    def numbers(self) -> Tensor:
        """Values with infinity as NaN, in the type they are stored in."""
        if self.is_condition:
            return self.block.numbers(self.values)
        return self.values if self.complete else self.values + self.values * 0

    @cached_property
    def valid(self) -> Tensor:
        """`[D, n]` float32: 1 where there is a finite value, else 0."""
        if self.is_condition:
            return self.block.inside.to(torch.float32)
        return torch.nan_to_num((self.values * 0).to(torch.float32) + 1, nan=0.0)

    @cached_property
    def hole(self) -> Tensor | None:
        """`[D, n]` float32: NaN where there is no finite value, else 0; None if complete."""
        if self.complete:
            return None
        return self.block.gap if self.is_condition else (self.values * 0).to(torch.float32)

    def reopen(self, result: Tensor) -> Tensor:
        """NaN where today has no value, in place."""
        return result if self.hole is None else result.add_(self.hole)

    # -- sums ----------------------------------------------------------------------------------

    def sum(self, family: str, window: int) -> Tensor:
        """The rolling sum of a family: sum, square, position (row number x value), power1..4."""
        if family not in self._sums:
            asked = "position" if family.startswith("valid_") else family
            self._sums[family] = rolling_sums(self._base(family), self.windows(asked))
        return self._sums[family][self.effective(window)]

    def _base(self, family: str) -> Tensor:
        if family == "sum":
            return self.filled
        if family == "square":
            return self.filled * self.filled
        if family == "position":
            return self.filled * self.block.rows
        valid = self.valid.to(torch.float64)
        if family == "valid_position":
            return valid * self.block.rows
        if family == "valid_square":
            return valid * self.block.rows.square()
        assert family.startswith("power"), family
        return self.centred ** int(family[5:])

    @cached_property
    def centred(self) -> Tensor:
        """Values less their instrument's mean (0 where there is none), for higher powers."""
        number = self.valid.sum(0, dtype=torch.float64)
        mean = self.filled.sum(0, dtype=torch.float64) / number.clamp(min=1)
        return (self.filled - mean) * self.valid

    def count(self, window: int) -> Tensor:
        """Valid values in each window: `[D, 1]` if complete, else `[D, n]`; float64."""
        window = self.effective(window)
        if self.complete:
            return self._cached("count", window, lambda: self.lengths(window))
        return self._cached("count", window, lambda: self._counted(window).to(torch.float64))

    def _counted(self, window: int) -> Tensor:
        if "valid" not in self._sums:
            self._sums["valid"] = rolling_sums(self.valid, self.windows())
        return self._sums["valid"][window]

    def lengths(self, window: int) -> Tensor:
        """Rows in each window, valid or not: `[D, 1]` or `[D, n]` float64."""
        start = self.block.first_row(self.effective(window))
        return (self.block.rows + 1 - start).clamp_(min=0)

    def built(
        self, family: str, build: Callable[[Series], dict[int, Tensor]]
    ) -> dict[int, Tensor]:
        """What `build` makes of the series, kept for all operators of the family."""
        if family not in self._sums:
            self._sums[family] = build(self)
        return self._sums[family]

    def _cached(self, what: str, window: int, make: Callable[[], Tensor]) -> Tensor:
        key = (what, self.effective(window))
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def per_count(self, window: int) -> Tensor:
        """1 / count; infinite for an empty window, so that 0 times it is NaN."""
        return self._cached("per_count", window, lambda: self.count(window).reciprocal())

    def per_freedom(self, window: int) -> Tensor:
        """1 / (count - 1), for variances; infinite where there is one value."""
        return self._cached("per_freedom", window, lambda: (self.count(window) - 1).reciprocal())

    def empty(self, window: int) -> Tensor | None:
        """`[D, n]` float32: NaN where a window has no valid value, else 0; None if all have."""
        if self.complete:
            return None
        counted = self._counted(self.effective(window))
        if bool(counted.amin() > 0):
            return None
        return self._cached("empty", window, lambda: counted.reciprocal() * 0)

    def variance(self, window: int) -> Tensor:
        """Variance (n - 1) in float64; NaN under two values, 0 exactly on flat windows."""
        return self._cached("variance", window, lambda: self._variance(window))

    def _variance(self, window: int) -> Tensor:
        total = self.sum("sum", window).to(torch.float64)
        below = (total * total).mul_(self.per_count(window))
        below.sub_(self.sum("square", window), alpha=1 - _FLAT).clamp_(max=0)
        return below.mul_(-self.per_freedom(window))

    def guarded_variance(self, window: int) -> Tensor:
        """Variance, NaN where the deviation is at most 2e-5 (Qlib's guard in Corr and Rsquare)."""
        return self._cached(
            "guarded",
            window,
            lambda: torch.threshold(self.variance(window), 4e-10, float("nan")),
        )


class Pair:
    """Two series as Corr and Cov see them: the rows where both have a value."""

    def __init__(self, left: Series, right: Series, asked: WindowsOf) -> None:
        self.alone = (left, right)
        if _same_rows(left, right):
            self.left, self.right = left, right
        else:
            block, x, y = left.block, left.numbers, right.numbers
            self.left = Series(block, x + y * 0, lambda *_: asked())
            self.right = Series(block, y + x * 0, lambda *_: asked())
        self._windows = tuple(sorted({left.effective(w) for w in asked()}))
        self._products: dict[int, Tensor] | None = None

    def codeviation(self, window: int) -> Tensor:
        """Sum of the products of both sides' deviations, float64."""
        if self._products is None:
            base = self.left.filled.to(torch.float64) * self.right.filled
            self._products = rolling_sums(base, self._windows)
        product = self._products[self.left.effective(window)]
        means = self.left.sum("sum", window).to(torch.float64) * self.right.sum("sum", window)
        return product - means.mul_(self.left.per_count(window))


def _same_rows(left: Series, right: Series) -> bool:
    if left.complete or right.complete:
        return left.complete and right.complete
    return torch.equal(left.valid, right.valid)
