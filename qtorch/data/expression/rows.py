"""Which rows of a series hold a value, and all that follows from that alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from qtorch.data.expression.block import NAN, Block
from qtorch.data.expression.chain import rolling_sums


class Rows:
    """The cells that hold a finite value, with counts by window; shared by equal series.

    Nearly every series of a market is solid: a value in each cell from some row on (`lead` is 1
    after a `Ref` of one row) and none before. Its counts are one column `[D, 1]`. Otherwise
    `valid [D, n]` float32 is 1 where there is a value, and counts are `[D, n]`.
    """

    def __init__(
        self, block: Block, windows: tuple[int, ...], *, lead: int = 0, valid: Tensor | None = None
    ) -> None:
        self.block, self.lead, self.solid = block, lead, valid is None
        self._windows, self._valid = windows, valid
        self._sums: dict[str, dict[int, Tensor]] = {}
        self._cache: dict[tuple[str, int], Tensor] = {}

    def same(self, lead: int, valid: Tensor | None) -> bool:
        """Whether these are the given rows."""
        if valid is None or self._valid is None:
            return valid is None and self._valid is None and lead == self.lead
        return torch.equal(valid, self._valid)

    @cached_property
    def valid(self) -> Tensor:
        """`[D, n]` float32: 1 where there is a value, else 0."""
        if self._valid is not None:
            return self._valid
        valid = torch.ones((self.block.num_rows, self.block.num_columns), device=self.block.device)
        valid[: self.lead] = 0
        return valid

    @cached_property
    def hole(self) -> Tensor:
        """`[D, n]` float32: NaN where there is no value, else 0."""
        return self.valid.reciprocal().mul_(0)

    def reopen(self, result: Tensor) -> Tensor:
        """NaN where today has no value, in place."""
        if not self.solid:
            return result.add_(self.hole)
        result[: self.lead] = NAN
        return result

    def void(self, result: Tensor, window: int) -> Tensor:
        """NaN where the window has no value, in place."""
        if self.solid:
            result[: self.lead] = NAN
            return result
        counted = self._counted(window)
        if bool(counted.amin() > 0):
            return result
        return result.add_(self._cached("void", window, lambda: counted.reciprocal() * 0))

    # -- counts --------------------------------------------------------------------------------

    def count(self, window: int) -> Tensor:
        """Values in each window, float64 `[D, 1]` or `[D, n]`."""
        if self.solid:
            return self._cached("count", window, lambda: self._solid_count(window))
        return self._cached("count", window, lambda: self._counted(window).to(torch.float64))

    def _solid_count(self, window: int) -> Tensor:
        return (self.block.rows + (1 - self.lead)).clamp_(min=0, max=window)

    def _counted(self, window: int) -> Tensor:
        if "valid" not in self._sums:
            self._sums["valid"] = rolling_sums(self.valid, self._windows)
        return self._sums["valid"][window]

    def per_count(self, window: int) -> Tensor:
        """1 / count; infinite for an empty window, so that 0 times it is NaN."""
        return self._cached("per_count", window, lambda: self.count(window).reciprocal())

    def per_freedom(self, window: int) -> Tensor:
        """1 / (count - 1), for variances; infinite where there is one value."""
        return self._cached("per_freedom", window, lambda: (self.count(window) - 1).reciprocal())

    # -- row numbers -----------------------------------------------------------------------------

    def mean_row(self, window: int) -> Tensor:
        """The mean number of the rows with a value."""
        if self.solid:
            return self.block.rows - (self.count(window) - 1) / 2
        return self._cached(
            "mean_row", window, lambda: self._row_sum(1, window) * self.per_count(window)
        )

    def per_row_deviation(self, window: int) -> Tensor:
        """1 / the sum of squared deviations of those row numbers; NaN for fewer than two."""
        if self.solid:
            n = self.count(window)
            return torch.where(n > 1, 12 / (n * (n * n - 1)), NAN)
        return self._cached("per_row_deviation", window, lambda: self._row_deviation(window))

    def _row_deviation(self, window: int) -> Tensor:
        squares, mean = self._row_sum(2, window), self.mean_row(window)
        deviation = torch.addcmul(squares, mean, self._row_sum(1, window), value=-1)
        # Two rows deviate by 0.5 at least; what is less is rounding about 0.
        return torch.threshold(deviation, 0.25, NAN).reciprocal_()

    def _row_sum(self, power: int, window: int) -> Tensor:
        family = f"row{power}"
        if family not in self._sums:
            base = self.valid.to(torch.float64) * self.block.rows**power
            self._sums[family] = rolling_sums(base, self._windows)
        return self._sums[family][window]

    def _cached(self, what: str, window: int, make: Callable[[], Tensor]) -> Tensor:
        key = (what, window)
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


def find_rows(known: list[Rows], block: Block, windows: tuple[int, ...], values: Tensor) -> Rows:
    """The rows of a value, one of the known ones if it equals; else added to them."""
    lead, valid = _rows_of(block, values)
    for rows in known:
        if rows.same(lead, valid):
            return rows
    known.append(Rows(block, windows, lead=lead, valid=valid))
    return known[-1]


def _rows_of(block: Block, values: Tensor) -> tuple[int, Tensor | None]:
    if values.dtype == torch.bool:
        return 0, None if block.whole else block.inside.to(torch.float32)
    zero = values * 0  # 0 where finite, else NaN: one vectorised pass, against four of isfinite
    first = int(zero[:, :1].isnan().cummin(0).values.sum()) if len(zero) else 0
    if bool(zero[first:].sum() == 0) and bool(zero[:first].isnan().all()):
        return first, None
    return 0, torch.nan_to_num_(zero.to(torch.float32).add_(1), nan=0.0)
