"""The valid cells of a series, and the statistics that depend only on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from qtorch.data.expression.block import NAN, Block
from qtorch.data.expression.chain import rolling_sums


class Rows:
    """The cells with a finite value, and their counts by window.

    Series with the same valid cells share the object. Nearly all series of a market are dense:
    all cells are valid from some row on, and none before (`num_leading_nans` is 1 after a `Ref`
    of one row). Their counts are a single column `[D, 1]`. For other series, `valid [D, n]`
    float32 is 1 in valid cells, and counts are `[D, n]`.
    """

    def __init__(
        self,
        block: Block,
        windows: tuple[int, ...],
        *,
        num_leading_nans: int = 0,
        valid: Tensor | None = None,
    ) -> None:
        self.block, self.num_leading_nans, self.is_dense = block, num_leading_nans, valid is None
        self._windows, self._valid = windows, valid
        self._sums: dict[str, dict[int, Tensor]] = {}
        self._cache: dict[tuple[str, int], Tensor] = {}

    def matches(self, num_leading_nans: int, valid: Tensor | None) -> bool:
        """Whether the valid cells equal the given ones."""
        if valid is None or self._valid is None:
            return (
                valid is None and self._valid is None and num_leading_nans == self.num_leading_nans
            )
        return torch.equal(valid, self._valid)

    @cached_property
    def valid(self) -> Tensor:
        """1 in cells with a value, else 0; `[D, n]` float32."""
        if self._valid is not None:
            return self._valid
        valid = torch.ones((self.block.num_rows, self.block.num_columns), device=self.block.device)
        valid[: self.num_leading_nans] = 0
        return valid

    @cached_property
    def nan_mask(self) -> Tensor:
        """NaN in cells without a value, else 0; `[D, n]` float32."""
        return self.valid.reciprocal().mul_(0)

    def mask_missing(self, result: Tensor) -> Tensor:
        """Set `result` to NaN in place on days without a value."""
        if not self.is_dense:
            return result.add_(self.nan_mask)
        result[: self.num_leading_nans] = NAN
        return result

    def mask_empty(self, result: Tensor, window: int) -> Tensor:
        """Set `result` to NaN in place for windows without a value."""
        if self.is_dense:
            result[: self.num_leading_nans] = NAN
            return result
        count = self._sparse_count(window)
        if bool(count.amin() > 0):
            return result
        return result.add_(self._compute_once("empty_mask", window, lambda: count.reciprocal() * 0))

    # -- counts --------------------------------------------------------------------------------

    def count(self, window: int) -> Tensor:
        """Return the number of values in each window, float64 `[D, 1]` or `[D, n]`."""
        if self.is_dense:
            return self._compute_once("count", window, lambda: self._dense_count(window))
        return self._compute_once(
            "count", window, lambda: self._sparse_count(window).to(torch.float64)
        )

    def _dense_count(self, window: int) -> Tensor:
        return (self.block.rows + (1 - self.num_leading_nans)).clamp_(min=0, max=window)

    def _sparse_count(self, window: int) -> Tensor:
        if "valid" not in self._sums:
            self._sums["valid"] = rolling_sums(self.valid, self._windows)
        return self._sums["valid"][window]

    def inverse_count(self, window: int) -> Tensor:
        """Return 1 / count; infinite for an empty window, so that 0 times it is NaN."""
        return self._compute_once("inverse_count", window, lambda: self.count(window).reciprocal())

    def inverse_dof(self, window: int) -> Tensor:
        """Return 1 / (count - 1) for variances; infinite for a single value."""
        return self._compute_once(
            "inverse_dof", window, lambda: (self.count(window) - 1).reciprocal()
        )

    # -- row numbers -----------------------------------------------------------------------------

    def mean_row(self, window: int) -> Tensor:
        """Return the mean row number of the rows with a value."""
        if self.is_dense:
            return self.block.rows - (self.count(window) - 1) / 2
        return self._compute_once(
            "mean_row", window, lambda: self._row_power_sum(1, window) * self.inverse_count(window)
        )

    def inverse_row_deviation(self, window: int) -> Tensor:
        """Return 1 / the sum of squared deviations of the row numbers; NaN for fewer than two."""
        if self.is_dense:
            n = self.count(window)
            return torch.where(n > 1, 12 / (n * (n * n - 1)), NAN)
        return self._compute_once(
            "inverse_row_deviation", window, lambda: self._inverse_row_deviation(window)
        )

    def _inverse_row_deviation(self, window: int) -> Tensor:
        squares, mean = self._row_power_sum(2, window), self.mean_row(window)
        deviation = torch.addcmul(squares, mean, self._row_power_sum(1, window), value=-1)
        # Two rows have a sum of at least 0.5; smaller numbers are rounding errors of 0.
        return torch.threshold(deviation, 0.25, NAN).reciprocal_()

    def _row_power_sum(self, power: int, window: int) -> Tensor:
        family = f"row{power}"
        if family not in self._sums:
            base = self.valid.to(torch.float64) * self.block.rows**power
            self._sums[family] = rolling_sums(base, self._windows)
        return self._sums[family][window]

    def _compute_once(self, name: str, window: int, compute: Callable[[], Tensor]) -> Tensor:
        key = (name, window)
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


def find_rows(cache: list[Rows], block: Block, windows: tuple[int, ...], values: Tensor) -> Rows:
    """Return the `Rows` of the values from the cache, adding an object if none matches."""
    num_leading_nans, valid = _find_valid_cells(block, values)
    for rows in cache:
        if rows.matches(num_leading_nans, valid):
            return rows
    cache.append(Rows(block, windows, num_leading_nans=num_leading_nans, valid=valid))
    return cache[-1]


def _find_valid_cells(block: Block, values: Tensor) -> tuple[int, Tensor | None]:
    if values.dtype == torch.bool:
        return 0, None if block.is_full else block.is_stored.to(torch.float32)
    # 0 if finite, else NaN: one vectorized pass instead of the four of isfinite.
    zero_or_nan = values * 0
    num_missing = int(zero_or_nan[:, :1].isnan().cummin(0).values.sum()) if len(zero_or_nan) else 0
    if bool(zero_or_nan[num_missing:].sum() == 0) and bool(zero_or_nan[:num_missing].isnan().all()):
        return num_missing, None
    return 0, torch.nan_to_num_(zero_or_nan.to(torch.float32).add_(1), nan=0.0)
