"""`backtest`: a strategy over the days, from cash to a report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from qtorch.backtest.account import Account
from qtorch.backtest.benchmark import Benchmark, benchmark_returns
from qtorch.backtest.exchange import Exchange
from qtorch.backtest.quotes import Floats, Quotes
from qtorch.backtest.result import BacktestResult
from qtorch.backtest.scores import Scores
from qtorch.backtest.simulate import simulate
from qtorch.backtest.strategy import Strategy
from qtorch.core.dates import as_stamp, date_rows
from qtorch.core.errors import ConfigError, DataError, unknown_name
from qtorch.core.instantiate import init_instance_by_config, plain

log = logging.getLogger(__name__)

CASH = 1e9
_PRICE_DAYS = 30  # how far back the price of an initial position may lie, as in Qlib


def backtest(
    start_time: Any = None,
    end_time: Any = None,
    strategy: Any = None,
    executor: Any = None,
    benchmark: Benchmark = None,
    account: float | Mapping[str, Any] = CASH,
    exchange_kwargs: Mapping[str, Any] | None = None,
    *,
    source: Any = None,
) -> BacktestResult:
    """Trade a strategy's decisions from `start_time` to `end_time` (inclusive dates).

    `strategy`: a Strategy or its configuration. `account`: cash, or `{"cash": ..., instrument:
    amount or {"amount": ..., "price": ...}}`. `benchmark`: an instrument, a universe, a list, a
    series of returns, or None. `exchange_kwargs`: arguments of `Exchange`, or `{"exchange": an
    Exchange or its configuration}` (one that is used again keeps its bars in memory). `source`:
    where the bars come from, by default the exchange's or that of `qtorch.init`. `executor` is
    Qlib's: `{"class": "SimulatorExecutor", "kwargs": {"time_per_step": "day", "trade_type":
    "serial" | "parallel", "settle_type": None | "cash"}}`; it may be left out.

    The scores of a bar trade at the next bar. Dates default to those of the scores: from the bar
    after the first to the bar after the last. Answers to Qlib's `backtest` (backtest/__init__.py),
    which returns two dictionaries by frequency instead. Differences: the value of an initial
    portfolio counts at the start (Qlib's first return takes it for a profit); the benchmark is
    None unless given.
    """
    built = strategy
    if isinstance(plain(strategy), Mapping | str):
        built = init_instance_by_config(plain(strategy), "qtorch.backtest", accept_types=Strategy)
    if not isinstance(built, Strategy):
        raise ConfigError(
            f"strategy is {type(built).__name__}; expected a Strategy or its configuration."
        )
    steps = _steps(executor)
    exchange = _exchange(exchange_kwargs, source, steps)
    frame = built.scores()
    calendar = exchange.calendar()
    start, end = _span(start_time, end_time, frame, calendar)
    quotes = exchange.quotes(start, end)
    scores = None if frame is None else Scores(frame, quotes.dates, exchange.freq)
    members = ["account"] if scores is None else scores.members
    quotes = quotes if scores is None else _with_unknown(quotes, scores)
    known = np.asarray((~quotes.suspended).any(axis=0))
    if scores is not None:
        known &= quotes.instruments.isin(scores.instruments)
    opened = _account(account, quotes, exchange, len(members), steps)
    opening = opened.value()
    dates = quotes.dates[quotes.first :]
    bench = benchmark_returns(benchmark, exchange.source, dates, exchange.freq)
    built.start(exchange, quotes.instruments, dates, known)
    ledger = simulate(
        exchange, quotes, built, scores, opened, buy_first=steps["trade_type"] == "parallel"
    )
    return BacktestResult(ledger, members, quotes.instruments, bench, opening, exchange.freq)


def _steps(executor: Any) -> dict[str, Any]:
    """The settings of Qlib's SimulatorExecutor that mean something here."""
    steps: dict[str, Any] = {"time_per_step": None, "trade_type": "serial", "settle_type": None}
    if executor is None:
        return steps
    config = plain(executor)
    if not isinstance(config, Mapping):
        raise ConfigError(f"executor is {type(config).__name__}; expected a mapping, or nothing.")
    name = str(config.get("class", config.get("_target_", "SimulatorExecutor"))).rpartition(".")[2]
    if name != "SimulatorExecutor":
        raise ConfigError(
            f"executor {name!r} is not supported; SimulatorExecutor is: a strategy's orders are "
            "dealt within their bar (nested execution is not part of qtorch)."
        )
    ignored = ("generate_portfolio_metrics", "verbose", "indicator_config", "track_data")
    given = config.get("kwargs") or {
        k: v for k, v in config.items() if k not in ("class", "_target_", "module_path")
    }
    for key, value in given.items():
        if key in steps:
            steps[key] = value
        elif key not in ignored:
            raise ConfigError(unknown_name("argument of the executor", key, [*steps, *ignored]))
    if steps["trade_type"] not in ("serial", "parallel"):
        raise ConfigError(unknown_name("trade_type", steps["trade_type"], ("serial", "parallel")))
    if steps["settle_type"] not in (None, "None", "cash"):
        raise ConfigError(unknown_name("settle_type", str(steps["settle_type"]), ("None", "cash")))
    return steps


def _exchange(given: Mapping[str, Any] | None, source: Any, steps: Mapping[str, Any]) -> Exchange:
    kwargs = dict(plain(given) or {})
    ready = kwargs.pop("exchange", None)
    if ready is not None:
        if kwargs:
            raise ConfigError(f"exchange_kwargs holds an exchange; {sorted(kwargs)} belong to it.")
        exchange = init_instance_by_config(ready, "qtorch.backtest", accept_types=Exchange)
        if source is not None:
            raise ConfigError("the exchange has its own source; leave source out.")
        if not isinstance(exchange, Exchange):
            raise ConfigError(
                f"exchange is {type(exchange).__name__}; expected an Exchange or its configuration."
            )
        return exchange
    if source is not None:
        kwargs["source"] = source
    if steps["time_per_step"] is not None:
        kwargs.setdefault("freq", steps["time_per_step"])
    kwargs.pop("start_time", None)
    kwargs.pop("end_time", None)
    return Exchange(**kwargs)


def _span(
    start: Any, end: Any, scores: pd.DataFrame | None, calendar: pd.DatetimeIndex
) -> tuple[pd.Timestamp, pd.Timestamp]:
    """The first and the last bar that are traded on."""
    if start is not None and end is not None and as_stamp(start) > as_stamp(end):
        raise ConfigError(f"start_time {start} is after end_time {end}.")
    if scores is not None:
        stamps = scores.index.get_level_values(0)
        first, last = pd.Timestamp(stamps.min()), pd.Timestamp(stamps.max())
        rows = date_rows(calendar, first, last)
        if rows.start == rows.stop:
            raise DataError(
                f"the scores are of {first:%Y-%m-%d}..{last:%Y-%m-%d}; the calendar goes from "
                f"{calendar[0]:%Y-%m-%d} to {calendar[-1]:%Y-%m-%d}."
            )
        start = calendar[min(rows.start + 1, len(calendar) - 1)] if start is None else start
        end = calendar[min(rows.stop, len(calendar) - 1)] if end is None else end
    rows = date_rows(calendar, start, end)
    if rows.start == rows.stop:
        raise DataError(
            f"no bar between {start} and {end}; the calendar goes from {calendar[0]:%Y-%m-%d} to "
            f"{calendar[-1]:%Y-%m-%d}."
        )
    return calendar[rows.start], calendar[rows.stop - 1]


def _with_unknown(quotes: Quotes, scores: Scores) -> Quotes:
    """The quotes with the scored instruments that have no bars, as suspended ones."""
    unknown = scores.instruments.difference(quotes.instruments)
    if not len(unknown):
        return quotes
    if len(unknown) == len(scores.instruments):
        raise DataError(
            f"none of the {len(unknown)} instruments of the scores is on the exchange, e.g. "
            f"{unknown[0]!r}; it trades e.g. {quotes.instruments[0]!r}."
        )
    log.warning(
        "%d of %d instruments of the scores have no bars in the backtest and count as suspended: "
        "%s%s.",
        len(unknown),
        len(scores.instruments),
        ", ".join(map(str, unknown[:5])),
        ", ..." if len(unknown) > 5 else "",
    )
    return quotes.widened(unknown)


def _account(
    given: float | Mapping[str, Any],
    quotes: Quotes,
    exchange: Exchange,
    members: int,
    steps: Mapping[str, Any],
) -> Account:
    """The accounts at the start, initial positions at the last close before it."""
    holdings = dict(given) if isinstance(given, Mapping) else {"cash": given}
    cash = holdings.pop("cash", 0.0)
    if isinstance(cash, bool) or not isinstance(cash, int | float) or not 0 <= cash < np.inf:
        raise ConfigError(f"account={given!r}: cash is an amount of money, zero or more.")
    amount, price = _portfolio(holdings, quotes, exchange)
    if not cash and not amount.any():
        raise ConfigError("the account holds neither cash nor positions.")
    settle = steps["settle_type"] == "cash"
    return Account.opened(cash, amount, price, members, settle_cash=settle)


def _portfolio(
    holdings: Mapping[str, Any], quotes: Quotes, exchange: Exchange
) -> tuple[Floats, Floats]:
    amount = np.zeros(len(quotes.instruments))
    price = np.full(len(quotes.instruments), np.nan)
    if not holdings:
        return amount, price
    for name, held in holdings.items():
        if name not in quotes.instruments:
            raise ConfigError(unknown_name("instrument of the account", name, quotes.instruments))
        at = quotes.instruments.get_loc(name)
        held = held if isinstance(held, Mapping) else {"amount": held}
        amount[at], price[at] = held["amount"], held.get("price", np.nan)
    start = quotes.dates[quotes.first]
    unpriced = [str(n) for n in quotes.instruments[(amount != 0) & np.isnan(price)]]
    if unpriced:
        since = start - pd.Timedelta(days=_PRICE_DAYS)
        panel = exchange.source.feature_panel(unpriced, ["$close"], since, start, exchange.freq)
        close = panel.column("$close").cpu().numpy().astype(np.float64)[:-1]
        last = pd.DataFrame(close, columns=panel.instruments).ffill().iloc[-1:]
        for name in unpriced:
            found = last[name].to_numpy() if name in last else np.array([])
            if not len(found) or np.isnan(found[0]):
                raise DataError(
                    f"{name} of the account has no close in the {_PRICE_DAYS} days before "
                    f"{start:%Y-%m-%d}; give its price."
                )
            price[quotes.instruments.get_loc(name)] = found[0]
    return amount, price
