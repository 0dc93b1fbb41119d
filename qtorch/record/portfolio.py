"""PortAnaRecord: a backtest of the scores, its risk analysis and its trade indicators."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from qtorch.backtest.exchange import Exchange
from qtorch.backtest.result import BacktestResult, period_name, resample_indicators, resample_report
from qtorch.backtest.run import backtest, build_executor, check_backtest
from qtorch.backtest.simulate import DELISTINGS
from qtorch.backtest.strategy import Strategy, TopkDropoutStrategy
from qtorch.core.dates import date_rows
from qtorch.core.errors import AuditError, ConfigError, LoadObjectError, RecordError, check_name
from qtorch.core.instantiate import (
    check_config,
    fill_placeholder,
    flatten_dict,
    get_callable_kwargs,
    resolve_config,
)
from qtorch.core.session import get_region, session
from qtorch.data.handler.handler import DataHandler
from qtorch.data.handler.loader import split_universe
from qtorch.data.source.base import Source
from qtorch.data.source.frame import build_source, default_source
from qtorch.metrics.portfolio import indicator_analysis
from qtorch.metrics.risk import periods_per_year, risk_analysis
from qtorch.record.base import Names, Record
from qtorch.record.signal import SignalRecord, finite_metrics
from qtorch.tracking.recorder import Recorder, current_recorder

log = logging.getLogger(__name__)

PRED = "<PRED>"
SCORED = "scored"
PERIODS = "periods_per_year"  # metric: the number of bars in a year of the annual figures
DEFAULT_CONFIG: dict[str, Any] = {
    "strategy": {
        "class": "TopkDropoutStrategy",
        "kwargs": {"signal": PRED, "topk": 50, "n_drop": 5},
    },
    "backtest": {
        "account": 1e8,
        "exchange_kwargs": {
            "deal_price": "close",
            "open_cost": 0.0005,
            "close_cost": 0.0015,
            "min_cost": 5,
        },
    },
}
STRATEGY_MODULE = "qtorch.backtest"
_AUDITS = ("error", "warning", "off")
_PARTS = ("strategy", "executor", "backtest")
_PASS_FIGURES = ("annualized_return", "information_ratio")


class PortAnaRecord(Record):
    """Backtests `pred.pkl` with a strategy; writes to `portfolio_analysis/` and logs metrics.

    `config` has three parts: `strategy` and `executor`, each an object or a configuration in
    Qlib's or Hydra's form, in which `"<PRED>"` stands for the run's scores (their first column),
    and `backtest`, the other arguments of `qtorch.backtest.backtest`. Without dates the backtest
    runs from the first bar of the scores to the bar after the last. Without a `benchmark` (or with
    "scored") the benchmark is the mean return of the scored instruments; `benchmark: null` means
    none. Bars come from `source` in `exchange_kwargs`, else from the dataset's source, else from
    that of `qtorch.init`, and have the frequency of the executor or the exchange, else of the
    dataset. `region` ("us", "cn", "tw"; default: the session's) sets the price limit, the trade
    unit and the bars per year of annual figures, unless the exchange sets them.

    Writes, for the frequency of the bars ("1day") and each other requested frequency:
    `report_normal_1day`, `positions_normal_1day` and `orders_normal_1day` (both only for the
    bars), `indicators_normal_1day`, `port_analysis_1day`, `indicator_analysis_1day`. Logs metrics
    such as `1day.excess_return_with_cost.annualized_return` (`1day.return_with_cost...` without a
    benchmark), `1day.periods_per_year` (of the annual figures), `1day.ffr`, `1day.pa` and
    `1day.pos`. `risk_analysis_freq` and `indicator_analysis_freq` are the frequencies to analyse;
    coarser ones are aggregated.

    When all is stored and logged the backtest is audited (`BacktestResult.check`): with `audit`
    "error" a fault is a RecordError, with "warning" it is logged, with "off" nothing is checked.
    Positions in instruments whose bars end are stored as `delistings_normal_1day`, their number is
    the metric `1day.ended_positions`.

    Corresponds to Qlib's PortAnaRecord. As there, positions are a mapping of dates to positions
    (`qtorch.backtest.Positions`, whose `frame` has them by datetime and instrument). Differences:
    coarser frequencies need no executor of their own; the default benchmark is not CSI 300, the
    default price limit is the region's and not 0.095. With `as_qlib: true` in the part `backtest`
    the numbers are Qlib's, also those of the risk analysis.
    """

    artifact_path: ClassVar[str | None] = "portfolio_analysis"
    depend_cls: ClassVar[type[Record] | None] = SignalRecord
    input_artifacts: ClassVar[tuple[str, ...]] = ("pred.pkl",)

    def __init__(
        self,
        recorder: Recorder | None = None,
        config: Mapping[str, Any] | None = None,
        risk_analysis_freq: str | Sequence[str] | None = None,
        indicator_analysis_freq: str | Sequence[str] | None = None,
        indicator_analysis_method: str = "mean",
        skip_existing: bool = False,
        *,
        dataset: Any = None,
        audit: str = "error",
        region: str | None = None,
    ) -> None:
        super().__init__(recorder)
        check_name("audit", audit, _AUDITS)
        settings = dict(resolve_config(config or DEFAULT_CONFIG))
        for part in settings:
            check_name("part of the config", part, _PARTS)
        self.strategy = settings.get("strategy", DEFAULT_CONFIG["strategy"])
        self.executor = settings.get("executor")
        self.backtest = dict(settings.get("backtest", DEFAULT_CONFIG["backtest"]))
        for freq in (risk_analysis_freq, indicator_analysis_freq):
            _period_names(freq, "1day")  # raises early for an unknown frequency
        self._risk_analysis_freq = risk_analysis_freq
        self._indicator_analysis_freq = indicator_analysis_freq
        self.indicator_analysis_method = indicator_analysis_method
        self.skip_existing = skip_existing
        self.dataset = dataset
        self.audit = audit
        self.region = region

    @property
    def freq(self) -> str:
        """The frequency of the bars, as in the names of the artifacts: "1day", "30min".

        It is the executor's or the exchange's, else the dataset's, else the source's.
        """
        return period_name(_bar_freq(self.executor, self.backtest) or self._data_freq() or "day")

    @property
    def risk_freqs(self) -> list[str]:
        """The frequencies of the risk analysis."""
        return _period_names(self._risk_analysis_freq, self.freq)

    @property
    def indicator_freqs(self) -> list[str]:
        """The frequencies of the indicator analysis."""
        return _period_names(self._indicator_analysis_freq, self.freq)

    def generate(self) -> dict[str, Any] | None:
        """Backtest, store and log; return the stored objects, or None if skipped."""
        if self.skip_existing and self._is_complete():
            return None
        self.check()
        result = self._run_backtest(self.load("pred.pkl").iloc[:, :1])
        objects, metrics = self._analyze(result)
        self.recorder.log_batch(finite_metrics(metrics), step=0)
        self.save(**objects)
        self._log_summary(metrics)
        self._audit(result)
        return objects

    def list(self) -> Names:
        names = [f"{kind}_normal_{self.freq}.pkl" for kind in ("report", "positions", "indicators")]
        names += [f"port_analysis_{freq}.pkl" for freq in self.risk_freqs]
        return names + [f"indicator_analysis_{freq}.pkl" for freq in self.indicator_freqs]

    def check_settings(self) -> None:
        """Build strategy and exchange, which load nothing yet, and check the other settings."""
        get_region(self.region)
        settings = dict(self.backtest)
        exchange = dict(settings.pop("exchange_kwargs", None) or {})
        check_config({"_target_": backtest, **settings})
        if "delisting" in settings:
            check_name("delisting", settings["delisting"], DELISTINGS)
        account = settings.get("account", 1.0)
        if not isinstance(account, Mapping) and not _is_positive(account):
            raise ConfigError(f"account is {account!r}; expected a positive number.")
        if "exchange" not in exchange:
            check_config({"_target_": Exchange, **exchange})
            Exchange(**{k: v for k, v in exchange.items() if k != "source"})
        build_executor(self.executor)
        strategy = self._strategy(PRED)
        if isinstance(strategy, Mapping):
            target, arguments = get_callable_kwargs(strategy, STRATEGY_MODULE)
            if str(target.__module__).startswith("qtorch."):
                check_config({"_target_": target, **arguments})
                target(**arguments)

    def check_names(self, dataset: Any, *, is_loaded: bool = False) -> None:
        """Raise an error for a name or a date in the config that the bars do not have.

        `dataset`: that of the task. Bars of a source that only knows its names from them are not
        read, but for the dataset's if it `is_loaded`.
        """
        self.dataset = dataset
        exchange = (self.backtest.get("exchange_kwargs") or {}).get("exchange")
        source = self._bars_source()
        if source is None or isinstance(exchange, Mapping):  # an exchange may have its own source
            self._check_num_instruments()
            return
        if source.knows_names or (is_loaded and source is self._source()):
            settings = self._backtest_settings()
            if _is_scored(settings["benchmark"]):
                settings["benchmark"] = None
            for name in ("delisting", "as_qlib"):
                settings.pop(name, None)
            check_backtest(executor=self.executor, **settings)
        self._check_num_instruments()

    def _check_num_instruments(self) -> None:
        num_instruments = self._count_instruments()
        if num_instruments is not None:
            self.check_universe(num_instruments)

    def _count_instruments(self) -> int | None:
        """Return how many instruments the test segment has at most; None if data must be read."""
        handler, source = self._handler(), self._source()
        if handler is None:
            return None
        instruments, _ = split_universe(handler.instruments)  # filters leave fewer
        if isinstance(instruments, list | tuple):
            return len(instruments)
        calendar = handler.find_calendar()
        if source is None or calendar is None or not source.knows_names:
            return None
        rows = date_rows(calendar, *self.dataset.segments.get("test", (None, None)))
        if rows.start >= rows.stop:
            return None
        return len(source.select_members(instruments, calendar, rows))

    def check_universe(self, num_instruments: int) -> None:
        """Raise ConfigError if the strategy is to hold more instruments than there are scores of.

        The backtest raises the same error, but after the training.
        """
        topk: Any
        if isinstance(self.strategy, TopkDropoutStrategy):
            topk = self.strategy.topk
        elif isinstance(self.strategy, Mapping):
            name = str(self.strategy.get("_target_", self.strategy.get("class", "")))
            options = self.strategy if "_target_" in self.strategy else self.strategy.get("kwargs")
            is_topk = name.rpartition(".")[2] == TopkDropoutStrategy.__name__
            topk = (options or {}).get("topk") if is_topk else None
        else:
            return
        if isinstance(topk, int) and topk > num_instruments:
            raise ConfigError(
                f"topk={topk} is more than the {num_instruments} instruments of the test segment: "
                "set a smaller one (portfolio.topk=... of a command; in Python topk of the "
                "strategy in PortAnaRecord's config)."
            )

    # -- the backtest ----------------------------------------------------------------------------

    def _run_backtest(self, scores: pd.DataFrame) -> BacktestResult:
        """Run the backtest, with one member per score column."""
        settings = self._backtest_settings()
        if settings.get("start_time") is None:
            settings["start_time"] = scores.index.get_level_values("datetime").min()
        instruments = scores.index.get_level_values("instrument").unique()
        if _is_scored(settings["benchmark"]):
            settings["benchmark"] = [str(i) for i in instruments]
        return backtest(
            strategy=self._strategy(scores),
            executor=fill_placeholder(self.executor, {PRED: scores}),
            **settings,
        )

    def _backtest_settings(self) -> dict[str, Any]:
        """Return the arguments of the backtest but for its strategy and executor."""
        settings = {"benchmark": SCORED, **self.backtest}
        exchange = dict(settings.get("exchange_kwargs") or {})
        if "exchange" not in exchange:
            exchange = {"freq": self.freq, **exchange}
            if self.region is not None:
                exchange.setdefault("region", self.region)
            if "source" not in exchange and not settings.get("source"):
                settings["source"] = self._source()
        return settings | {"exchange_kwargs": exchange}

    def _strategy(self, scores: pd.DataFrame | str) -> Any:
        """Return the strategy, or its configuration, with the scores as its signal."""
        strategy = self.strategy
        if isinstance(strategy, Strategy):
            if isinstance(strategy.signal, str) and strategy.signal == PRED:
                return type(strategy)(**{**strategy._arguments, "signal": scores})
            return strategy
        config = fill_placeholder(strategy, {PRED: scores})
        if isinstance(config, dict) and str(config.get("module_path", "")).startswith("qlib."):
            del config["module_path"]  # qtorch has strategies with the same names as Qlib's
        return config

    def _source(self) -> Source | None:
        """Return the dataset's source of bars; None means that of `qtorch.init`."""
        handler = self._handler()
        return None if handler is None else handler.bars_source()

    def _handler(self) -> DataHandler | None:
        """Return the handler of the run's dataset; None if there is none of qtorch's."""
        if self.dataset is None and (self._recorder or current_recorder()) is not None:
            try:
                self.dataset = self.recorder.load_object("dataset")
            except LoadObjectError:
                return None
        # A dataset without a handler may be a part of one with it, such as that of a rolling study.
        dataset = getattr(self.dataset, "full_dataset", self.dataset)
        handler = getattr(dataset, "handler", None)
        return handler if isinstance(handler, DataHandler) else None

    def _data_freq(self) -> str | None:
        """Return the frequency of the dataset, else of the source; None if there is neither."""
        handler = self._handler() if self._own_source() is None else None
        freq = None if handler is None else handler.frequency()
        if freq is not None:
            return freq
        source = self._bars_source()
        return None if source is None else source.resolve_frequency()

    def _own_source(self) -> Any:
        """Return the source in the config, or its configuration; None without one."""
        exchange = self.backtest.get("exchange_kwargs") or {}
        live_exchange = exchange.get("exchange")
        if isinstance(live_exchange, Exchange):
            return live_exchange.source
        source = exchange.get("source")
        return self.backtest.get("source") if source is None else source

    def _bars_source(self) -> Source | None:
        """Return the source of the backtest: the config's, else the dataset's, else the session's.

        None if there is none of them.
        """
        config = self._own_source()
        source = self._source() if config is None else build_source(config)
        if source is None and session().provider_uri is not None:
            source = default_source()
        return source

    def _audit(self, result: BacktestResult) -> None:
        """Check the backtest; what it is about is stored by now."""
        if self.audit == "off":
            return
        try:
            checked = result.check()
        except AuditError as error:
            hint = "audit=warning logs this and continues"
            if self.audit == "error":
                raise RecordError(f"{error}\nAll is stored; {hint}.") from error
            log.error("%s", error)
        else:
            log.info(
                "audited the backtest: %d days, %d positions, %d orders, %d of their prices",
                checked.num_days,
                checked.num_positions,
                checked.num_orders,
                checked.num_prices,
            )

    # -- the analysis ----------------------------------------------------------------------------

    def _analyze(self, result: BacktestResult) -> tuple[dict[str, Any], dict[str, float]]:
        """Return the artifacts and metrics of one member."""
        freq_name = period_name(result.freq)
        if freq_name != self.freq:
            raise RecordError(
                f"the exchange trades {freq_name} bars, but the config says {self.freq}."
            )
        reports, trades = {self.freq: result.report}, {self.freq: result.indicators}
        for freq in {*self.risk_freqs, *self.indicator_freqs} - {self.freq}:
            reports[freq] = resample_report(result.report, freq)
            trades[freq] = resample_indicators(result.indicators, freq)
        objects: dict[str, Any] = {
            f"positions_normal_{self.freq}.pkl": result.positions_normal,
            f"orders_normal_{self.freq}.pkl": result.orders,
            f"delistings_normal_{self.freq}.pkl": result.delistings,
        }
        objects |= {f"report_normal_{freq}.pkl": frame for freq, frame in reports.items()}
        objects |= {f"indicators_normal_{freq}.pkl": frame for freq, frame in trades.items()}
        metrics = {f"{self.freq}.ended_positions": float(len(result.delistings))}
        as_qlib = bool(self.backtest.get("as_qlib"))
        for freq in self.risk_freqs:
            periods = self._periods_per_year(freq, reports[freq])
            analysis = analyze_risk(reports[freq], freq, periods, as_qlib=as_qlib)
            metrics[f"{freq}.{PERIODS}"] = periods
            objects[f"port_analysis_{freq}.pkl"] = analysis
            nested_values = analysis["risk"].unstack().T.to_dict()
            metrics |= {f"{freq}.{name}": v for name, v in flatten_dict(nested_values).items()}
        for freq in self.indicator_freqs:
            method: Any = self.indicator_analysis_method
            analysis = indicator_analysis(trades[freq], method)
            objects[f"indicator_analysis_{freq}.pkl"] = analysis
            metrics |= {f"{freq}.{name}": v for name, v in analysis["value"].items()}
        return objects, metrics

    def _periods_per_year(self, freq: str, report: pd.DataFrame) -> float:
        """Return how many bars a year has in annual figures; Qlib's number for `as_qlib`."""
        if self.backtest.get("as_qlib"):
            return periods_per_year(freq, region="cn")
        return periods_per_year(freq, region=self.region, dates=report.index)

    def _log_summary(self, metrics: Mapping[str, float]) -> None:
        for name in ("excess_return_with_cost", "return_with_cost"):
            prefix = f"{self.freq}.{name}"
            if f"{prefix}.annualized_return" in metrics:
                log.info(
                    "%s: %.2f%% per year (of %g bars), information ratio %.2f, max drawdown %.2f%%",
                    name.replace("_", " "),
                    100 * metrics[f"{prefix}.annualized_return"],
                    metrics[f"{self.freq}.{PERIODS}"],
                    metrics[f"{prefix}.information_ratio"],
                    100 * metrics[f"{prefix}.max_drawdown"],
                )


def analyze_risk(
    report: pd.DataFrame, freq: str, periods: float | None = None, *, as_qlib: bool = False
) -> pd.DataFrame:
    """Analyse the risk of a report's excess returns over the benchmark, without and with cost.

    Without a benchmark the returns themselves are analysed. Both tables are concatenated.
    `periods` is the number of bars per year, by default that of `freq`.
    """
    periods = periods_per_year(freq, dates=report.index) if periods is None else periods
    if report["bench"].isna().all():
        name, returns = "return", report["return"]
    else:
        name, returns = "excess_return", report["return"] - report["bench"]
    series = {
        f"{name}_without_cost": returns,
        f"{name}_with_cost": returns - report["cost"],
    }
    return pd.concat({key: risk_analysis(r, periods, as_qlib=as_qlib) for key, r in series.items()})


def _period_names(freqs: str | Sequence[str] | None, bars: str) -> list[str]:
    if freqs is None:
        return [bars]
    freq_list = [freqs] if isinstance(freqs, str) else list(freqs)
    return [period_name(f) for f in freq_list]


def _is_scored(benchmark: Any) -> bool:
    return isinstance(benchmark, str) and benchmark == SCORED


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _bar_freq(executor: Any, settings: Mapping[str, Any]) -> str | None:
    """Return the trading frequency: the executor's, else the exchange's; None if it is not set."""
    if isinstance(executor, Mapping):
        kwargs = executor.get("kwargs") or executor
        if kwargs.get("time_per_step"):
            return str(kwargs["time_per_step"])
    exchange = settings.get("exchange_kwargs") or {}
    live_exchange = exchange.get("exchange")
    if isinstance(live_exchange, Mapping):
        exchange = live_exchange.get("kwargs") or live_exchange
    elif live_exchange is not None:
        return str(live_exchange.freq)
    return None if exchange.get("freq") is None else str(exchange["freq"])


class MultiPassPortAnaRecord(PortAnaRecord):
    """Runs `pass_num` backtests with random initial portfolios; records mean and std of the risk.

    With `shuffle_init_score` the scores of the first trading day are shuffled among its
    instruments, differently in each pass (by `seed`). All passes run together, one score column
    each. Writes `multi_pass_port_analysis_1day` with `mean`, `std` and `mean_std` (their ratio) of
    the annualised return and the information ratio, and logs metrics such as
    `mean.excess_return_with_cost.annualized_return`. The strategy's signal must be `<PRED>`.
    Corresponds to Qlib's MultiPassPortAnaRecord.
    """

    def __init__(
        self,
        recorder: Recorder | None = None,
        pass_num: int = 10,
        shuffle_init_score: bool = True,
        config: Mapping[str, Any] | None = None,
        risk_analysis_freq: str | Sequence[str] | None = None,
        skip_existing: bool = False,
        *,
        seed: int = 0,
        dataset: Any = None,
        audit: str = "error",
        region: str | None = None,
    ) -> None:
        super().__init__(
            recorder,
            config,
            risk_analysis_freq,
            skip_existing=skip_existing,
            dataset=dataset,
            audit=audit,
            region=region,
        )
        if pass_num < 2:
            raise ConfigError(f"pass_num={pass_num!r}: expected at least 2 passes.")
        if PRED not in str(getattr(self.strategy, "_arguments", self.strategy)):
            raise ConfigError(f"MultiPassPortAnaRecord needs a strategy with signal: {PRED}.")
        self.pass_num, self.shuffle_init_score, self.seed = pass_num, shuffle_init_score, seed

    def generate(self) -> dict[str, Any] | None:
        if self.skip_existing and self._is_complete():
            return None
        self.check()
        result = self._run_backtest(self._shuffle_first_day(self.load("pred.pkl").iloc[:, 0]))
        objects: dict[str, Any] = {}
        metrics: dict[str, float] = {}
        for freq in self.risk_freqs:
            risks = [self._analyze(member)[0][f"port_analysis_{freq}.pkl"] for member in result]
            figures = pd.concat([risk["risk"] for risk in risks], axis=1)
            figures = figures[figures.index.get_level_values(1).isin(_PASS_FIGURES)]
            statistics = pd.DataFrame({"mean": figures.mean(axis=1), "std": figures.std(axis=1)})
            statistics["mean_std"] = statistics["mean"] / statistics["std"].where(
                statistics["std"] > 0
            )
            objects[f"multi_pass_port_analysis_{freq}.pkl"] = statistics
            nested_values = {c: statistics[c].unstack().T.to_dict() for c in statistics}
            metrics |= {str(k): float(v) for k, v in flatten_dict(nested_values).items()}
        self.recorder.log_batch(finite_metrics(metrics), step=0)
        self.save(**objects)
        self._audit(result)
        return objects

    def list(self) -> Names:
        return [f"multi_pass_port_analysis_{freq}.pkl" for freq in self.risk_freqs]

    def _shuffle_first_day(self, scores: pd.Series) -> pd.DataFrame:
        """Return the scores with one column per pass, each with the first trading day shuffled."""
        days = scores.index.get_level_values("datetime")
        start = self.backtest.get("start_time")
        trading_days = days if start is None else days[days >= pd.Timestamp(start)]
        if not len(trading_days):
            raise RecordError(f"there are no scores from {start} on; the last day is {days.max()}.")
        first = np.flatnonzero(days == trading_days.min())
        columns = {}
        for pass_index in range(self.pass_num):
            values = scores.to_numpy(copy=True)
            if self.shuffle_init_score:
                random = np.random.default_rng([self.seed, pass_index])
                values[first] = random.permutation(values[first])
            columns[f"pass{pass_index}"] = values
        return pd.DataFrame(columns, index=scores.index)
