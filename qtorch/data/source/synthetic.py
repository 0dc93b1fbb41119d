"""The embedded market: made, not measured, so that what it hides is known."""

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
    """A seeded market of daily bars with a weak signal that is known.

    Log returns are beta x market + loading x sector + own part, each a GARCH(1,1) with Student t
    shocks; some instruments are listed late, some delisted, some suspended for days (NaN rows);
    splits show in `factor` as in Qlib (price = raw price x factor, volume = raw volume / factor).
    The benchmark `MARKET` is the stocks' equal-weighted index.

    Universes: `stocks` (without the benchmark: the one to train on), `all` (with it, as in Qlib's
    data), `liquid` (the two thirds with the largest turnover, chosen every quarter: spans with
    entries and exits).

    The signal of day t, known at its close, is a cross-sectional z-score of two parts: reversal
    of the last two days weighted by the volume over its 20-day mean, and the return of the last
    60 days. It is the drift of the return from t+1 to t+2, which the label
    `Ref($close,-2)/Ref($close,-1)-1` of day t shows. Everything in it is a function of bars up
    to t: ROC60, RESI5, KMID, VMA20 and the like of Alpha158.

    `signal` is its strength: the drift that one unit of score gives, in units of the
    instrument's own deviation, and so about the mean Rank IC of the true score with the label.
    At the default 0.06 that is 0.0593 over 40 seeds of six years (standard deviation 0.0021; of
    one year's mean 0.0053); 0: no signal. `planted_signal()` gives the score,
    `planted_rank_ic()` its Rank IC by day, which is the most that a model can find, luck aside.
    Least squares on the 20 features of Qlib's LSTM example find nine tenths of it.

    `regimes` change what is rewarded and not how much: from each of its dates on (the closes at
    which the score is formed) the two parts have other weights, `{date: [recent return, return of
    60 days]}`; before the first they are -0.8 and 0.6, reversal and momentum. Their lengths count
    for nothing, as the score is standardised: the strength and so the planted Rank IC stay as
    they are. What was learnt before holds the better, the nearer the two pairs' directions.
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
            raise ConfigError(f"SyntheticSource: signal must be from 0 to 0.5, got {signal}.")
        self.num_instruments = num_instruments
        self.seed = seed
        self.signal = signal
        self.num_sectors = num_sectors
        self._dates = pd.bdate_range(start_time, end_time).as_unit("ns")
        if len(self._dates) < 2:
            raise ConfigError(
                f"SyntheticSource: {start_time}..{end_time} holds {len(self._dates)} business "
                "days; at least 2 are needed."
            )
        self.regimes = dict(regimes or {})
        _weights(self._dates, self.regimes)  # a wrong one is said now
        self._made: _Market | None = None

    def panel(self) -> Panel:
        return self._market().panel

    def memberships(self) -> Mapping[str, Membership]:
        return self._market().memberships

    def planted_signal(self) -> Panel:
        """The true score at each close as a panel of one field, `score`.

        `[D, N, 1]` over the stocks; NaN where an instrument has no bar. Standardised by day.
        """
        made = self._market()
        stocks = list(made.memberships["stocks"])
        bars = made.panel.select(fields=["close"], instruments=stocks)
        return Panel(
            made.score[..., None],
            bars.calendar,
            stocks,
            ["score"],
            mask=bars.mask,
            spans=bars.spans,
        )

    def planted_rank_ic(
        self,
        start_time: str | None = None,
        end_time: str | None = None,
        *,
        universe: str = "stocks",
    ) -> pd.Series:
        """Spearman correlation by day of the true score with the label, members only."""
        bars = self.load(["close"], instruments=universe)
        close = bars.column("close").double()
        label = torch.full_like(close, float("nan"))
        label[:-2] = close[2:] / close[1:-1] - 1
        score = self.planted_signal()
        known = [n for n in bars.instruments if n in score.instruments]
        columns = torch.from_numpy(bars.instruments.get_indexer(pd.Index(known)))
        pair = label[:, columns], score.select(instruments=known).column("score").double()
        absent = pair[0].isnan() | pair[1].isnan() | ~bars.mask[:, columns]
        ranks = [
            pd.DataFrame(p.masked_fill(absent, float("nan")).numpy()).rank(axis=1) for p in pair
        ]
        ic = ranks[0].corrwith(ranks[1], axis=1)
        ic.index = bars.calendar
        return ic[date_rows(bars.calendar, start_time, end_time)].dropna().rename("rank_ic")

    def __getstate__(self) -> dict[str, Any]:
        """What is made anew from the seed is neither copied nor stored."""
        return {**self.__dict__, "_made": None}

    def _market(self) -> _Market:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _make(self) -> _Market:
        num, num_dates = self.num_instruments, len(self._dates)
        # Independent streams: another signal changes the drift and nothing else.
        streams = np.random.default_rng(self.seed).spawn(4)
        shocks = market.draw_shocks(streams[0], num_dates, num, self.num_sectors)
        life = market.draw_life(streams[1], num_dates, num)
        weights = _weights(self._dates, self.regimes)
        returns, score = market.add_drift(shocks, life, self.signal, weights)
        bars = market.draw_bars(streams[2], returns, shocks.sigma)
        level = np.exp(streams[3].normal(np.log(40.0), 0.6, num)).clip(8.0, 150.0)
        prices = {name: values * level for name, values in bars.items()}
        stocks = _finished(prices, shocks.volume, life)
        index = _benchmark(stocks, life)
        names = [f"S{k:0{len(str(num - 1))}d}" for k in range(num)]
        turnover = np.nan_to_num(stocks["volume"] * stocks["vwap"])
        liquid = market.liquid_spans(turnover, life.listed, max(1, (2 * num) // 3))
        panel = _panel(stocks, index, life, self._dates, names)
        everything = span_membership(panel)
        member = panel.select(instruments=names)
        member.mask = torch.from_numpy(liquid)
        memberships = {
            "all": everything,
            "stocks": {n: everything[n] for n in names},
            "liquid": mask_membership(member),
        }
        shown = torch.from_numpy(np.where(life.traded, score, np.nan).astype(np.float32))
        return _Market(panel, shown, memberships)


def _weights(dates: pd.DatetimeIndex, regimes: Mapping[str, Sequence[float]]) -> np.ndarray:
    """The weights `[D, 2]` of the signal's parts by day. ConfigError for what is no regime."""
    out = np.tile(market.WEIGHTS, (len(dates), 1))
    try:
        begins = sorted((pd.Timestamp(date), weights) for date, weights in regimes.items())
        for begin, weights in begins:
            recent, momentum = (float(weight) for weight in weights)
            if not 0 < recent**2 + momentum**2 < np.inf:
                raise ValueError(f"the weights of {begin.date()} are {recent:g} and {momentum:g}")
            out[dates >= begin] = recent, momentum
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"SyntheticSource: regimes is {dict(regimes)}; expected two weights by date, such as "
            f"{{'2015-01-01': [-0.8, -0.6]}} ({error})."
        ) from error
    return out


def _finished(
    prices: dict[str, np.ndarray], volume: np.ndarray, life: market.Life
) -> dict[str, np.ndarray]:
    """All fields of the stocks, NaN where they do not trade."""
    factor = market.split_factor(prices["close"], life.listed)
    out = {**prices, "volume": np.rint(volume * factor) / factor, "factor": factor}
    out = {name: np.where(life.traded, values, np.nan) for name, values in out.items()}
    last = pd.DataFrame(out["close"]).ffill().shift(1).to_numpy()
    out["change"] = out["close"] / last - 1
    return out


def _benchmark(stocks: dict[str, np.ndarray], life: market.Life) -> dict[str, np.ndarray]:
    """The equal-weighted index: means of the members' moves from their last close, compounded.

    Highs and lows of members do not fall together, so half of the mean range stays.
    """
    last = stocks["close"] / (1 + stocks["change"])
    counted = ~np.isnan(last)
    count = np.maximum(counted.sum(1), 1)
    moves = {
        name: np.where(counted, stocks[name] / last - 1, 0.0).sum(1) / count
        for name in ("open", "high", "low", "close", "vwap")
    }
    top = np.maximum(moves["open"], moves["close"])
    bottom = np.minimum(moves["open"], moves["close"])
    moves["high"] = top + 0.5 * (moves["high"] - top)
    moves["low"] = bottom + 0.5 * (moves["low"] - bottom)
    moves["vwap"] = moves["vwap"].clip(moves["low"], moves["high"])
    level = 1000 * np.cumprod(1 + moves["close"])
    before = np.concatenate([[1000.0], level[:-1]])
    index = {name: before * (1 + move) for name, move in moves.items()}
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
    """Stocks and benchmark as one panel, instruments ascending (the benchmark comes first)."""
    num_dates, num = life.listed.shape
    values = torch.empty((len(FIELDS), num_dates, num + 1))
    for k, field in enumerate(FIELDS):
        values[k, :, 0] = torch.from_numpy(index[field])
        values[k, :, 1:] = torch.from_numpy(stocks[field])
    first = np.concatenate([[0], life.listed.argmax(0)])
    last = num_dates - 1 - np.concatenate([[0], life.listed[::-1].argmax(0)])
    spans = torch.from_numpy(np.stack([first, last], 1))
    return Panel(values.permute(1, 2, 0), dates, [BENCHMARK, *names], FIELDS, spans=spans)
