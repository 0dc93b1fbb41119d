"""The data of rolling operators: blocks of instruments, and series with cached rolling sums.

Operators on one series share its sums, and series with the same missing values share their counts
(`Rows`). The sums of all windows of a series are computed along one chain of windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qtorch.data.expression.parser import Field, field_name
from qtorch.data.panel.panel import Panel, within_spans
from qtorch.data.transfer import send_to_device


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
        spans = bars.spans[start:stop].cpu()
        first, last = spans[:, 0], spans[:, 1]
        self.is_full = bool(((first == 0) & (last == self.num_rows - 1)).all())
        self._tail = int(last.min()) + 1 if self.num_columns else self.num_rows
        self.spans = send_to_device(spans, self.device)
        self.first = self.spans[:, 0].contiguous()

    @cached_property
    def rows(self) -> Tensor:
        """The row numbers, `[D, 1]` float64."""
        return torch.arange(self.num_rows, dtype=torch.float64, device=self.device)[:, None]

    @cached_property
    def is_stored(self) -> Tensor:
        """Whether a row is within the instrument's span, `[D, n]` bool."""
        return within_spans(self.spans, self.num_rows)

    @cached_property
    def span_mask(self) -> Tensor:
        """0 within the spans and NaN outside, `[D, n]` float32; adding it is the fastest mask."""
        return torch.zeros(self.is_stored.shape, device=self.device).masked_fill_(
            ~self.is_stored, torch.nan
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
        """Set values `[..., D, n]` after the span to NaN in place, with `head` also before it."""
        if self.is_full:
            return values
        start = 0 if head else self._tail
        if start < self.num_rows:
            values[..., start:, :] += self.span_mask[start:]
        return values

    def as_numbers(self, values: Tensor) -> Tensor:
        """Convert conditions to 0 and 1 (NaN outside the spans); numbers stay as they are."""
        if values.dtype == torch.bool:
            return self.mask_outside_span(values.to(torch.float32), head=True)
        return values

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

    def load_all(self, fields: Sequence[Field]) -> Tensor:
        """Load several stored fields as a `[F, D, n]` tensor, as `load` does."""
        names = [field_name(field, self.bars.fields) for field in fields]
        columns = [self.bars.column(name)[:, self.start : self.stop] for name in names]
        return self.mask_outside_span(torch.stack(columns).to(torch.float32), head=True)


# -- rolling sums and extremes: each window is computed from shorter ones --------------------------


def rolling_sums(base: Tensor, windows: tuple[int, ...]) -> dict[int, Tensor]:
    """Compute rolling sums `[D, n]` by window, such as `S10[i] = S5[i] + S5[i - 5]`.

    Windows are clipped at the first row. `base` must not have NaN; `windows` are ascending, from
    1 to D rows. Adding shifted sums keeps the accuracy of float64, which differences of
    cumulative sums lose.
    """
    return _build_windows(base, windows, torch.add, overlap=False)


def rolling_extremes(base: Tensor, windows: tuple[int, ...], *, largest: bool) -> dict[int, Tensor]:
    """Compute rolling maxima or minima `[D, n]` by window, clipped at the first row.

    The two parts that a window is computed from may overlap.
    """
    return _build_windows(base, windows, torch.maximum if largest else torch.minimum, overlap=True)


def _build_windows(
    base: Tensor, windows: tuple[int, ...], join: Callable[..., Tensor], *, overlap: bool
) -> dict[int, Tensor]:
    results = {1: base}
    for link, unused_windows in _chain_links(windows, overlap):
        newer, older, shift = results[link.newer], results[link.older], link.shift
        result = torch.empty_like(base)
        join(newer[shift:], older[:-shift], out=result[shift:])
        result[:shift] = newer[:shift]
        results[link.window] = result
        for window in unused_windows:
            del results[window]
    return {w: results[w] for w in windows}


@lru_cache(maxsize=256)
def _chain_links(
    windows: tuple[int, ...], overlap: bool
) -> tuple[tuple[Link, tuple[int, ...]], ...]:
    """Return the links of the chain, each with the windows that are unused afterwards."""
    chain = window_chain(windows, overlap=overlap)
    links, live_windows = [], {1}
    for index, link in enumerate(chain):
        live_windows.add(link.window)
        later = {
            w for later_link in chain[index + 1 :] for w in (later_link.newer, later_link.older)
        }
        unused_windows = tuple(w for w in live_windows if w not in later and w not in windows)
        live_windows -= set(unused_windows)
        links.append((link, unused_windows))
    return tuple(links)


@dataclass(frozen=True)
class Link:
    """Computes window `window` from window `newer` and window `older` shifted by `shift` rows."""

    window: int
    newer: int
    older: int
    shift: int


def window_chain(windows: Iterable[int], *, overlap: bool = False) -> tuple[Link, ...]:
    """Return a short chain of links that computes all windows, starting with window 1.

    The two parts of a sum must be adjacent. If the parts may `overlap` (a maximum may include a
    row twice), any window can be computed from two copies of a window at least half as long.

        window_chain([5, 10]) -> 2 = 1 + 1, 4 = 2 + 2, 5 = 1 + 4, 10 = 5 + 5
    """
    available, links = {1}, []

    def add_window(window: int) -> None:
        if window in available:
            return
        if overlap:
            part = min((b for b in available if 2 * b >= window), default=0)
            if not part:
                add_window((window + 1) // 2)
                part = min(b for b in available if 2 * b >= window)
            links.append(Link(window, part, part, window - part))
        else:
            newer, older = _split_window(window, available)
            add_window(newer)
            add_window(older)
            links.append(Link(window, newer, older, newer))
        available.add(window)

    for window in sorted(set(windows)):
        add_window(window)
    return tuple(links)


def _split_window(window: int, available: set[int]) -> tuple[int, int]:
    """Split a window into two adjacent parts, preferring available windows."""
    for part in sorted(available, reverse=True):
        if window - part in available:
            return part, window - part
    if window % 2 == 0:
        return window // 2, window // 2
    largest = max((b for b in available if window < 2 * b < 2 * window), default=0)
    if largest:
        return window - largest, largest
    return 1, window - 1


# -- series ----------------------------------------------------------------------------------------


class _WindowCache:
    """Base class of objects with results by window that are computed when first used."""

    def __init__(self) -> None:
        self._results: dict[str, dict[int, Tensor]] = {}

    def compute_windows(
        self, family: str, compute: Callable[[], dict[int, Tensor]]
    ) -> dict[int, Tensor]:
        """Return the results of all windows of a family, computing them together."""
        if family not in self._results:
            self._results[family] = compute()
        return self._results[family]


def _cache_by_window(method: Callable[[Any, int], Tensor]) -> Callable[[Any, int], Tensor]:
    """Let a method of a `_WindowCache` compute the result of each window only once."""

    @wraps(method)
    def compute_once(self: _WindowCache, window: int) -> Tensor:
        results = self._results.setdefault(method.__name__, {})
        if window not in results:
            results[window] = method(self, window)
        return results[window]

    return compute_once


class Rows(_WindowCache):
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
        super().__init__()
        self.block, self.num_leading_nans, self.is_dense = block, num_leading_nans, valid is None
        self.windows, self._valid = windows, valid

    def matches(self, num_leading_nans: int, valid: Tensor | None) -> bool:
        """Whether the valid cells equal the given ones."""
        if valid is None or self._valid is None:
            return valid is self._valid and num_leading_nans == self.num_leading_nans
        return torch.equal(valid, self._valid)

    @property
    def has_missing(self) -> bool:
        """Whether any cell has no value."""
        return not self.is_dense or self.num_leading_nans > 0

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
        result[: self.num_leading_nans] = torch.nan
        return result

    def mask_empty(self, result: Tensor, window: int) -> Tensor:
        """Set `result` to NaN in place for windows without a value."""
        if self.is_dense:
            result[: self.num_leading_nans] = torch.nan
            return result
        if bool(self._sparse_count(window).amin() > 0):
            return result
        return result.add_(self._empty_mask(window))

    @_cache_by_window
    def _empty_mask(self, window: int) -> Tensor:
        return self._sparse_count(window).reciprocal() * 0

    # -- counts --------------------------------------------------------------------------------

    @_cache_by_window
    def count(self, window: int) -> Tensor:
        """Return the number of values in each window, float64 `[D, 1]` or `[D, n]`."""
        if self.is_dense:
            return (self.block.rows + (1 - self.num_leading_nans)).clamp_(min=0, max=window)
        return self._sparse_count(window).to(torch.float64)

    def _sparse_count(self, window: int) -> Tensor:
        counts = self.compute_windows("valid", lambda: rolling_sums(self.valid, self.windows))
        return counts[window]

    @_cache_by_window
    def inverse_count(self, window: int) -> Tensor:
        """Return 1 / count; infinite for an empty window, so that 0 times it is NaN."""
        return self.count(window).reciprocal()

    @_cache_by_window
    def inverse_dof(self, window: int) -> Tensor:
        """Return 1 / (count - 1) for variances; infinite for a single value."""
        return (self.count(window) - 1).reciprocal()

    # -- row numbers -----------------------------------------------------------------------------

    @_cache_by_window
    def mean_row(self, window: int) -> Tensor:
        """Return the mean row number of the rows with a value."""
        if self.is_dense:
            return self.block.rows - (self.count(window) - 1) / 2
        return self._row_power_sum(1, window) * self.inverse_count(window)

    @_cache_by_window
    def inverse_row_deviation(self, window: int) -> Tensor:
        """Return 1 / the sum of squared deviations of the row numbers; NaN for fewer than two."""
        if self.is_dense:
            n = self.count(window)
            return torch.where(n > 1, 12 / (n * (n * n - 1)), torch.nan)
        squares, mean = self._row_power_sum(2, window), self.mean_row(window)
        deviation = torch.addcmul(squares, mean, self._row_power_sum(1, window), value=-1)
        # Two rows have a sum of at least 0.5; smaller numbers are rounding errors of 0.
        return torch.threshold(deviation, 0.25, torch.nan).reciprocal_()

    def _row_power_sum(self, power: int, window: int) -> Tensor:
        def compute() -> dict[int, Tensor]:
            base = self.valid.to(torch.float64) * self.block.rows**power
            return rolling_sums(base, self.windows)

        return self.compute_windows(f"row{power}", compute)[window]


def find_valid_cells(block: Block, values: Tensor) -> tuple[int, Tensor | None]:
    """Return `num_leading_nans` and `valid` of the `Rows` that belong to the values."""
    if values.dtype == torch.bool:
        return 0, None if block.is_full else block.is_stored.to(torch.float32)
    # 0 if finite, else NaN: one vectorized pass instead of the four of isfinite.
    zero_or_nan = values * 0
    num_missing = int(zero_or_nan[:, :1].isnan().cummin(0).values.sum()) if len(zero_or_nan) else 0
    if bool(zero_or_nan[num_missing:].sum() == 0) and bool(zero_or_nan[:num_missing].isnan().all()):
        return num_missing, None
    return 0, torch.nan_to_num_(zero_or_nan.to(torch.float32).add_(1), nan=0.0)


GetWindows: TypeAlias = Callable[..., tuple[int, ...]]
"""Returns the windows that the plan needs for the given families of sums (default: all)."""
GetRows: TypeAlias = Callable[[Tensor], Rows]

# A sum of squared deviations below this multiple of the sum of squares is a rounding error.
_ROUNDING = 1e-15
# A difference of two sums below this fraction of them has lost too many of its 16 digits, e.g. for
# prices of 60000 that move by 0.01. Such windows get a second pass around their own mean.
_MIN_DIFFERENCE = 1e-8
_NARROW_MOVES = 4  # consecutive small moves that mark the end of a narrow window
_MANY_CELLS = 0.02  # fraction of cells above which all cells are checked at once
_SECOND_PASS_SIZE = 2**20  # values that the second pass gathers at once


class Series(_WindowCache):
    """The values of a step and their rolling sums, which are computed when first used.

    Sums are float64; sums of conditions are float32, which counts exactly.
    """

    def __init__(
        self, block: Block, values: Tensor, get_windows: GetWindows, get_rows: GetRows
    ) -> None:
        super().__init__()
        self.block, self.values = block, values
        self._get_windows, self._get_rows = get_windows, get_rows
        self.quantiles: dict[tuple[int, float], Tensor] | None = None
        self._row_codeviations: dict[int, list[tuple[Tensor, Tensor]]] = {}

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
        return self.values + self.values * 0 if self.rows.has_missing else self.values

    # -- sums ----------------------------------------------------------------------------------

    def sum(self, family: str, window: int) -> Tensor:
        """Return the rolling sum of a family: sum, square, or position (row number x value)."""
        sums = self.compute_windows(
            family, lambda: rolling_sums(self.base(family), self.windows(family))
        )
        return sums[window]

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

    @_cache_by_window
    def variance(self, window: int) -> Tensor:
        """Return the variance (n - 1) in float64: NaN for under two values, 0 on flat windows."""
        total, squares = self.sum("sum", window).to(torch.float64), self.sum("square", window)
        mean_part = (total * total).mul_(self.rows.inverse_count(window))
        deviation = torch.sub(squares, mean_part, out=mean_part).clamp_(min=0)
        for cells in find_cancelled_cells(deviation, squares, window, self):
            deviation.view(-1)[cells] = self.gather_deviations(cells, window).square_().sum(1)
        return deviation.mul_(self.rows.inverse_dof(window))

    @_cache_by_window
    def variance_or_nan(self, window: int) -> Tensor:
        """Return the variance, or NaN for deviations up to 2e-5, as in Qlib's Corr and Rsquare."""
        return torch.threshold(self.variance(window), 4e-10, torch.nan)

    def row_codeviation(self, window: int) -> Tensor:
        """Return the sum of the products of the deviations of values and row numbers, float64.

        Rows without a value still count in the row numbers of later rows. The tensor is new at each
        call, so that the caller may work in place; only the second pass is kept.
        """
        total, position = self.sum("sum", window), self.sum("position", window)
        codeviation = torch.addcmul(position, self.rows.mean_row(window), total, value=-1)
        if window not in self._row_codeviations:
            self._row_codeviations[window] = [
                (cells, self.gather_deviations(cells, window) @ self.block.rows[:window, 0])
                for cells in find_cancelled_cells(codeviation, position, window, self)
            ]
        for cells, values in self._row_codeviations[window]:
            codeviation.view(-1)[cells] = values
        return codeviation

    # -- second pass -----------------------------------------------------------------------------

    @cached_property
    def narrow_cells(self) -> Tensor:
        """Flat indices `[K]` of the rows after a few small moves, where a window may be narrow.

        A window whose squared deviations add up to 1e-8 of its squares has no move above 1.5e-4 *
        sqrt(window) of its values. Sums with row numbers lose more digits on long calendars.
        """
        windows = self.rows.windows
        values, num_rows = self.values_or_zero, self.block.num_rows
        limit = 1.5 * (_MIN_DIFFERENCE * windows[-1]) ** 0.5
        limit *= max(1.0, 3.5e-4 * num_rows / windows[0])
        is_small = torch.ones(values.shape, dtype=torch.bool, device=values.device)
        torch.le((values[1:] - values[:-1]).abs_(), values[1:].abs().mul_(limit), out=is_small[1:])
        if not self.rows.is_dense:
            is_missing = self.rows.valid == 0
            is_small |= is_missing
            is_small[1:] |= is_missing[:-1]
        elif self.rows.num_leading_nans < num_rows:
            is_small[self.rows.num_leading_nans] = True
        length, num_moves = 1, max(1, min(_NARROW_MOVES, windows[0] - 1))
        while length < num_moves:
            shift = min(length, num_moves - length)
            is_small[shift:] &= is_small[:-shift].clone()
            length += shift
        if not self.block.is_full:
            is_small &= self.block.is_stored
        return is_small.view(-1).nonzero()[:, 0]

    @cached_property
    def last_change(self) -> Tensor:
        """The last row up to each row where the value differs from that of the row before."""
        values = self.values_or_zero
        rows = self.block.rows.to(torch.int64)
        change = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
        change[1:] = torch.where(values[1:] != values[:-1], rows[1:], 0)
        return change.cummax(0).values

    def gather_deviations(self, cells: Tensor, window: int) -> Tensor:
        """Return the deviations `[K, window]` of the windows' values from their mean.

        Oldest first, in float64; 0 for rows without a value.
        """
        rows = cells[:, None] // self.block.num_columns - torch.arange(
            window - 1, -1, -1, device=cells.device
        )
        columns = (cells % self.block.num_columns)[:, None]
        stored_rows = rows.clamp(min=0)
        valid = self.rows.valid[stored_rows, columns].to(torch.float64) * (rows >= 0)
        values = self.values_or_zero[stored_rows, columns].to(torch.float64)
        # From the first value on, so that the deviations of a flat window are exactly 0.
        values -= values.gather(1, valid.argmax(1, keepdim=True))
        mean = (values * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
        return (values - mean).mul_(valid)


def find_cancelled_cells(
    difference: Tensor, total: Tensor, window: int, *series: Series
) -> Iterator[Tensor]:
    """Yield flat indices `[K]` of windows whose `difference` of two sums has lost its digits.

    `total [D, n]` is one of the sums over the windows of `series`. Where they are many, windows in
    which one of the series is flat are left out: their difference is zero up to rounding.
    """
    candidates = torch.cat([each.narrow_cells for each in series])
    if len(candidates) <= _MANY_CELLS * difference.numel():
        if not len(candidates):
            return
        parts = (values.reshape(-1)[candidates] for values in (difference, total))
        cells = candidates[_is_cancelled(*parts)]
    else:
        is_cancelled = _is_cancelled(difference, total)
        for each in series:
            is_cancelled &= each.last_change > each.block.rows - (window - 1)
        cells = is_cancelled.view(-1).nonzero()[:, 0]
    size = max(1, _SECOND_PASS_SIZE // window)
    for start in range(0, len(cells), size):
        yield cells[start : start + size]


def _is_cancelled(difference: Tensor, total: Tensor) -> Tensor:
    return difference.abs().mul_(1 / _MIN_DIFFERENCE) < total.abs()


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
        products = self._products[window]
        means = self.left.sum("sum", window).to(torch.float64) * self.right.sum("sum", window)
        means.mul_(self.left.rows.inverse_count(window))
        codeviation = torch.sub(products, means, out=means)
        sides = (self.left, self.right)
        for cells in find_cancelled_cells(codeviation, products, window, *sides):
            deviations = self.left.gather_deviations(cells, window)
            deviations *= self.right.gather_deviations(cells, window)
            codeviation.view(-1)[cells] = deviations.sum(1)
        return codeviation
