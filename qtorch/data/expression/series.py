"""The values of a step with cached rolling sums, as used by the rolling operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from qtorch.data.expression.block import NAN, Block
from qtorch.data.expression.chain import rolling_sums
from qtorch.data.expression.rows import Rows

GetWindows: TypeAlias = Callable[..., tuple[int, ...]]
"""Returns the windows that the plan needs for the given families of sums (default: all)."""
GetRows: TypeAlias = Callable[[Tensor], Rows]

# A sum of squared deviations below this multiple of the sum of squares is a rounding error.
_ROUNDING = 1e-15


class Series:
    """The values of a step and their rolling sums, which are computed when first used.

    Sums are float64; sums of conditions are float32, which counts exactly.
    """

    def __init__(
        self, block: Block, values: Tensor, get_windows: GetWindows, get_rows: GetRows
    ) -> None:
        self.block, self.values = block, values
        self._get_windows, self._get_rows = get_windows, get_rows
        self._sums: dict[str, dict[int, Tensor]] = {}
        self._cache: dict[tuple[str, int], Tensor] = {}
        self.quantiles: dict[tuple[int, float], Tensor] | None = None

    def windows(self, *families: str) -> tuple[int, ...]:
        """Return all windows that the plan needs for the families, ascending."""
        return self.block.clip_windows(self._get_windows(*families))

    # -- values --------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> Rows:
        """The cells with a finite value."""
        return self._get_rows(self.values)

    @cached_property
    def values_or_zero(self) -> Tensor:
        """Values with NaN and infinity replaced by 0; float64, or float32 for conditions."""
        if self.values.dtype == torch.bool:
            values = self.values if self.block.is_full else self.values & self.block.is_stored
            return values.to(torch.float32)
        if self.rows.is_dense:
            values = self.values.to(torch.float64, copy=self.rows.num_leading_nans > 0)
            values[: self.rows.num_leading_nans] = 0
            return values
        return torch.nan_to_num(self.values, nan=0.0, posinf=0.0, neginf=0.0).to(torch.float64)

    @cached_property
    def numbers(self) -> Tensor:
        """Values with infinity replaced by NaN, in their own dtype; conditions as 0 and 1."""
        if self.values.dtype == torch.bool:
            return self.block.as_numbers(self.values)
        return (
            self.values if self.rows.is_dense and not self.rows.num_leading_nans else self._finite()
        )

    def _finite(self) -> Tensor:
        return self.values + self.values * 0

    # -- sums ----------------------------------------------------------------------------------

    def sum(self, family: str, window: int) -> Tensor:
        """Return the rolling sum of a family: sum, square, or position (row number x value)."""
        return self.build_once(family, lambda s: rolling_sums(s.base(family), s.windows(family)))[
            window
        ]

    def base(self, family: str) -> Tensor:
        """Return the terms that the sums of a family add up."""
        if family == "sum":
            return self.values_or_zero
        if family == "square":
            # Reduced by the rounding error, so that a flat window has variance 0.
            values = self.values_or_zero.to(torch.float64)
            return (values * values).mul_(1 - _ROUNDING)
        assert family == "position", family
        return self.values_or_zero * self.block.rows

    def build_once(
        self, family: str, build: Callable[[Series], dict[int, Tensor]]
    ) -> dict[int, Tensor]:
        """Return `build(self)`, a result by window that is cached for all users of the family."""
        if family not in self._sums:
            self._sums[family] = build(self)
        return self._sums[family]

    def variance(self, window: int) -> Tensor:
        """Return the variance (n - 1) in float64: NaN for under two values, 0 on flat windows."""
        return self._compute_once("variance", window, lambda: self._variance(window))

    def _variance(self, window: int) -> Tensor:
        total = self.sum("sum", window).to(torch.float64)
        mean_part = (total * total).mul_(self.rows.inverse_count(window))
        deviation = torch.sub(self.sum("square", window), mean_part, out=mean_part)
        return deviation.clamp_(min=0).mul_(self.rows.inverse_dof(window))

    def variance_or_nan(self, window: int) -> Tensor:
        """Return the variance, or NaN for deviations up to 2e-5, as in Qlib's Corr and Rsquare."""
        return self._compute_once(
            "variance_or_nan", window, lambda: torch.threshold(self.variance(window), 4e-10, NAN)
        )

    def _compute_once(self, name: str, window: int, compute: Callable[[], Tensor]) -> Tensor:
        key = (name, window)
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


class Pair:
    """Two series restricted to the rows where both have a value, for Corr and Cov."""

    def __init__(
        self, left: Series, right: Series, get_windows: GetWindows, get_rows: GetRows
    ) -> None:
        self.originals = (left, right)
        if left.rows is right.rows:
            self.left, self.right = left, right
        else:
            block, x, y = left.block, left.numbers, right.numbers
            self.left = Series(block, x + y * 0, lambda *_: get_windows(), get_rows)
            self.right = Series(block, y + x * 0, lambda *_: get_windows(), get_rows)
        self._windows = left.block.clip_windows(get_windows())
        self._products: dict[int, Tensor] | None = None

    def codeviation(self, window: int) -> Tensor:
        """Return the sum of the products of both sides' deviations, float64."""
        if self._products is None:
            base = self.left.values_or_zero.to(torch.float64) * self.right.values_or_zero
            self._products = rolling_sums(base, self._windows)
        means = self.left.sum("sum", window).to(torch.float64) * self.right.sum("sum", window)
        means.mul_(self.left.rows.inverse_count(window))
        return torch.sub(self._products[window], means, out=means)
