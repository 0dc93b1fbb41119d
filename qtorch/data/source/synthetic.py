"""A simulated market whose predictable signal is known exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.dates import as_stamp, date_rows, last_date
from qtorch.core.errors import ConfigError
from qtorch.core.identity import digest
from qtorch.data.panel.panel import Panel
from qtorch.data.source.base import Membership
from qtorch.data.source.frame import PanelSource, mask_membership, span_membership

Array: TypeAlias = np.ndarray

BENCHMARK = "MARKET"
UNIVERSES = ("all", "liquid", "stocks")
FIELDS = ("open", "high", "low", "close", "volume", "vwap", "factor", "change")

# Default weights of the two parts of the signal (the recent return and the return of the last 60
# days), the weight of yesterday in the recent return, and the lengths of the two windows.
WEIGHTS = (-0.8, 0.6)
SECOND_DAY = 0.5
VOLUME_WINDOW, MOMENTUM_WINDOW = 20, 60


@dataclass(frozen=True)
class Shocks:
    """Returns and volume before any drift is added; all arrays are `[D, N]`.

    `sigma` is the standard deviation of the instrument's idiosyncratic return; the value of a
    day is known on the day before.
    """

    returns: Array
    sigma: Array
    volume: Array


@dataclass(frozen=True)
class Life:
    """The days on which each instrument is listed and is traded; `[D, N]` bool."""

    is_listed: Array
    is_traded: Array


def garch(
    rng: np.random.Generator, shape: tuple[int, int], *, df: float, arch: float
) -> tuple[Array, Array]:
    """Draw GARCH(1,1) paths: `(innovations, conditional standard deviation)`, both `[D, K]`.

    Innovations have volatility clustering and fat tails (Student t shocks with `df` degrees of
    freedom). Persistence is 0.985 and the long-run variance is one: the variance of a day is
    0.015 + arch * last square + (0.985 - arch) * last variance. Bollerslev (1986).
    """
    num_dates, width = shape
    shocks = rng.standard_t(df, size=shape) * np.sqrt((df - 2) / df)
    variance = np.exp(rng.normal(-0.15, 0.5, width))
    out, deviation = np.empty(shape), np.empty(shape)
    for t in range(num_dates):
        deviation[t] = np.sqrt(variance)
        out[t] = deviation[t] * shocks[t]
        # Cap the square so that a single extreme day does not inflate the variance for months.
        variance = 0.015 + arch * np.minimum(out[t] ** 2, 16.0) + (0.985 - arch) * variance
    return out, deviation


def ar1_paths(
    rng: np.random.Generator, shape: tuple[int, int], *, persistence: float, deviation: float
) -> Array:
    """Draw stationary AR(1) paths `[D, K]` with standard deviation `deviation`."""
    paths = rng.normal(0, deviation * np.sqrt(1 - persistence**2), shape)
    paths[0] = rng.normal(0, deviation, shape[1])
    for t in range(1, shape[0]):
        paths[t] += persistence * paths[t - 1]
    return paths


def draw_shocks(rng: np.random.Generator, num_dates: int, num: int, num_sectors: int) -> Shocks:
    """Draw returns from a factor model, without drift, and the volume that belongs to them.

    Calm years and crises come from one slow AR(1) path that scales all volatilities.
    """
    volatility = np.exp(ar1_paths(rng, (num_dates, 1), persistence=0.99, deviation=0.4) - 0.08)
    market = volatility * garch(rng, (num_dates, 1), df=7, arch=0.11)[0]
    sectors = volatility * garch(rng, (num_dates, num_sectors), df=7, arch=0.09)[0]
    residual, deviation = garch(rng, (num_dates, num), df=4.5, arch=0.11)
    beta = rng.normal(1.0, 0.25, num).clip(0.3, 1.9)
    sector = rng.integers(0, num_sectors, num)
    loading = rng.uniform(0.6, 1.4, num)
    level = np.exp(rng.normal(np.log(0.0145), 0.3, num)).clip(0.007, 0.035)
    sigma = level * np.sqrt(volatility)
    returns = (
        0.0003 + 0.0085 * beta * market + 0.0055 * loading * sectors[:, sector] + sigma * residual
    )
    return Shocks(returns, sigma * deviation, _draw_volume(rng, residual, market))


def _draw_volume(rng: np.random.Generator, residual: Array, market: Array) -> Array:
    """Draw volumes in shares: a level, a slow AR(1) path, and more on days of large moves."""
    level = rng.normal(13.5, 1.1, residual.shape[1])
    slow = ar1_paths(rng, residual.shape, persistence=0.96, deviation=0.32)
    activity = 0.25 * (np.abs(residual) - 0.75).clip(-0.75, 6.0) + 0.1 * (np.abs(market) - 0.75)
    volume: Array = np.exp(level + slow + activity + rng.normal(0, 0.2, residual.shape))
    return volume


def draw_life(rng: np.random.Generator, num_dates: int, num: int) -> Life:
    """Draw late listings (1/6), delistings (1/12), and suspensions of a day to eight weeks."""
    first = np.zeros(num, dtype=np.int64)
    last = np.full(num, num_dates - 1)
    is_late = rng.random(num) < 1 / 6
    first[is_late] = (rng.uniform(0.03, 0.75, num) * num_dates).astype(np.int64)[is_late]
    is_delisted = rng.random(num) < 1 / 12
    stop = first + (rng.uniform(0.25, 0.98, num) * (num_dates - first)).astype(np.int64)
    last[is_delisted] = stop[is_delisted]
    days = np.arange(num_dates)[:, None]
    is_listed = (days >= first) & (days <= last)
    is_suspended = np.zeros((num_dates, num), dtype=bool)
    for column in rng.integers(0, num, rng.poisson(0.3 * num * num_dates / 252)):
        start = int(rng.integers(0, num_dates))
        is_suspended[start : start + min(1 + int(rng.geometric(0.15)), 40), column] = True
    # An instrument's listed span is defined by its first and last bar, so both days must trade.
    is_suspended[first, np.arange(num)] = False
    is_suspended[last, np.arange(num)] = False
    return Life(is_listed, is_listed & ~is_suspended)


def add_drift(
    shocks: Shocks, life: Life, strength: float, weights: Array | None = None
) -> tuple[Array, Array]:
    """Return `(log returns, score)`, both `[D, N]`, where the score of day t is a drift at t+2.

    The score at the close of t shifts the return from the close of t+1 to the close of t+2, which
    is what the label `Ref($close,-2)/Ref($close,-1)-1` of day t measures. The drift is
    `strength * sigma * score`. `weights [D, 2]` are the daily weights of the score's two parts;
    by default `WEIGHTS` on all days.
    """
    num_dates, num = shocks.returns.shape
    if weights is None:
        weights = np.tile(WEIGHTS, (num_dates, 1))
    returns = np.zeros((num_dates, num))
    score = np.zeros((num_dates, num))
    volume_ratio = relative_volume(shocks.volume, life)
    drift = strength * shocks.sigma
    age = np.cumsum(life.is_listed, axis=0)
    path = np.zeros((num_dates + 1, num))
    for t in range(num_dates):
        returns[t] = shocks.returns[t] + (drift[t] * score[t - 2] if t >= 2 else 0.0)
        returns[t] *= age[t] > 1
        path[t + 1] = path[t] + returns[t]
        recent_return = returns[t] + (SECOND_DAY * returns[t - 1] if t else 0.0)
        start = max(t + 1 - MOMENTUM_WINDOW, 0)
        momentum = (path[t + 1] - path[start]) * (age[t] > MOMENTUM_WINDOW)
        is_traded = life.is_traded[t]
        parts = weights[t, 0] * standardize(recent_return * volume_ratio[t], is_traded)
        parts += weights[t, 1] * standardize(momentum, is_traded & (age[t] > MOMENTUM_WINDOW))
        score[t] = standardize(parts, is_traded)
    return returns, score


def standardize(values: Array, mask: Array) -> Array:
    """Compute z-scores of one day's cross-section, clipped to -3..3; zero outside `mask`."""
    count = np.count_nonzero(mask)
    if count < 2:
        return np.zeros_like(values)
    deviations = np.where(mask, values - (values @ mask) / count, 0.0)
    spread = np.sqrt((deviations @ deviations) / count)
    scores: Array = (deviations / max(spread, 1e-12)).clip(-3.0, 3.0)
    return scores


def relative_volume(volume: Array, life: Life) -> Array:
    """Divide the volume by its mean over the last 20 days, clipped to 0.2..4; `[D, N]`."""
    traded_volume = np.where(life.is_traded, volume, 0.0)
    totals = np.cumsum(np.vstack([np.zeros_like(traded_volume[:1]), traded_volume]), axis=0)
    counts = np.cumsum(np.vstack([np.zeros_like(traded_volume[:1]), life.is_traded]), axis=0)
    start = np.maximum(np.arange(len(traded_volume)) + 1 - VOLUME_WINDOW, 0)
    mean = (totals[1:] - totals[start]) / np.maximum(counts[1:] - counts[start], 1)
    return (volume / np.where(mean > 0, mean, volume)).clip(0.2, 4.0)


def draw_bars(rng: np.random.Generator, returns: Array, sigma: Array) -> dict[str, Array]:
    """Draw open, high, low, close and vwap for log returns; prices start at a level of 1.

    Part of each return happens overnight. The range of a day is that of a Brownian bridge from
    open to close (its maximum and minimum have a closed form), so that open, close and vwap lie
    between low and high.
    """
    shape = returns.shape
    close = np.cumsum(returns, axis=0)
    overnight = 0.3 * returns + 0.25 * sigma * rng.standard_normal(shape)
    start = close - returns + overnight
    intraday = close - start
    # A quiet day in a volatile month has a small range, so the range also depends on the move.
    variance = (0.65 * sigma + 0.35 * np.abs(intraday)) ** 2
    up = np.sqrt(intraday**2 - 2 * variance * np.log(rng.uniform(1e-9, 1.0, shape)))
    down = np.sqrt(intraday**2 - 2 * variance * np.log(rng.uniform(1e-9, 1.0, shape)))
    middle = (start + close) / 2
    bars = {
        "open": start,
        "high": middle + up / 2,
        "low": middle - down / 2,
        "close": close,
    }
    bars = {name: np.exp(values) for name, values in bars.items()}
    weight = rng.uniform(0.3, 0.7, shape)
    bars["vwap"] = weight * (bars["open"] + bars["close"]) / 2
    bars["vwap"] += (1 - weight) * (bars["high"] + bars["low"]) / 2
    return bars


def split_factor(close: Array, is_listed: Array) -> Array:
    """Compute the adjustment factor `[D, N]`: 1 at listing, doubled at every 2:1 split.

    A company splits its shares when the raw price exceeds 160, and does a 1:4 reverse split when
    the raw price falls below 4. Adjusted prices do not jump; the raw price (price / factor) does.
    """
    factor = np.ones_like(close)
    current = np.ones(close.shape[1])
    for t in range(1, len(close)):
        raw = close[t - 1] / current
        current = np.where(is_listed[t] & (raw > 160), current * 2, current)
        current = np.where(is_listed[t] & (raw < 4), current / 4, current)
        factor[t] = current
    return factor


def liquid_members(turnover: Array, is_listed: Array, size: int, period: int = 63) -> Array:
    """Select the `size` instruments with the largest turnover each quarter: `[D, N]` bool.

    The selection uses only the turnover of the previous quarter, so the members of a day are
    known on the day before. The first quarter is selected by its own first day.
    """
    member = np.zeros(is_listed.shape, dtype=bool)
    for start in range(0, len(turnover), period):
        past_turnover = turnover[max(start - period, 0) : max(start, 1)]
        counts = np.maximum(np.count_nonzero(past_turnover, axis=0), 1)
        score = np.where(is_listed[max(start - 1, 0)], past_turnover.sum(0) / counts, -1.0)
        columns = np.argsort(-score, kind="stable")[:size]
        member[start : start + period, columns[score[columns] > 0]] = True
    member &= is_listed
    return member


class _Market(NamedTuple):
    panel: Panel
    score: Tensor
    memberships: dict[str, Membership]


class SyntheticSource(PanelSource):
    """A seeded, simulated market of daily bars with a weak, known signal.

    Log returns are beta x market + loading x sector + idiosyncratic return, each a GARCH(1,1)
    with Student t shocks. Some instruments are listed late, delisted, or suspended for days (NaN
    rows). Splits appear in `factor` as in Qlib (price = raw price x factor). The benchmark
    `MARKET` is the equal-weighted index of the stocks.

    Universes: `stocks` (without the benchmark; use it for training), `all` (with the benchmark,
    as in Qlib's data), and `liquid` (the two thirds of the stocks with the largest turnover,
    selected every quarter, so that its spans have entries and exits).

    The signal of day t, known at its close, is a cross-sectional z-score of two parts: the
    return of the last two days multiplied by the volume relative to its 20-day mean (rewarded by
    reversal), and the return of the last 60 days. It is the drift of the return from t+1 to t+2,
    which is what the label `Ref($close,-2)/Ref($close,-1)-1` of day t measures. Features of
    Alpha158 such as ROC60, RESI5, KMID and VMA20 contain it.

    `signal` is its strength: the drift for one unit of score, in units of the instrument's
    idiosyncratic standard deviation. It is approximately the mean Rank IC of the true score with
    the label: at the default 0.06 the mean is 0.0593 over 40 seeds of six years (standard
    deviation 0.0021, and 0.0053 for the mean of one year). With 0 there is no signal.
    `signal_scores()` returns the true score and `signal_rank_ic()` its Rank IC by day, the upper
    limit for any model, luck aside. Least squares on the 20 features of Qlib's LSTM example
    reach 90% of it.

    `regimes` change the direction of the signal: the weights of the two parts by date, `{date:
    [recent return, 60-day return]}`, which hold from the close of that date on. Before the first
    date they are -0.8 (reversal) and 0.6 (momentum). Only their ratio matters, because the score
    is standardized, so the strength and the Rank IC of the signal do not change.
    """

    freq = "day"

    def __init__(
        self,
        num_instruments: int = 300,
        start_time: str = "2015-01-01",
        end_time: str = "2020-12-31",
        *,
        seed: int = 0,
        signal: float = 0.06,
        num_sectors: int = 10,
        regimes: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        for name, value in (("num_instruments", num_instruments), ("num_sectors", num_sectors)):
            if value < 1:
                raise ConfigError(f"SyntheticSource: {name} must be at least 1, got {value}.")
        if not 0 <= signal <= 0.5:
            raise ConfigError(f"SyntheticSource: signal must be between 0 and 0.5, got {signal}.")
        self.num_instruments = num_instruments
        self.seed = seed
        self.signal = signal
        self.num_sectors = num_sectors
        self._dates = pd.bdate_range(as_stamp(start_time), last_date(end_time)).as_unit("ns")
        if len(self._dates) < 2:
            raise ConfigError(
                f"SyntheticSource: {start_time}..{end_time} has {len(self._dates)} business "
                "days; at least 2 are needed."
            )
        self.regimes = dict(regimes or {})
        _signal_weights(self._dates, self.regimes)  # validate the regimes early
        self._cached_market: _Market | None = None

    def panel(self) -> Panel:
        return self._market().panel

    def memberships(self) -> Mapping[str, Membership]:
        return self._market().memberships

    @property
    def knows_names(self) -> bool:
        return type(self) is SyntheticSource  # a subclass may have others

    def read_calendar(self, freq: str) -> pd.DatetimeIndex:
        if not self.knows_names:
            return super().read_calendar(freq)
        self._check_frequency(freq)
        return self._dates

    def instrument_names(self) -> frozenset[str]:
        if not self.knows_names:
            return super().instrument_names()
        return frozenset([BENCHMARK, *self._stock_names()])

    def _stock_names(self) -> list[str]:
        num = self.num_instruments
        return [f"S{k:0{len(str(num - 1))}d}" for k in range(num)]

    def fields(self, freq: str | None = None) -> tuple[str, ...]:
        if not self.knows_names:
            return super().fields(freq)
        self._check_frequency(self.resolve_frequency(freq))
        return FIELDS

    def universes(self) -> tuple[str, ...]:
        return UNIVERSES if self.knows_names else super().universes()

    def fingerprint(self) -> str:
        """Hash what the market is simulated from, without simulating it."""
        if type(self) is not SyntheticSource:
            return super().fingerprint()  # a subclass may change the bars
        names = ("num_instruments", "seed", "signal", "num_sectors", "regimes")
        options = {name: getattr(self, name) for name in names}
        return digest([options, self._dates[0], self._dates[-1], np.__version__])

    def signal_scores(self) -> Panel:
        """Return the true score at each close as a panel `[D, N, 1]` with the field `score`.

        It covers the stocks, is standardized by day, and is NaN where an instrument has no bar.
        """
        market_data = self._market()
        stocks = list(market_data.memberships["stocks"])
        bars = market_data.panel.select(fields=["close"], instruments=stocks)
        return bars.replace(values=market_data.score[..., None], fields=["score"])

    def signal_rank_ic(
        self,
        start_time: str | None = None,
        end_time: str | None = None,
        *,
        universe: str = "stocks",
    ) -> pd.Series:
        """Compute the daily Spearman correlation of the true score and the label, members only."""
        bars, scores = self.load(["close"], instruments=universe), self.signal_scores()
        close, score = (
            pd.DataFrame(panel.column(field).double().numpy(), panel.calendar, panel.instruments)
            for panel, field in ((bars, "close"), (scores, "score"))
        )
        label = (close.shift(-2) / close.shift(-1) - 1).where(bars.mask.numpy())
        label, score = label.align(score, join="inner", axis=1)
        label, score = label.where(score.notna()), score.where(label.notna())
        ic = label.rank(axis=1).corrwith(score.rank(axis=1), axis=1)
        return ic[date_rows(bars.calendar, start_time, end_time)].dropna().rename("rank_ic")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the market, which can be simulated again from the seed."""
        return {**self.__dict__, "_cached_market": None}

    def _market(self) -> _Market:
        if self._cached_market is None:
            self._cached_market = self._build_market()
        return self._cached_market

    def _build_market(self) -> _Market:
        num, num_dates = self.num_instruments, len(self._dates)
        # Independent random streams, so that `signal` changes the drift and nothing else.
        streams = np.random.default_rng(self.seed).spawn(4)
        shocks = draw_shocks(streams[0], num_dates, num, self.num_sectors)
        life = draw_life(streams[1], num_dates, num)
        weights = _signal_weights(self._dates, self.regimes)
        returns, score = add_drift(shocks, life, self.signal, weights)
        bars = draw_bars(streams[2], returns, shocks.sigma)
        level = np.exp(streams[3].normal(np.log(40.0), 0.6, num)).clip(8.0, 150.0)
        prices = {name: values * level for name, values in bars.items()}
        stocks = _stock_fields(prices, shocks.volume, life)
        index = _benchmark(stocks, life)
        names = self._stock_names()
        turnover = np.nan_to_num(stocks["volume"] * stocks["vwap"])
        is_liquid = liquid_members(turnover, life.is_listed, max(1, (2 * num) // 3))
        panel = _panel(stocks, index, life, self._dates, names)
        all_spans = span_membership(panel)
        liquid_panel = panel.select(instruments=names)
        liquid_panel.mask = torch.from_numpy(is_liquid)
        memberships = {
            "all": all_spans,
            "stocks": {n: all_spans[n] for n in names},
            "liquid": mask_membership(liquid_panel),
        }
        true_score = torch.from_numpy(np.where(life.is_traded, score, np.nan).astype(np.float32))
        return _Market(panel, true_score, memberships)


def _signal_weights(dates: pd.DatetimeIndex, regimes: Mapping[str, Sequence[float]]) -> Array:
    """Return the daily weights `[D, 2]` of the signal's parts; ConfigError for invalid regimes."""
    out = np.tile(WEIGHTS, (len(dates), 1))
    try:
        starts = sorted((pd.Timestamp(date), weights) for date, weights in regimes.items())
        for start, weights in starts:
            recent, momentum = (float(weight) for weight in weights)
            if not 0 < recent**2 + momentum**2 < np.inf:
                raise ValueError(f"the weights of {start.date()} are {recent:g} and {momentum:g}")
            out[dates >= start] = recent, momentum
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"SyntheticSource: regimes is {dict(regimes)}; expected two weights by date, e.g. "
            f"{{'2015-01-01': [-0.8, -0.6]}} ({error})."
        ) from error
    return out


def _stock_fields(prices: dict[str, Array], volume: Array, life: Life) -> dict[str, Array]:
    """Return all fields of the stocks, NaN on days without trading."""
    factor = split_factor(prices["close"], life.is_listed)
    out = {**prices, "volume": np.rint(volume * factor) / factor, "factor": factor}
    out = {name: np.where(life.is_traded, values, np.nan) for name, values in out.items()}
    last_close = pd.DataFrame(out["close"]).ffill().shift(1).to_numpy()
    out["change"] = out["close"] / last_close - 1
    return out


def _benchmark(stocks: dict[str, Array], life: Life) -> dict[str, Array]:
    """Return the fields of the equal-weighted index: compounded mean moves from the last close.

    The members do not reach their highs and lows at the same time, so the index keeps only half
    of their mean range.
    """
    last_close = stocks["close"] / (1 + stocks["change"])
    is_included = ~np.isnan(last_close)
    count = np.maximum(is_included.sum(1), 1)
    moves = {
        name: np.where(is_included, stocks[name] / last_close - 1, 0.0).sum(1) / count
        for name in ("open", "high", "low", "close", "vwap")
    }
    top = np.maximum(moves["open"], moves["close"])
    bottom = np.minimum(moves["open"], moves["close"])
    moves["high"] = top + 0.5 * (moves["high"] - top)
    moves["low"] = bottom + 0.5 * (moves["low"] - bottom)
    moves["vwap"] = moves["vwap"].clip(moves["low"], moves["high"])
    level = 1000 * np.cumprod(1 + moves["close"])
    previous_level = np.concatenate([[1000.0], level[:-1]])
    index = {name: previous_level * (1 + move) for name, move in moves.items()}
    index["volume"] = np.nansum(stocks["volume"] * stocks["vwap"], axis=1) / level
    index["factor"] = np.ones(len(level))
    index["change"] = np.where(np.arange(len(level)) > 0, moves["close"], np.nan)
    return index


def _panel(
    stocks: dict[str, Array],
    index: dict[str, Array],
    life: Life,
    dates: pd.DatetimeIndex,
    names: list[str],
) -> Panel:
    """Combine stocks and benchmark; the benchmark's name comes first in ascending order."""
    num_dates, num = life.is_listed.shape
    values = torch.empty((len(FIELDS), num_dates, num + 1))
    for k, field in enumerate(FIELDS):
        values[k, :, 0] = torch.from_numpy(index[field])
        values[k, :, 1:] = torch.from_numpy(stocks[field])
    first = np.concatenate([[0], life.is_listed.argmax(0)])
    last = num_dates - 1 - np.concatenate([[0], life.is_listed[::-1].argmax(0)])
    spans = torch.from_numpy(np.stack([first, last], 1))
    return Panel(values.permute(1, 2, 0), dates, [BENCHMARK, *names], FIELDS, spans=spans)
