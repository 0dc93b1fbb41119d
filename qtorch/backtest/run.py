"""`backtest`: run a strategy over a range of dates and return its report, positions and orders."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from qtorch.backtest.account import Account
from qtorch.backtest.exchange import Exchange
from qtorch.backtest.quotes import ZERO_PRICE, Bools, Floats, Quotes, fill_forward
from qtorch.backtest.result import BacktestResult
from qtorch.backtest.scores import Scores
from qtorch.backtest.simulate import DELISTINGS, Delisting, simulate
from qtorch.backtest.strategy import Strategy
from qtorch.core.configured import Configured, check_arguments, constructor_signature
from qtorch.core.dates import as_stamp, date_rows, frequency, last_instant, parse_dates
from qtorch.core.errors import ConfigError, DataError, check_name
from qtorch.core.instantiate import init_instance_by_config, resolve_config
from qtorch.core.tables import find_stored_name
from qtorch.data.source.base import Source

Benchmark: TypeAlias = str | Sequence[str] | pd.Series | None

log = logging.getLogger(__name__)

CASH = 1e9
_RETURN = "$close/Ref($close, 1)-1"
_BENCHMARK_BARS = 250  # the last close of a benchmark may be this many bars old at the start
_PRICE_DAYS = 30  # the price of an initial position may be this many days old, as in Qlib


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
    delisting: Delisting = "last_close",
    as_qlib: bool = False,
) -> BacktestResult:
    """Simulate a strategy from `start_time` to `end_time` (inclusive dates).

    `strategy`: a Strategy or its configuration. `account`: cash, or `{"cash": ..., instrument:
    amount or {"amount": ..., "price": ...}}`. `benchmark`: an instrument, a universe, a list of
    instruments, a series of returns, or None. `exchange_kwargs`: arguments of `Exchange`, or
    `{"exchange": an Exchange or its configuration}` (reusing an Exchange keeps its bars in
    memory). `source`: the data source of the bars, by default the exchange's or the one of
    `qtorch.init`. `executor`: as in Qlib a SimulatorExecutor or its configuration, `{"class":
    "SimulatorExecutor", "kwargs": {"time_per_step": "day", "trade_type": "serial" | "parallel",
    "settle_type": None | "cash"}}`; optional.

    `delisting`: what becomes of a position when the bars of its instrument end: on the next bar it
    is closed at its last close, or at "zero", without cost; or it is kept ("keep"). Logged, and
    listed in `result.delistings`.

    The scores of a bar are traded at the next bar. By default the dates are those of the scores,
    shifted by one bar: from the bar after the first score to the bar after the last. Corresponds
    to Qlib's `backtest` (backtest/__init__.py), which instead returns two dictionaries by
    frequency, and has a benchmark by default.

    `as_qlib` gives Qlib's numbers where Qlib is wrong about money. Without it: an initial
    portfolio counts at its value from the start (Qlib's first return reports that value as a
    profit); positions are closed when bars end (Qlib keeps them); benchmarks keep their move over
    a gap (Qlib loses it); for the rest see `TopkDropoutStrategy` and `Exchange`.
    """
    check_name("delisting", delisting, DELISTINGS)
    built_strategy = _build_strategy(strategy)
    execution = build_executor(executor)
    exchange = _build_exchange(exchange_kwargs, source, execution.time_per_step)
    frame = built_strategy.scores()
    calendar = exchange.calendar()
    start, end = _trading_span(start_time, end_time, frame, calendar)
    quotes = exchange.quotes(start, end, as_qlib=as_qlib)
    scores = None if frame is None else Scores(frame, quotes.dates, exchange.freq)
    members = ["account"] if scores is None else scores.members
    quotes = quotes if scores is None else _add_unknown_instruments(quotes, scores)
    universe = np.asarray((~quotes.is_suspended).any(axis=0))
    if scores is not None:
        universe &= quotes.instruments.isin(scores.instruments)
    accounts = _open_accounts(account, quotes, exchange, len(members), execution)
    dates = quotes.dates[quotes.first :]
    bench = benchmark_returns(
        benchmark,
        exchange.source,
        dates,
        exchange.freq,
        as_qlib=as_qlib,
        quotes=quotes if exchange.codes == "all" else None,
    )
    built_strategy.start(exchange, quotes.instruments, dates, universe)
    ledger = simulate(
        exchange,
        quotes,
        built_strategy,
        scores,
        accounts,
        buy_first=execution.trade_type == "parallel",
        delisting="keep" if as_qlib else delisting,
        as_qlib=as_qlib,
    )
    if as_qlib:
        ledger.opening = ledger.opening_cash
    return BacktestResult(ledger, members, exchange, quotes, bench)


def check_backtest(
    *,
    source: Any = None,
    start_time: Any = None,
    end_time: Any = None,
    executor: Any = None,
    benchmark: Benchmark = None,
    account: float | Mapping[str, Any] = CASH,
    exchange_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Raise an error for a name or a date of a backtest that its source of bars does not have.

    The arguments are those of `backtest`. Bars are not read, unless the source reads them to know
    its names.
    """
    exchange = _build_exchange(exchange_kwargs, source, build_executor(executor).time_per_step)
    exchange.check_names()
    _trading_span(start_time, end_time, None, exchange.calendar())
    if benchmark is not None and not isinstance(benchmark, pd.Series):
        resolve_benchmark(benchmark, exchange.source)
    for name in account if isinstance(account, Mapping) else ():
        if name != "cash":
            check_name("instrument of the account", name, exchange.source.instrument_names())


def benchmark_returns(
    benchmark: Benchmark,
    source: Source,
    dates: pd.DatetimeIndex,
    freq: str,
    *,
    as_qlib: bool = False,
    quotes: Quotes | None = None,
) -> pd.Series:
    """Return of the benchmark on each bar, as a fraction; all NaN without a benchmark.

    `benchmark`: an instrument; a universe or a list of instruments (the mean return of those that
    trade on the bar); or a series of returns by date. The return of an instrument is that since its
    last close, over any gap; a close of 0 is a gap. A bar without a return counts as 0, as in Qlib.
    Difference from Qlib: a series that covers none of the dates, and a name that is neither an
    instrument nor a universe, are errors. `as_qlib` loses the move over a gap as Qlib does. With
    the `quotes` of a backtest over `dates` listed instruments need not be read again.
    """
    if benchmark is None:
        return pd.Series(np.nan, index=dates, name="bench")
    if isinstance(benchmark, pd.Series):
        returns = benchmark.copy()
        returns.index = parse_dates(returns.index)
        returns = returns.reindex(dates)
        if returns.isna().all():
            raise DataError(
                f"the benchmark's returns cover none of {dates[0]:%Y-%m-%d}..{dates[-1]:%Y-%m-%d}."
            )
        return returns.fillna(0.0).rename("bench")
    instruments = resolve_benchmark(benchmark, source)
    if as_qlib:
        panel = source.feature_panel(instruments, [_RETURN], dates[0], dates[-1], freq)
        frame = panel.to_frame()[_RETURN].astype(np.float64)
        returns = frame.groupby(level=0).mean().reindex(dates)
        return returns.fillna(0.0).rename("bench")
    if isinstance(instruments, list) and quotes is not None:
        columns = quotes.instruments.get_indexer(pd.Index(instruments))
        if (columns >= 0).all():
            close = np.vstack([quotes.earlier_close[columns], quotes.close[:, columns]])
            means = _mean_moves(close)[quotes.first :]
            return pd.Series(means, index=dates, name="bench")
    calendar = source.read_calendar(freq)
    row = int(calendar.searchsorted(dates[0]))
    begin = calendar[max(row - _BENCHMARK_BARS, 0)]
    panel = source.feature_panel(instruments, ["$close"], begin, dates[-1], freq)
    close = panel.column("$close").cpu().numpy().astype(np.float64)
    close[close <= ZERO_PRICE] = np.nan
    means = _mean_moves(close, panel.mask.cpu().numpy())
    returns = pd.Series(means, panel.calendar[1:]).reindex(dates)
    return returns.fillna(0.0).rename("bench")


def _mean_moves(close: Floats, is_member: Bools | None = None) -> Floats:
    """The mean move on each but the first bar of `close [D, N]` of those that trade on it.

    A move is that since the last close. It is 0 on a bar on which no instrument trades.
    """
    moves = close[1:] / fill_forward(close, np.full(close.shape[1], np.nan))[:-1] - 1
    if is_member is not None:
        moves[~is_member[1:]] = np.nan
    count = (~np.isnan(moves)).sum(axis=1)
    means: Floats = np.nansum(moves, axis=1) / np.maximum(count, 1)
    return means


def resolve_benchmark(benchmark: str | Sequence[str], source: Source) -> str | list[str]:
    """Return a benchmark's universe, or its instruments, as the source has them.

    Raises DataError for a name that the source does not have, ConfigError for one that is not text.
    """
    instruments = source.instrument_names()
    if isinstance(benchmark, str) or not isinstance(benchmark, Iterable):
        names = instruments.union(source.universes())
        name = find_stored_name(benchmark, names, "benchmark (an instrument or a universe)")
        return [name] if name in instruments else name
    return [find_stored_name(n, instruments, "instrument of the benchmark") for n in benchmark]


def _build_strategy(strategy: Any) -> Strategy:
    if isinstance(resolve_config(strategy), Mapping | str):
        strategy = init_instance_by_config(
            resolve_config(strategy), "qtorch.backtest", accept_types=Strategy
        )
    if not isinstance(strategy, Strategy):
        raise ConfigError(
            f"strategy is {type(strategy).__name__}; expected a Strategy or its configuration."
        )
    return strategy


class SimulatorExecutor(Configured):
    """How a backtest executes orders: within their bar. Corresponds to Qlib's SimulatorExecutor.

    `time_per_step`: the frequency of the bars; `trade_type`: "serial" (sales pay for purchases) or
    "parallel"; `settle_type`: "cash" if the proceeds of sales are available on the next bar. The
    dates are those of the backtest; portfolio metrics and indicators are always calculated, and
    `indicator_config`, `verbose`, `track_data` have no effect.
    """

    TT_SERIAL, TT_PARAL = "serial", "parallel"

    def __init__(
        self,
        time_per_step: str | None = None,
        start_time: Any = None,
        end_time: Any = None,
        indicator_config: Mapping[str, Any] | None = None,
        generate_portfolio_metrics: bool = False,
        verbose: bool = False,
        track_data: bool = False,
        common_infra: Any = None,
        trade_type: str = TT_SERIAL,
        *,
        settle_type: str | None = None,
    ) -> None:
        if not (start_time is None and end_time is None and common_infra is None):
            raise ConfigError(
                "start_time and end_time are arguments of the backtest, and common_infra does not "
                "exist here: leave them out of the executor."
            )
        check_name("trade_type", trade_type, (self.TT_SERIAL, self.TT_PARAL))
        check_name("settle_type", str(settle_type), ("None", "cash"))  # "None" is Qlib's default
        self.time_per_step, self.trade_type = time_per_step, trade_type
        self.settle_type = settle_type


def build_executor(executor: Any) -> SimulatorExecutor:
    """Build the executor of a configuration; ConfigError for what is not supported."""
    config = resolve_config(executor)
    if config is None:
        return SimulatorExecutor()
    if isinstance(config, SimulatorExecutor):
        return config
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"executor is {type(config).__name__}; expected a SimulatorExecutor, its configuration "
            "or None."
        )
    name = str(config.get("class", config.get("_target_", SimulatorExecutor.__name__)))
    name = name.rpartition(".")[2]
    if name != SimulatorExecutor.__name__:
        raise ConfigError(
            f"executor {name!r} is not supported, only SimulatorExecutor: a strategy's orders are "
            "executed within their bar (qtorch has no nested execution)."
        )
    # Qlib's form has the arguments under `kwargs`, Hydra's beside the class.
    class_keys = ("class", "_target_", "module_path", "kwargs")
    kwargs = config.get("kwargs") or {k: v for k, v in config.items() if k not in class_keys}
    check_arguments(SimulatorExecutor, constructor_signature(SimulatorExecutor), kwargs)
    return SimulatorExecutor(**kwargs)


def _build_exchange(
    exchange_kwargs: Mapping[str, Any] | None, source: Any, time_per_step: str | None
) -> Exchange:
    """Build the exchange, whose bars have the executor's `time_per_step` if that is set."""
    kwargs = dict(resolve_config(exchange_kwargs) or {})
    exchange_config = kwargs.pop("exchange", None)
    if exchange_config is None:
        if source is not None:
            kwargs["source"] = source
        if time_per_step is not None:
            kwargs.setdefault("freq", time_per_step)
        exchange = Exchange(**kwargs)
    else:
        if kwargs:
            raise ConfigError(
                f"exchange_kwargs contains an exchange; {sorted(kwargs)} must be arguments of it."
            )
        if source is not None:
            raise ConfigError("the exchange has its own source; do not pass source as well.")
        exchange = init_instance_by_config(
            exchange_config, "qtorch.backtest", accept_types=Exchange
        )
        if not isinstance(exchange, Exchange):
            raise ConfigError(
                f"exchange is {type(exchange).__name__}; expected an Exchange or its configuration."
            )
    if time_per_step is not None and frequency(time_per_step) != frequency(exchange.freq):
        raise ConfigError(
            f"the executor's time_per_step is {time_per_step!r}, but the exchange's bars are "
            f"{exchange.freq!r}; set one of them, or both to the same frequency."
        )
    return exchange


def _trading_span(
    start: Any, end: Any, scores: pd.DataFrame | None, calendar: pd.DatetimeIndex
) -> tuple[pd.Timestamp, pd.Timestamp]:
    """Return the first and the last trading bar; by default those that trade the scores."""
    if start is not None and end is not None and as_stamp(start) > last_instant(end):
        raise ConfigError(f"start_time {start} is after end_time {end}.")
    if scores is not None:
        stamps = scores.index.get_level_values(0)
        first, last = pd.Timestamp(stamps.min()), pd.Timestamp(stamps.max())
        rows = date_rows(calendar, first, last)
        if rows.start == rows.stop:
            raise DataError(
                f"the scores cover {first:%Y-%m-%d}..{last:%Y-%m-%d}, but the calendar goes from "
                f"{calendar[0]:%Y-%m-%d} to {calendar[-1]:%Y-%m-%d}."
            )
        # A score is traded one bar later; the calendar may end with the last score.
        start = calendar[min(rows.start + 1, len(calendar) - 1)] if start is None else start
        end = calendar[min(rows.stop, len(calendar) - 1)] if end is None else end
    rows = date_rows(calendar, start, end)
    if rows.start == rows.stop:
        raise DataError(
            f"the backtest has no bar between {start} and {end}; the calendar goes from "
            f"{calendar[0]:%Y-%m-%d} to {calendar[-1]:%Y-%m-%d}."
        )
    return calendar[rows.start], calendar[rows.stop - 1]


def _add_unknown_instruments(quotes: Quotes, scores: Scores) -> Quotes:
    """Add the scored instruments that have no bars to the quotes, as suspended instruments."""
    unknown = scores.instruments.difference(quotes.instruments)
    if not len(unknown):
        return quotes
    if len(unknown) == len(scores.instruments):
        raise DataError(
            f"none of the {len(unknown)} instruments of the scores is on the exchange: the scores "
            f"have e.g. {unknown[0]!r}, the exchange e.g. {quotes.instruments[0]!r}."
        )
    log.warning(
        "%d of %d instruments of the scores have no bars in the backtest and are never traded: "
        "%s%s.",
        len(unknown),
        len(scores.instruments),
        ", ".join(map(str, unknown[:5])),
        ", ..." if len(unknown) > 5 else "",
    )
    return quotes.add_instruments(unknown)


def _open_accounts(
    account: float | Mapping[str, Any],
    quotes: Quotes,
    exchange: Exchange,
    num_members: int,
    execution: SimulatorExecutor,
) -> Account:
    """Open the accounts; initial positions are valued at the last close before the start."""
    holdings = dict(account) if isinstance(account, Mapping) else {"cash": account}
    cash = holdings.pop("cash", 0.0)
    if not _is_finite_number(cash) or cash < 0:
        raise ConfigError(f"account={account!r}: expected an amount of money, zero or more.")
    amount, price = _initial_positions(holdings, quotes, exchange)
    if not cash and not amount.any():
        raise ConfigError("the account has neither cash nor positions.")
    settle_cash = execution.settle_type == "cash"
    return Account.create(cash, amount, price, num_members, settle_cash=settle_cash)


def _is_finite_number(value: Any) -> bool:
    """Whether a value is a finite number, of Python or numpy, and not a bool."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)


def _initial_positions(
    holdings: Mapping[str, Any], quotes: Quotes, exchange: Exchange
) -> tuple[Floats, Floats]:
    """Return amount and price `[N]` of the initial positions; 0 and NaN without a position.

    A position without a price is valued at its last close before the first trading bar.
    """
    amount = np.zeros(len(quotes.instruments))
    price = np.full(len(quotes.instruments), np.nan)
    if not holdings:
        return amount, price
    for name, position in holdings.items():
        check_name("instrument of the account", name, quotes.instruments)
        column = quotes.instruments.get_loc(name)
        position = position if isinstance(position, Mapping) else {"amount": position}
        if not _is_finite_number(position.get("amount")):
            raise ConfigError(
                f"the account's position in {name} is {position}; expected a number as its amount."
            )
        amount[column] = position["amount"]
        price[column] = position.get("price", np.nan)
    start = quotes.dates[quotes.first]
    without_price = [str(n) for n in quotes.instruments[(amount != 0) & np.isnan(price)]]
    if without_price:
        since = start - pd.Timedelta(days=_PRICE_DAYS)
        panel = exchange.source.feature_panel(
            without_price, ["$close"], since, start, exchange.freq
        )
        # Without the last row: the close of the first trading bar is not known when it begins.
        close = panel.column("$close").cpu().numpy().astype(np.float64)[:-1]
        last = pd.DataFrame(close, columns=panel.instruments).ffill().iloc[-1:]
        for name in without_price:
            last_close = last[name].to_numpy() if name in last else np.array([])
            if not len(last_close) or np.isnan(last_close[0]):
                raise DataError(
                    f"instrument {name} of the account has no close in the {_PRICE_DAYS} days "
                    f"before {start:%Y-%m-%d}; set its price."
                )
            price[quotes.instruments.get_loc(name)] = last_close[0]
    return amount, price
