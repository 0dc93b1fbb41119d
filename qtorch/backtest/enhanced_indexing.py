"""Enhanced indexing: tilt a benchmark portfolio towards the scores under a risk model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from qtorch.backtest.exchange import Exchange
from qtorch.backtest.quotes import Bools, Floats
from qtorch.backtest.strategy import StepContext, WeightStrategyBase
from qtorch.core.configured import Configured
from qtorch.core.dates import parse_dates
from qtorch.core.errors import ConfigError, DataError, install_command
from qtorch.core.session import resolve_path
from qtorch.core.tables import read_indexed_table, text_names
from qtorch.core.trust import trust_subclasses
from qtorch.data.source.base import Source

log = logging.getLogger(__name__)


@trust_subclasses
class EnhancedIndexingOptimizer(Configured):
    """Find long-only weights w that sum to 1 and maximise (w - b)'r - lamb * risk(w - b).

    b are the benchmark's weights, r the scores. With d = w - b the risk is d'F C F'd + d'diag(u)d
    of a factor model: exposures F `[N, K]`, factor covariance C `[K, K]`, residual variance u
    `[N]`. `delta` bounds the turnover (the sum of absolute weight changes), `b_dev` the distance
    of each weight from the benchmark, `f_dev` the exposure of d to each factor (one number, or one
    per factor). `scale_return` scales the scores to the volatility that the risk model expects.
    Weights below `epsilon` become 0. If the problem has no solution it is solved again without
    `delta`; if that fails too the current weights are kept. Both cases log a warning.

    Corresponds to Qlib's optimizer of that name (contrib/strategy/optimizer/enhanced_indexing.py).
    Difference: cvxpy chooses the solver, while Qlib always uses ECOS. Needs the extra `optimize`.
    """

    def __init__(
        self,
        lamb: float = 1.0,
        delta: float | None = 0.2,
        b_dev: float | None = 0.01,
        f_dev: float | list[float] | None = None,
        scale_return: bool = True,
        epsilon: float = 5e-5,
        solver_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("lamb", lamb), ("delta", delta), ("b_dev", b_dev), ("f_dev", f_dev)):
            if value is not None and np.min(value) < 0:
                raise ConfigError(f"{name}={value!r}: expected zero or more.")
        self.lamb, self.delta, self.b_dev, self.f_dev = lamb, delta, b_dev, f_dev
        self.scale_return, self.epsilon = scale_return, epsilon
        self.solver_kwargs = dict(solver_kwargs or {})

    def __call__(
        self,
        score: Floats,
        exposure: Floats,
        factor_cov: Floats,
        residual_var: Floats,
        current: Floats,
        benchmark: Floats,
        hold: Bools | None = None,
        sell: Bools | None = None,
    ) -> Floats:
        """Return the weights `[N]`, with sum 1.

        `score`, `residual_var`, the weights `current` and `benchmark`, and the masks are `[N]`,
        `exposure` is `[N, K]`, `factor_cov` `[K, K]`. Instruments of `hold` keep their current
        weight, those of `sell` get weight 0.
        """
        cp = _import_cvxpy()
        if self.scale_return:
            variance = np.einsum("nk,kl,nl->n", exposure, factor_cov, exposure) + residual_var
            spread = score.std()
            # Equal scores are no information: only the risk counts.
            score = score / spread * np.sqrt(variance.mean()) if spread > 0 else score * 0.0
        weight = cp.Variable(len(score), nonneg=True)
        active = weight - benchmark
        # Use the matrix root of the covariance: a sum of squares stays convex despite rounding.
        values, vectors = np.linalg.eigh((factor_cov + factor_cov.T) / 2)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        risk = cp.sum_squares((exposure @ root).T @ active) + residual_var @ cp.square(active)
        objective = cp.Maximize(active @ score - self.lamb * risk)
        low, high = self._bounds(current, benchmark, hold, sell)
        constraints = [cp.sum(weight) == 1, weight >= low, weight <= high]
        if self.f_dev is not None:
            constraints += [cp.abs(exposure.T @ active) <= np.asarray(self.f_dev)]
        problems = [cp.Problem(objective, constraints)]
        if self.delta is not None and current.sum() > 0:  # the first purchase is not limited
            turnover_limit = cp.norm(weight - current, 1) <= self.delta
            problems.insert(0, cp.Problem(objective, [*constraints, turnover_limit]))
        for problem in problems:
            solution = self._solve(cp, problem, weight)
            if solution is not None:
                return solution
        log.warning("enhanced indexing: no feasible portfolio; keeping the current weights")
        return current

    def _bounds(
        self, current: Floats, benchmark: Floats, hold: Bools | None, sell: Bools | None
    ) -> tuple[Floats, Floats]:
        low, high = np.zeros_like(benchmark), np.ones_like(benchmark)
        if self.b_dev is not None:
            low = np.maximum(low, benchmark - self.b_dev)
            high = np.minimum(high, benchmark + self.b_dev)
        if hold is not None:
            low, high = np.where(hold, current, low), np.where(hold, current, high)
        if sell is not None:  # takes precedence over hold
            low, high = np.where(sell, 0.0, low), np.where(sell, 0.0, high)
        return low, high

    def _solve(self, cp: Any, problem: Any, weight: Any) -> Floats | None:
        try:
            problem.solve(**self.solver_kwargs)
        except cp.error.SolverError as error:
            log.warning("enhanced indexing: the solver failed: %s", error)
            return None
        if problem.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
            log.warning("enhanced indexing: the problem is %s", problem.status)
            return None
        if problem.status == cp.OPTIMAL_INACCURATE:
            log.warning("enhanced indexing: the solution is inaccurate")
        weights = np.where(weight.value < self.epsilon, 0.0, weight.value)
        return np.asarray(weights / weights.sum())


def _import_cvxpy() -> Any:
    try:
        import cvxpy  # type: ignore[import-not-found,unused-ignore]  # an extra
    except ImportError as error:
        raise ConfigError(
            f"EnhancedIndexingStrategy needs cvxpy: {install_command('optimize')}."
        ) from error
    return cvxpy


RISK_MODEL_TABLES = ("factor_exp", "factor_cov", "specific_risk", "blacklist")


@dataclass(frozen=True)
class RiskModel:
    """Risk model of one day for the N instruments of `universe` and K factors.

    `exposure [N, K]`, `factor_cov [K, K]`, `specific_risk [N]` (a volatility). Instruments of
    `blacklist` are sold.
    """

    universe: pd.Index
    exposure: Floats
    factor_cov: Floats
    specific_risk: Floats
    blacklist: pd.Index


class EnhancedIndexingStrategy(WeightStrategyBase):
    """Maximise the portfolio's score while penalising its risk relative to a benchmark.

    `riskmodel_root` contains one folder per day (`20210101`) with the tables `factor_exp`,
    `factor_cov`, `specific_risk` (volatilities) and optionally `blacklist`, as .parquet or .csv
    files whose first column is the index; `name_mapping` sets other file names. The benchmark's
    weights are the field `{market}_weight` of the source, or `benchmark_weights`, a table with one
    row per date and one column per instrument. The risk model, the benchmark weights and the
    volumes (an instrument without volume keeps its weight) are those of the previous bar. An
    instrument without a score gets the lowest score of the day. Corresponds to Qlib's
    EnhancedIndexingStrategy. Differences: pickle files are not read; `turn_limit`, which Qlib
    accepts and ignores, is rejected (use `optimizer_kwargs: {delta: ...}`). Needs the extra
    `optimize`.
    """

    needs_signal: ClassVar[bool] = True

    def __init__(
        self,
        *,
        riskmodel_root: str | Path,
        signal: Any = None,
        market: str = "csi500",
        benchmark_weights: pd.DataFrame | None = None,
        name_mapping: Mapping[str, str] | None = None,
        optimizer_kwargs: Mapping[str, Any] | None = None,
        risk_degree: float = 0.95,
    ) -> None:
        super().__init__(signal=signal, risk_degree=risk_degree)
        self.root = resolve_path(riskmodel_root)
        self.market, self.benchmark_weights = market, benchmark_weights
        self.files = dict(name_mapping or {})
        self.optimizer = EnhancedIndexingOptimizer(**dict(optimizer_kwargs or {}))

    def start(
        self,
        exchange: Exchange,
        instruments: pd.Index,
        dates: pd.DatetimeIndex,
        universe: Bools,
    ) -> None:
        if not self.root.is_dir():
            raise DataError(f"riskmodel_root {self.root} is not a folder.")
        self._benchmark_table = (
            self._load_benchmark_weights(exchange.source, exchange.freq, dates)
            if self.benchmark_weights is None
            else _name_axes(self.benchmark_weights)
        )

    def target_weights(self, context: StepContext) -> Floats:
        assert context.score is not None
        weights = np.full(context.score.shape, np.nan)
        if context.previous is None:
            return weights
        day = context.previous.date
        model = self._risk_model(day)
        if model is None:
            log.warning("no risk model for %s: not trading on the next bar", f"{day:%Y-%m-%d}")
            return weights
        # The position of each instrument of the risk model in the market, -1 if it is not there.
        column = context.instruments.get_indexer(model.universe)
        is_in_market = column >= 0
        benchmark = self._get_benchmark_weights(day, model.universe)
        hold = ~(np.nan_to_num(_take_or_nan(context.previous.volume, column)) > 0)
        position_value = context.account.amount * np.nan_to_num(context.account.price)
        # Like the target weights, these are fractions of the invested part of the account.
        # With a degree of 0 all is sold, and they do not matter.
        risk_degree = self.read_risk_degree(context.step) or 1.0
        current_weights = position_value / context.account.value()[:, None] / risk_degree
        for member, score in enumerate(context.score):
            if np.isnan(score).all():
                continue
            model_score = _take_or_nan(score, column)
            target = self.optimizer(
                score=np.where(np.isnan(model_score), np.nanmin(score), model_score),
                exposure=model.exposure,
                factor_cov=model.factor_cov,
                residual_var=model.specific_risk**2,
                current=np.nan_to_num(_take_or_nan(current_weights[member], column)),
                benchmark=benchmark,
                hold=hold,
                sell=np.asarray(model.universe.isin(model.blacklist)),
            )
            weights[member] = 0.0
            # What the optimizer gives to instruments that are not in the market remains cash.
            weights[member, column[is_in_market]] = target[is_in_market]
        return weights

    def _risk_model(self, day: pd.Timestamp) -> RiskModel | None:
        folder = self.root / f"{day:%Y%m%d}"
        if not folder.is_dir():
            return None
        exposure, cov, risks = (self._table(folder, name) for name in RISK_MODEL_TABLES[:3])
        if exposure is None or cov is None or risks is None:
            raise DataError(
                f"{folder} must contain {', '.join(RISK_MODEL_TABLES[:3])} as .parquet or .csv."
            )
        blacklist = self._table(folder, RISK_MODEL_TABLES[3])
        risk = risks.iloc[:, 0]
        return RiskModel(
            universe=exposure.index.astype("str"),
            exposure=exposure.to_numpy(dtype=np.float64),
            factor_cov=_align_factors(cov, exposure.columns).to_numpy(dtype=np.float64),
            # An instrument without a specific risk is treated as the most volatile one.
            specific_risk=risk.reindex(exposure.index)
            .fillna(risk.max())
            .to_numpy(dtype=np.float64),
            blacklist=(
                pd.Index([], dtype="str") if blacklist is None else blacklist.index.astype("str")
            ),
        )

    def _table(self, folder: Path, name: str) -> pd.DataFrame | None:
        """Read a table of the risk model, indexed by its first column; None without such a file."""
        mapped_name = self.files.get(name)
        file_names = [mapped_name] if mapped_name else [f"{name}.parquet", f"{name}.csv"]
        for path in (folder / n for n in file_names):
            if path.exists():
                return read_indexed_table(path)
        return None

    def _get_benchmark_weights(self, day: pd.Timestamp, universe: pd.Index) -> Floats:
        """Return the benchmark's weights of a day: 0 for an instrument that it does not contain."""
        table = self._benchmark_table
        if day not in table.index:
            raise DataError(f"benchmark_weights has no row for {day:%Y-%m-%d}.")
        return np.asarray(table.loc[day].reindex(universe).fillna(0.0), dtype=np.float64)

    def _load_benchmark_weights(
        self, source: Source, freq: str, dates: pd.DatetimeIndex
    ) -> pd.DataFrame:
        name = f"{self.market}_weight"
        if name not in source.fields(freq):
            raise DataError(
                f"the source has no field {name}; pass benchmark_weights, a table with one row per "
                "date and one column per instrument."
            )
        # The first date needs the weights of the bar before it, across the longest holidays.
        begin = dates[0] - pd.Timedelta(days=14)
        panel = source.feature_panel("all", [f"${name}"], begin, dates[-1], freq)
        values = panel.column(f"${name}").cpu().numpy()
        return pd.DataFrame(values, index=panel.calendar, columns=panel.instruments)


def _name_axes(weights: pd.DataFrame) -> pd.DataFrame:
    """Return a user's table of weights with parsed dates, and instruments as text."""
    names = text_names(weights.columns)
    return weights.set_axis(parse_dates(weights.index), axis=0).set_axis(names, axis=1)


def _align_factors(cov: pd.DataFrame, factors: pd.Index) -> pd.DataFrame:
    """Return the factor covariance in the order of the exposure's factors.

    Tables without the same factor names (compared as text) are expected to have the same order.
    Raises DataError for another number of factors.
    """
    names = factors.astype("str")
    if cov.shape != (len(names), len(names)):
        raise DataError(
            f"factor_cov has the shape {cov.shape}, but factor_exp has {len(names)} factors; "
            "expected one row and one column per factor."
        )
    cov = cov.set_axis(cov.index.astype("str"), axis=0).set_axis(cov.columns.astype("str"), axis=1)
    is_ordered = all(axis.equals(names) for axis in cov.axes)
    has_names = all(axis.is_unique and set(axis) == set(names) for axis in cov.axes)
    return cov.loc[names, names] if has_names and not is_ordered else cov


def _take_or_nan(values: Floats, index: Any) -> Floats:
    """Return the values at the given indices, NaN for an index of -1."""
    return np.where(index >= 0, values[index], np.nan)
