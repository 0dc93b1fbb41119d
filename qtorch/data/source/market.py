"""The arithmetic of the synthetic market: numpy arrays, dates down, instruments across."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray

# Weights of the planted signal's two parts (the recent return, the return of the last 60 days), and
# the windows that it looks back over.
WEIGHTS = (-0.8, 0.6)
SECOND_DAY = 0.5
VOLUME_WINDOW, MOMENTUM_WINDOW = 20, 60


@dataclass(frozen=True)
class Shocks:
    """What the market draws before any drift; all `[D, N]`.

    `sigma` is the deviation of the instrument's own part, known the day before.
    """

    returns: Array
    sigma: Array
    volume: Array


@dataclass(frozen=True)
class Life:
    """When an instrument is listed, and when it trades; `[D, N]` bool."""

    listed: Array
    traded: Array


def garch(
    rng: np.random.Generator, shape: tuple[int, int], *, df: float, arch: float
) -> tuple[Array, Array]:
    """Innovations `[D, K]` with clustering and fat tails, and the deviation known before each.

    GARCH(1,1) of persistence 0.985 and variance one (Bollerslev 1986) with Student t shocks: the
    variance of a day is 0.015 + arch * last square + (0.985 - arch) * last variance.
    """
    num_dates, width = shape
    shocks = rng.standard_t(df, size=shape) * np.sqrt((df - 2) / df)
    variance = np.exp(rng.normal(-0.15, 0.5, width))
    out, deviation = np.empty(shape), np.empty(shape)
    for t in range(num_dates):
        deviation[t] = np.sqrt(variance)
        out[t] = deviation[t] * shocks[t]
        # A single wild day may not blow the variance up for months.
        variance = 0.015 + arch * np.minimum(out[t] ** 2, 16.0) + (0.985 - arch) * variance
    return out, deviation


def wave(rng: np.random.Generator, shape: tuple[int, int], *, keep: float, sd: float) -> Array:
    """Stationary AR(1) paths `[D, K]` of standard deviation `sd`."""
    steps = rng.normal(0, sd * np.sqrt(1 - keep**2), shape)
    steps[0] = rng.normal(0, sd, shape[1])
    for t in range(1, shape[0]):
        steps[t] += keep * steps[t - 1]
    return steps


def draw_shocks(rng: np.random.Generator, num_dates: int, num: int, num_sectors: int) -> Shocks:
    """Returns by factors, without drift, and the volume that goes with them.

    Calm years and crises are one slow wave in the volatility of everything.
    """
    unrest = np.exp(wave(rng, (num_dates, 1), keep=0.99, sd=0.4) - 0.08)
    market = unrest * garch(rng, (num_dates, 1), df=7, arch=0.11)[0]
    sectors = unrest * garch(rng, (num_dates, num_sectors), df=7, arch=0.09)[0]
    own, deviation = garch(rng, (num_dates, num), df=4.5, arch=0.11)
    beta = rng.normal(1.0, 0.25, num).clip(0.3, 1.9)
    sector = rng.integers(0, num_sectors, num)
    loading = rng.uniform(0.6, 1.4, num)
    level = np.exp(rng.normal(np.log(0.0145), 0.3, num)).clip(0.007, 0.035)
    sigma = level * np.sqrt(unrest)
    returns = 0.0003 + 0.0085 * beta * market + 0.0055 * loading * sectors[:, sector] + sigma * own
    return Shocks(returns, sigma * deviation, _draw_volume(rng, own, market))


def _draw_volume(rng: np.random.Generator, own: Array, market: Array) -> Array:
    """Volume in shares: a level, a slow wave, and more of it on days of large moves."""
    level = rng.normal(13.5, 1.1, own.shape[1])
    slow = wave(rng, own.shape, keep=0.96, sd=0.32)
    busy = 0.25 * (np.abs(own) - 0.75).clip(-0.75, 6.0) + 0.1 * (np.abs(market) - 0.75)
    volume: Array = np.exp(level + slow + busy + rng.normal(0, 0.2, own.shape))
    return volume


def draw_life(rng: np.random.Generator, num_dates: int, num: int) -> Life:
    """Late listings (a sixth), delistings (a twelfth), suspensions of a day to eight weeks."""
    first = np.zeros(num, dtype=np.int64)
    last = np.full(num, num_dates - 1)
    late = rng.random(num) < 1 / 6
    first[late] = (rng.uniform(0.03, 0.75, num) * num_dates).astype(np.int64)[late]
    ends = rng.random(num) < 1 / 12
    stop = first + (rng.uniform(0.25, 0.98, num) * (num_dates - first)).astype(np.int64)
    last[ends] = stop[ends]
    days = np.arange(num_dates)[:, None]
    listed = (days >= first) & (days <= last)
    suspended = np.zeros((num_dates, num), dtype=bool)
    for column in rng.integers(0, num, rng.poisson(0.3 * num * num_dates / 252)):
        start = int(rng.integers(0, num_dates))
        suspended[start : start + min(1 + int(rng.geometric(0.15)), 40), column] = True
    # The first and the last stored day are trading days: an instrument is listed by trading.
    suspended[first, np.arange(num)] = False
    suspended[last, np.arange(num)] = False
    return Life(listed, listed & ~suspended)


def add_drift(
    shocks: Shocks, life: Life, strength: float, weights: Array | None = None
) -> tuple[Array, Array]:
    """`(log returns, score)`: each day's drift is the score of the day before yesterday.

    The score at the close of t moves the return from the close of t+1 to that of t+2, which is
    the return that the label `Ref($close,-2)/Ref($close,-1)-1` of day t shows. `weights [D, 2]`
    are those of the score's two parts by day; `WEIGHTS` on all days by default.
    """
    num_dates, num = shocks.returns.shape
    if weights is None:
        weights = np.tile(WEIGHTS, (num_dates, 1))
    returns = np.zeros((num_dates, num))
    score = np.zeros((num_dates, num))
    relative = relative_volume(shocks.volume, life)
    drift = strength * shocks.sigma
    age = np.cumsum(life.listed, axis=0)
    path = np.zeros((num_dates + 1, num))
    for t in range(num_dates):
        returns[t] = shocks.returns[t] + (drift[t] * score[t - 2] if t >= 2 else 0.0)
        returns[t] *= age[t] > 1
        path[t + 1] = path[t] + returns[t]
        recent = returns[t] + (SECOND_DAY * returns[t - 1] if t else 0.0)
        back = max(t + 1 - MOMENTUM_WINDOW, 0)
        momentum = (path[t + 1] - path[back]) * (age[t] > MOMENTUM_WINDOW)
        traded = life.traded[t]
        parts = weights[t, 0] * standardised(recent * relative[t], traded)
        parts += weights[t, 1] * standardised(momentum, traded & (age[t] > MOMENTUM_WINDOW))
        score[t] = standardised(parts, traded)
    return returns, score


def standardised(values: Array, where: Array) -> Array:
    """Z-scores of one day's cross-section, clipped to 3; zero outside `where`."""
    count = np.count_nonzero(where)
    if count < 2:
        return np.zeros_like(values)
    centred = np.where(where, values - (values @ where) / count, 0.0)
    spread = np.sqrt((centred @ centred) / count)
    scores: Array = (centred / max(spread, 1e-12)).clip(-3.0, 3.0)
    return scores


def relative_volume(volume: Array, life: Life) -> Array:
    """Today's volume over the mean of the last 20 bars, between 0.2 and 4; `[D, N]`."""
    seen = np.where(life.traded, volume, 0.0)
    totals = np.cumsum(np.vstack([np.zeros_like(seen[:1]), seen]), axis=0)
    counts = np.cumsum(np.vstack([np.zeros_like(seen[:1]), life.traded]), axis=0)
    start = np.maximum(np.arange(len(seen)) + 1 - VOLUME_WINDOW, 0)
    mean = (totals[1:] - totals[start]) / np.maximum(counts[1:] - counts[start], 1)
    return (volume / np.where(mean > 0, mean, volume)).clip(0.2, 4.0)


def draw_bars(rng: np.random.Generator, returns: Array, sigma: Array) -> dict[str, Array]:
    """Open, high, low, close and vwap of a path of log returns, the first close being 1.

    A share of each return falls into the night. The day's range is that of a Brownian bridge
    from open to close (its maximum and minimum have a closed form), so that low <= open, close,
    vwap <= high.
    """
    shape = returns.shape
    close = np.cumsum(returns, axis=0)
    night = 0.3 * returns + 0.25 * sigma * rng.standard_normal(shape)
    start = close - returns + night
    move = close - start
    # The day's own unrest grows with its move, as a calm day of a wild month is calm.
    unrest = (0.65 * sigma + 0.35 * np.abs(move)) ** 2
    up = np.sqrt(move**2 - 2 * unrest * np.log(rng.uniform(1e-9, 1.0, shape)))
    down = np.sqrt(move**2 - 2 * unrest * np.log(rng.uniform(1e-9, 1.0, shape)))
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


def split_factor(close: Array, listed: Array) -> Array:
    """The adjustment factor `[D, N]`: 1 at listing, doubled where the raw price was split 2:1.

    A company splits when its raw price passes 160, and joins four shares into one when it falls
    below 4; adjusted prices do not jump, the raw price (price / factor) does.
    """
    factor = np.ones_like(close)
    current = np.ones(close.shape[1])
    for t in range(1, len(close)):
        raw = close[t - 1] / current
        current = np.where(listed[t] & (raw > 160), current * 2, current)
        current = np.where(listed[t] & (raw < 4), current / 4, current)
        factor[t] = current
    return factor


def liquid_spans(turnover: Array, listed: Array, size: int, every: int = 63) -> Array:
    """Membership `[D, N]` of the `size` most traded, chosen anew every quarter.

    The choice looks back over the last quarter's turnover alone, so that a member of a day was
    known the day before; the first quarter is chosen by its own first day.
    """
    member = np.zeros(listed.shape, dtype=bool)
    for start in range(0, len(turnover), every):
        seen = turnover[max(start - every, 0) : max(start, 1)]
        counts = np.maximum(np.count_nonzero(seen, axis=0), 1)
        score = np.where(listed[max(start - 1, 0)], seen.sum(0) / counts, -1.0)
        chosen = np.argsort(-score, kind="stable")[:size]
        member[start : start + every, chosen[score[chosen] > 0]] = True
    member &= listed
    return member
