"""A simulated market whose predictable signal is known exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.dates import date_rows
from qtorch.core.errors import ConfigError
from qtorch.data.panel import Panel
from qtorch.data.source import market
from qtorch.data.source.base import Membership
from qtorch.data.source.frame import PanelSource, mask_membership, span_membership

BENCHMARK = "MARKET"
FIELDS = ("open", "high", "low", "close", "volume", "vwap", "factor", "change")


class _Market(NamedTuple):
    panel: Panel
    score: Tensor
    memberships: dict[str, Membership]


class SyntheticSource(PanelSource):
    """A seeded, simulated market of daily bars with a weak, known signal.

    Log returns are beta x market + loading x sector + idiosyncratic return, each a GARCH(1,1)
    with Student t shocks. Some instruments are listed late, some are delisted, and some are
    suspended for days (NaN rows). Splits appear in `factor` as in Qlib (price = raw price x
    factor, volume = raw volume / factor). The benchmark `MARKET` is the equal-weighted index of
    the stocks.

    Universes: `stocks` (without the benchmark; use it for training), `all` (with the benchmark,
    as in Qlib's data), and `liquid` (the two thirds of the stocks with the largest turnover,
    selected every quarter, so that its spans have entries and exits).

    The signal of day t, known at its close, is a cross-sectional z-score of two parts: the
    return of the last two days multiplied by the volume relative to its 20-day mean (rewarded by
    reversal), and the return of the last 60 days. The signal is the drift of the return from t+1
    to t+2, which is what the label `Ref($close,-2)/Ref($close,-1)-1` of day t measures. It
    depends only on bars up to t; the features ROC60, RESI5, KMID, VMA20 and similar ones of
    Alpha158 contain it.

    `signal` is its strength: the drift for one unit of score, in units of the instrument's
    idiosyncratic standard deviation. It is approximately the mean Rank IC of the true score with
    the label: at the default 0.06 the mean is 0.0593 over 40 seeds of six years (standard
    deviation 0.0021, and 0.0053 for the mean of one year). With 0 there is no signal.
    `signal_scores()` returns the true score and `signal_rank_ic()` its Rank IC by day, the upper
    limit for any model, luck aside. Least squares on the 20 features of Qlib's LSTM example
    reach 90% of it.

    `regimes` change the direction of the signal but not its strength. It maps dates to the
    weights of the two parts, `{date: [recent return, 60-day return]}`, which hold from the close
    of that date on. Before the first date the weights are -0.8 (reversal) and 0.6 (momentum).
    Only the ratio of the two weights matters because the score is standardized, so the strength
    and the Rank IC of the signal do not change. A model trained before a regime change keeps more
    of its skill if the two pairs of weights point in similar directions.
    """

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
        self._dates = pd.bdate_range(start_time, end_time).as_unit("ns")
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

    def signal_scores(self) -> Panel:
        """Return the true score at each close as a panel `[D, N, 1]` with the field `score`.

        It covers the stocks, is standardized by day, and is NaN where an instrument has no bar.
        """
        market_data = self._market()
        stocks = list(market_data.memberships["stocks"])
        bars = market_data.panel.select(fields=["close"], instruments=stocks)
        return Panel(
            market_data.score[..., None],
            bars.calendar,
            stocks,
            ["score"],
            mask=bars.mask,
            spans=bars.spans,
        )

    def signal_rank_ic(
        self,
        start_time: str | None = None,
        end_time: str | None = None,
        *,
        universe: str = "stocks",
    ) -> pd.Series:
        """Compute the daily Spearman correlation of the true score and the label, members only."""
        bars = self.load(["close"], instruments=universe)
        close = bars.column("close").double()
        label = torch.full_like(close, float("nan"))
        label[:-2] = close[2:] / close[1:-1] - 1
        score = self.signal_scores()
        stock_names = [n for n in bars.instruments if n in score.instruments]
        columns = torch.from_numpy(bars.instruments.get_indexer(pd.Index(stock_names)))
        label_and_score = (
            label[:, columns],
            score.select(instruments=stock_names).column("score").double(),
        )
        is_missing = (
            label_and_score[0].isnan() | label_and_score[1].isnan() | ~bars.mask[:, columns]
        )
        ranks = [
            pd.DataFrame(p.masked_fill(is_missing, float("nan")).numpy()).rank(axis=1)
            for p in label_and_score
        ]
        ic = ranks[0].corrwith(ranks[1], axis=1)
        ic.index = bars.calendar
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
        shocks = market.draw_shocks(streams[0], num_dates, num, self.num_sectors)
        life = market.draw_life(streams[1], num_dates, num)
        weights = _signal_weights(self._dates, self.regimes)
        returns, score = market.add_drift(shocks, life, self.signal, weights)
        bars = market.draw_bars(streams[2], returns, shocks.sigma)
        level = np.exp(streams[3].normal(np.log(40.0), 0.6, num)).clip(8.0, 150.0)
        prices = {name: values * level for name, values in bars.items()}
        stocks = _stock_fields(prices, shocks.volume, life)
        index = _benchmark(stocks, life)
        names = [f"S{k:0{len(str(num - 1))}d}" for k in range(num)]
        turnover = np.nan_to_num(stocks["volume"] * stocks["vwap"])
        is_liquid = market.liquid_members(turnover, life.is_listed, max(1, (2 * num) // 3))
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


def _signal_weights(dates: pd.DatetimeIndex, regimes: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Return the daily weights `[D, 2]` of the signal's parts; ConfigError for invalid regimes."""
    out = np.tile(market.WEIGHTS, (len(dates), 1))
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


def _stock_fields(
    prices: dict[str, np.ndarray], volume: np.ndarray, life: market.Life
) -> dict[str, np.ndarray]:
    """Return all fields of the stocks, NaN on days without trading."""
    factor = market.split_factor(prices["close"], life.is_listed)
    out = {**prices, "volume": np.rint(volume * factor) / factor, "factor": factor}
    out = {name: np.where(life.is_traded, values, np.nan) for name, values in out.items()}
    last_close = pd.DataFrame(out["close"]).ffill().shift(1).to_numpy()
    out["change"] = out["close"] / last_close - 1
    return out


def _benchmark(stocks: dict[str, np.ndarray], life: market.Life) -> dict[str, np.ndarray]:
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
    stocks: dict[str, np.ndarray],
    index: dict[str, np.ndarray],
    life: market.Life,
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
