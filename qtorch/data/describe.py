"""Data quality report: dates, instruments, gaps and suspicious values, as text and as a figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qtorch.data.panel.panel import Panel
from qtorch.data.source.base import Instruments, Source
from qtorch.data.source.frame import as_source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGE_MOVE = 0.5
STALE_DAYS = 10
# A day counts as broken if more than this share of its bars lack a field.
BROKEN_DAY = 0.5
_POSITIVE = ("open", "high", "low", "close", "vwap", "factor")
_EXAMPLES = 5


@dataclass(frozen=True)
class Description:
    """The result of `describe`. Rows are the days on which an instrument is listed and a member.

    Frames are sorted worst first. `bars [D, N]` holds a code per cell: 0 not listed or not a
    member, 1 a bar, 2 suspended (listed, but no price). `index` is the equal-weighted index of the
    members' returns, starting at 1.
    """

    freq: str
    calendar: pd.DatetimeIndex
    instruments: pd.Index
    fields: tuple[str, ...]
    universes: dict[str, int]
    num_rows: int
    missing: dict[str, float]
    num_listed_late: int
    num_delisted: int
    suspensions: pd.DataFrame
    calendar_gaps: pd.DataFrame
    moves: pd.DataFrame
    broken_days: pd.DataFrame
    zeros: dict[str, int]
    negative: dict[str, int]
    infinite: dict[str, int]
    out_of_range: int
    stale: pd.DataFrame
    duplicate_pairs: list[tuple[str, str]]
    bars: np.ndarray
    index: pd.Series

    def text(self) -> str:
        """Return the findings, one per line; checks without findings are left out."""
        return "\n".join((*self._overview_lines(), *self._gap_lines(), *self._suspicious_lines()))

    def _overview_lines(self) -> list[str]:
        d, n = self.bars.shape
        first, last = (_format_day(self.calendar[k]) for k in (0, -1))
        universes = ", ".join(f"{name} {count}" for name, count in self.universes.items())
        listings = (
            f"{self.num_listed_late} listed after the first date, "
            f"{self.num_delisted} delisted before the last"
        )
        return [
            f"{n:,} instruments, {d:,} dates {first} .. {last} ({self.freq}), "
            f"{self.num_rows:,} rows",
            f"fields      {', '.join(self.fields)}",
            f"universes   {universes}",
            f"listings    {listings}",
        ]

    def _gap_lines(self) -> list[str]:
        shares = ", ".join(f"{f} {share:.2%}" for f, share in self.missing.items() if share > 0)
        lines = [f"missing     {shares or 'none'}"]
        if len(self.suspensions):
            days, worst = int(self.suspensions["days"].sum()), self.suspensions.iloc[0]
            lines.append(
                f"suspended   {days:,} rows in {len(self.suspensions):,} gaps of "
                f"{self.suspensions['instrument'].nunique():,} instruments; the longest "
                f"{worst['days']} ({worst['instrument']} from {_format_day(worst['start'])})"
            )
        if len(self.calendar_gaps):
            examples = _join_examples(
                self.calendar_gaps, lambda r: f"{r.days} days after {_format_day(r.after)}"
            )
            lines.append(f"calendar    gaps: {examples}")
        if len(self.broken_days):
            examples = _join_examples(
                self.broken_days, lambda r: f"{_format_day(r.datetime)} {r.field} {r.missing:.1%}"
            )
            lines.append(f"broken days {len(self.broken_days)} miss most of a field: {examples}")
        return lines

    def _suspicious_lines(self) -> list[str]:
        lines = []
        if len(self.moves):
            examples = _join_examples(
                self.moves, lambda r: f"{r.instrument} {_format_day(r.datetime)} {r.move:+.0%}"
            )
            lines.append(f"large moves {len(self.moves)} beyond {LARGE_MOVE:.0%}: {examples}")
        lines += [
            f"{name:<11} {', '.join(f'{f} {c:,}' for f, c in counts.items())}"
            for name in ("zeros", "negative", "infinite")
            if (counts := getattr(self, name))
        ]
        if self.out_of_range:
            lines.append(
                f"bars        {self.out_of_range:,} with open or close outside low .. high"
            )
        if len(self.stale):
            examples = _join_examples(
                self.stale, lambda r: f"{r.instrument} {r.days} until {_format_day(r.end)}"
            )
            lines.append(f"stale       {len(self.stale)} runs of an unchanged price: {examples}")
        if self.duplicate_pairs:
            examples = _join_examples(
                pd.DataFrame(self.duplicate_pairs, columns=["left", "right"]),
                lambda r: f"{r.left} = {r.right}",
            )
            lines.append(f"duplicates  equal closes: {examples}")
        return lines

    def plot(self) -> Figure:
        """Plot coverage over time, the map of missing bars and the market index as one figure."""
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 9), layout="constrained")
        top, middle, bottom = figure.subplots(3, 1, height_ratios=[1, 2, 1.4])
        dates = self.calendar
        top.fill_between(dates, (self.bars > 0).sum(1), color="#d98c5f", label="listed members")
        top.fill_between(dates, (self.bars == 1).sum(1), color="#4c78a8", label="with a bar")
        top.set(ylabel="instruments", ylim=(0, None), xlim=(dates[0], dates[-1]))
        top.legend(loc="lower right", fontsize=8)
        top.set_title(
            f"{self.bars.shape[1]:,} instruments, "
            f"{_format_day(dates[0])} .. {_format_day(dates[-1])}, {self.num_rows:,} rows"
        )
        first = np.where((self.bars > 0).any(0), (self.bars > 0).argmax(0), len(dates))
        order = np.argsort(first, kind="stable")
        middle.imshow(
            _max_pool(self.bars[:, order].T),
            aspect="auto",
            interpolation="nearest",
            cmap=ListedColormap(["#f2f2f2", "#4c78a8", "#d98c5f"]),
            vmin=0,
            vmax=2,
            extent=(0, 1, len(order), 0),
        )
        middle.set(ylabel="instruments by first day", xticks=[])
        middle.set_xlabel("blue: a bar; orange: suspended; grey: not listed or not a member")
        bottom.plot(dates, self.index, color="#333333", linewidth=1)
        bottom.set(
            ylabel="equal-weighted index (first = 1, log)", yscale="log", xlim=(dates[0], dates[-1])
        )
        bottom.yaxis.set_major_formatter("{x:.3g}")
        bottom.yaxis.set_minor_formatter("{x:.3g}")
        bottom.tick_params(axis="y", which="both", labelsize=8)
        bottom.grid(alpha=0.3)
        return figure


def describe(
    data: Source | Panel | pd.DataFrame,
    *,
    universe: Instruments = "all",
    start_time: Any = None,
    end_time: Any = None,
    freq: str | None = None,
) -> Description:
    """Check the quality of a source, a Panel or a `(datetime, instrument)` frame.

    Prices are checked on `close`, or on the first field if there is no close. The data is not
    changed.
    """
    source = as_source(data)
    freq = source.resolve_frequency(freq)
    panel = source.load(instruments=universe, start_time=start_time, end_time=end_time, freq=freq)
    mask = panel.mask.numpy()
    columns = {f: np.where(mask, panel.column(f).numpy(), np.nan) for f in panel.fields}
    close = columns.get("close", columns[panel.fields[0]])
    bars = np.where(mask, np.where(np.isnan(close), 2, 1), 0).astype(np.int8)
    moves = _moves(close)
    count = max(int(mask.sum()), 1)
    is_listed = mask.any(0)
    return Description(
        freq=freq,
        calendar=panel.calendar,
        instruments=panel.instruments,
        fields=panel.fields,
        universes={name: len(members) for name, members in source.read_memberships().items()},
        num_rows=int(mask.sum()),
        missing={f: float((np.isnan(v) & mask).sum() / count) for f, v in columns.items()},
        num_listed_late=int((is_listed & ~mask[0]).sum()),
        num_delisted=int((is_listed & ~mask[-1]).sum()),
        suspensions=_suspensions(bars, panel),
        calendar_gaps=_calendar_gaps(panel.calendar),
        moves=_large_moves(moves, panel),
        broken_days=_find_broken_days(columns, bars == 1, panel),
        zeros=_counts({f: v == 0 for f, v in columns.items() if f != "change"}),
        negative=_counts({f: v < 0 for f, v in columns.items() if f in (*_POSITIVE, "volume")}),
        infinite=_counts({f: np.isinf(v) for f, v in columns.items()}),
        out_of_range=_out_of_range(columns),
        stale=_stale(moves, panel),
        duplicate_pairs=_duplicate_pairs(close, panel),
        bars=bars,
        index=_index(moves, panel.calendar),
    )


def _moves(close: np.ndarray) -> np.ndarray:
    """Return each bar's return since the last bar with a price, across suspended days."""
    prices = pd.DataFrame(close).where(close > 0)
    moves: np.ndarray = (prices / prices.ffill().shift(1) - 1).to_numpy()
    return moves


def _suspensions(bars: np.ndarray, panel: Panel) -> pd.DataFrame:
    """Find runs of listed days without a price."""
    gap = np.zeros((bars.shape[0] + 2, bars.shape[1]), dtype=np.int8)
    gap[1:-1] = bars == 2
    change = np.diff(gap, axis=0).T
    columns, starts = np.nonzero(change == 1)
    stops = np.nonzero(change == -1)[1]
    return _largest_first(
        "days",
        instrument=panel.instruments[columns],
        start=panel.calendar[starts],
        days=stops - starts,
    )


def _calendar_gaps(calendar: pd.DatetimeIndex) -> pd.DataFrame:
    """Find calendar steps that are far longer than the usual long ones (weekends, holidays)."""
    days = np.diff(calendar.asi8) / 86_400e9
    usual = max(float(np.quantile(days, 0.99)) + 2.0, 5.0) if len(days) else 5.0
    gap_rows = np.flatnonzero(days > usual)
    return _largest_first("days", after=calendar[gap_rows], days=days[gap_rows].astype(int))


def _large_moves(moves: np.ndarray, panel: Panel) -> pd.DataFrame:
    rows, columns = np.nonzero(np.abs(np.nan_to_num(moves)) > LARGE_MOVE)
    return _largest_first(
        "move",
        datetime=panel.calendar[rows],
        instrument=panel.instruments[columns],
        move=moves[rows, columns],
    )


def _find_broken_days(
    columns: dict[str, np.ndarray], has_bar: np.ndarray, panel: Panel
) -> pd.DataFrame:
    """Find days on which most bars lack a field that they usually have."""
    count = has_bar.sum(1)
    parts = []
    for field, values in columns.items():
        share = (np.isnan(values) & has_bar).sum(1) / np.maximum(count, 1)
        bad_rows = np.flatnonzero((share > BROKEN_DAY) & (count > 1))
        # A field that starts late or is always missing is not the fault of single days, nor is
        # the missing `change` of the first row.
        if len(bad_rows) <= max(3, 0.02 * len(share)):
            bad_rows = bad_rows[bad_rows > 0]
            dates, shares = panel.calendar[bad_rows], share[bad_rows]
            parts.append(pd.DataFrame({"datetime": dates, "field": field, "missing": shares}))
    return pd.concat(parts).sort_values("datetime", kind="stable", ignore_index=True)


def _out_of_range(columns: dict[str, np.ndarray]) -> int:
    """Count bars whose open or close is outside low..high beyond float32 rounding."""
    low, high = columns.get("low"), columns.get("high")
    if low is None or high is None:
        return 0
    wrong = low > high
    for field in ("open", "close"):
        if field in columns:
            slack = 1e-5 * np.abs(columns[field])
            wrong |= (columns[field] < low - slack) | (columns[field] > high + slack)
    return int(wrong.sum())


def _stale(moves: np.ndarray, panel: Panel) -> pd.DataFrame:
    """Find runs of at least ten bars with the same price."""
    run = np.zeros(moves.shape[1], dtype=np.int64)
    runs = np.zeros((len(moves) + 1, moves.shape[1]), dtype=np.int64)
    for t, move in enumerate(moves):
        run = np.where(move == 0, run + 1, 0)
        runs[t] = run
    ends, columns = np.nonzero((runs[:-1] >= STALE_DAYS - 1) & (runs[1:] == 0))
    return _largest_first(
        "days",
        instrument=panel.instruments[columns],
        end=panel.calendar[ends],
        days=runs[ends, columns] + 1,
    )


def _largest_first(by: str, **columns: Any) -> pd.DataFrame:
    """Build a frame, sorted by the absolute values of the column `by`."""
    return pd.DataFrame(columns).sort_values(
        by, key=np.abs, ascending=False, kind="stable", ignore_index=True
    )


def _duplicate_pairs(close: np.ndarray, panel: Panel) -> list[tuple[str, str]]:
    """Find pairs of instruments whose closes are equal on all days."""
    first_names: dict[bytes, str] = {}
    pairs = []
    for name, column in zip(panel.instruments, np.ascontiguousarray(close.T), strict=True):
        if np.isnan(column).all():
            continue
        first = first_names.setdefault(column.tobytes(), name)
        if first != name:
            pairs.append((first, name))
    return pairs


def _index(moves: np.ndarray, calendar: pd.DatetimeIndex) -> pd.Series:
    is_known = np.isfinite(moves)
    mean = np.where(is_known, moves, 0.0).sum(1) / np.maximum(is_known.sum(1), 1)
    return pd.Series(np.cumprod(1 + mean), calendar, name="index")


def _counts(masks: dict[str, np.ndarray]) -> dict[str, int]:
    return {f: int(cells.sum()) for f, cells in masks.items() if cells.any()}


def _max_pool(cells: np.ndarray, width: int = 800) -> np.ndarray:
    """Reduce cells `[N, D]` to at most `width` columns by maximum, so single days stay visible."""
    step = -(-cells.shape[1] // width)
    padded = np.pad(cells, ((0, 0), (0, -cells.shape[1] % step)))
    block_maxima: np.ndarray = padded.reshape(len(cells), -1, step).max(2)
    return block_maxima


def _format_day(stamp: Any) -> str:
    stamp = pd.Timestamp(stamp)
    return f"{stamp:%Y-%m-%d}" if stamp == stamp.normalize() else f"{stamp:%Y-%m-%d %H:%M}"


def _join_examples(rows: pd.DataFrame, describe_row: Callable[[Any], str]) -> str:
    examples = ", ".join(describe_row(row) for row in rows.head(_EXAMPLES).itertuples())
    return examples + (", ..." if len(rows) > _EXAMPLES else "")
