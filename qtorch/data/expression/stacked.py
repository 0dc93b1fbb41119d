"""Rolling statistics of several series and windows at once, for a GPU.

Tensors are stacks: series `[S, D, n]`, windows of series `[W, S, D, n]`. Nothing here reads a
number on the host, so that a GPU never waits, and the number of operations does not depend on that
of instruments. Values equal those of `series` up to the rounding of float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from qtorch.data.expression.series import Link, window_chain

# A variance below this multiple of the squared mean is a rounding error: the window is flat.
_FLAT = 1e-30


class WindowStack:
    """A buffer `[V, ..., P + D, n]` with one plane for each window of a chain.

    Every window is joined from two shorter ones by one operation. The P rows before the first one
    hold a neutral value, so that windows are clipped there without a second operation.
    """

    def __init__(self, windows: Sequence[int], *, overlap: bool = False) -> None:
        self.links = window_chain(windows, overlap=overlap)
        self._planes = {1: 0} | {link.window: k for k, link in enumerate(self.links, 1)}
        self._padding = max((link.shift for link in self.links), default=0)
        self._first = min(self._planes[w] for w in windows)

    def allocate(self, base: Tensor, neutral: float) -> Tensor:
        """Return the buffer with `base [..., D, n]` as the plane of window 1."""
        *leading, d, n = base.shape
        shape = (len(self._planes), *leading, self._padding + d, n)
        buffer = base.new_full(shape, neutral)
        buffer[0, ..., self._padding :, :] = base
        return buffer

    def parts(self, buffer: Tensor, link: Link) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of a link's result, its newer and its older part, over the same rows."""
        result = buffer[self._planes[link.window]][..., link.shift :, :]
        newer = buffer[self._planes[link.newer]][..., link.shift :, :]
        older = buffer[self._planes[link.older]][..., : -link.shift, :]
        return result, newer, older

    def join(self, base: Tensor, function: Callable[..., Tensor], neutral: float) -> Tensor:
        """Return the buffer with all windows of `base`, joined by a function such as torch.add."""
        buffer = self.allocate(base, neutral)
        for link in self.links:
            result, newer, older = self.parts(buffer, link)
            function(newer, older, out=result)
        return buffer

    def results(self, buffer: Tensor) -> Tensor:
        """Return the planes `[W, ..., D, n]` of `windows`, without the rows before the first."""
        return buffer[self._first :, ..., self._padding :, :]

    @property
    def windows(self) -> list[int]:
        """The windows of `results`: the requested ones and perhaps some that they are made of."""
        return list(self._planes)[self._first :]

    def position(self, window: int) -> int:
        """Return the place of a window in `results`."""
        return self._planes[window] - self._first


def stack_series(values: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Stack series `[D, n]` to `[S, D, n]`; without a dtype in the common one."""
    dtypes = {v.dtype for v in values}
    if dtype is None:
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    if len(dtypes) > 1:
        values = [v.to(dtype) for v in values]
    stack = values[0][None] if len(values) == 1 else torch.stack(list(values))
    return stack.to(dtype)


def take_series(stack: Tensor, positions: Sequence[int], dim: int) -> Tensor:
    """Return some series of a stack along `dim`; a view where they follow each other."""
    first, count = positions[0], len(positions)
    if list(positions) == list(range(first, first + count)):
        return stack.narrow(dim, first, count)
    return torch.stack([stack.select(dim, p) for p in positions], dim)


def finite_cells(values: Tensor) -> Tensor:
    """Return 1 where values are finite, else 0, in float64."""
    return (values * 0 == 0).to(torch.float64)


class Sums:
    """Rolling sums and counts of series `[S, D, n]`, by window."""

    def __init__(self, values: Tensor, windows: Sequence[int]) -> None:
        self.chain = WindowStack(windows)
        self.valid = finite_cells(values)
        filled = torch.where(self.valid > 0, values, 0).to(torch.float64)
        self._sums = self.chain.join(filled, torch.add, 0.0)

    @cached_property
    def totals(self) -> Tensor:
        """The sums, `[W, S, D, n]` float64; NaN counts as 0."""
        return self.chain.results(self._sums)

    @cached_property
    def counts(self) -> Tensor:
        """The numbers of values, `[W, S, D, n]` float64."""
        return count_cells(self.valid, self.chain)


def count_cells(valid: Tensor, chain: WindowStack) -> Tensor:
    """Return the number of valid cells in each window, `[W, S, D, n]`."""
    return chain.results(chain.join(valid, torch.add, 0.0))


class Moments:
    """Rolling means and products of deviations of pairs of series.

    `x` and `y` are `[K, D, n]` float64. Both of a pair count where both have a finite value. The
    windows are joined from their parts' means (Chan, Golub and LeVeque 1979), in which nothing
    cancels: prices far from zero that hardly move need no second pass.
    """

    def __init__(self, x: Tensor, y: Tensor, windows: Sequence[int]) -> None:
        chain = self.chain = WindowStack(windows)
        valid = finite_cells(x + y)
        filled = torch.where(valid > 0, torch.stack([x, y]), 0)  # [2, K, D, n]
        counts = chain.join(valid, torch.add, 0.0)  # [V, K, P + D, n]
        num_values = counts.clamp(min=1)
        means = chain.join(filled, torch.add, 0.0).div_(num_values[:, None])  # [V, 2, K, P + D, n]
        products = chain.allocate(filled.new_zeros(3, *valid.shape), 0.0)  # xx, yy, xy
        for link in chain.links:
            _, newer, older = chain.parts(counts, link)
            share = (newer * older).div_(chain.parts(num_values, link)[0])
            _, newer, older = chain.parts(means, link)
            distance = newer - older
            terms = distance.new_empty(3, *distance.shape[1:])
            torch.mul(distance, distance, out=terms[:2])
            torch.mul(distance[0], distance[1], out=terms[2])
            result, newer, older = chain.parts(products, link)
            torch.add(newer, older, out=result).addcmul_(terms, share)
        self.valid = valid > 0
        self.values = filled
        self.counts = chain.results(counts)  # [W, K, D, n]
        self.means = chain.results(means)  # [W, 2, K, D, n]
        self._products = chain.results(products)  # [W, 3, K, D, n]
        limits = (self.means * self.means).mul_(self.counts[:, None]).mul_(_FLAT)
        squares = self._products[:, :2]
        squares.masked_fill_(squares <= limits, 0)

    def squares(self, positions: Sequence[int], side: int = 0) -> Tensor:
        """Return the sums of squared deviations `[W, k, D, n]` of pairs; side 0 is x, 1 is y."""
        return take_series(self._products[:, side], positions, 1)

    def codeviations(self, positions: Sequence[int]) -> Tensor:
        """Return the sums of the products of both sides' deviations, `[W, k, D, n]`."""
        return take_series(self._products[:, 2], positions, 1)

    def inverse_dof(self, positions: Sequence[int]) -> Tensor:
        """Return 1 / (count - 1); infinite below two values, so that 0 times it is NaN."""
        return take_series(self._inverse_dof, positions, 1)

    def inverse_row_deviations(self, positions: Sequence[int]) -> Tensor:
        """Return 1 / the squared deviations of y, the row numbers; NaN for fewer than two rows."""
        return take_series(self._inverse_deviations, positions, 1)

    @cached_property
    def _inverse_dof(self) -> Tensor:
        return (self.counts - 1).clamp_(min=0).reciprocal_()

    @cached_property
    def _inverse_deviations(self) -> Tensor:
        return torch.threshold(self._products[:, 1], 0.25, torch.nan).reciprocal_()


def trailing_windows(values: Tensor, window: int, fill: float) -> Tensor:
    """Return a view `[S, window, D, n]`: the last rows up to each row, the oldest first.

    Rows before the first one are `fill`. The rows overlap in memory, so the view is read only.
    """
    s, d, n = values.shape
    padded = values.new_full((s, window - 1 + d, n), fill)
    padded[:, window - 1 :] = values
    stride = padded.stride(0)
    return padded.as_strided((s, window, d, n), (stride, n, n, 1))
