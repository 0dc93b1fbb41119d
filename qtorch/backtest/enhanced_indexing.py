"""A benchmark's portfolio, bent towards the scores within a risk model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qtorch.backtest.exchange import Exchange
from qtorch.backtest.optimizer import EnhancedIndexingOptimizer
from qtorch.backtest.quotes import Bools, Floats
from qtorch.backtest.strategy import Moment
from qtorch.backtest.weights import WeightStrategy
from qtorch.core.errors import ConfigError, DataError
from qtorch.data.source.base import Source

log = logging.getLogger(__name__)

FILES = ("factor_exp", "factor_cov", "specific_risk", "blacklist")


@dataclass(frozen=True)
class RiskModel:
    """A day's risk model: exposures `[U, K]`, covariance `[K, K]`, residual volatility `[U]`."""

    universe: pd.Index
    exposure: Floats
    factor_cov: Floats
    residual: Floats
    blacklist: pd.Index


class EnhancedIndexingStrategy(WeightStrategy):
    """Maximises the score of the weights against the risk of leaving the benchmark.

    `riskmodel_root` holds a folder a day (`20210101`) with `factor_exp`, `factor_cov`,
    `specific_risk` (volatilities) and, if there is one, `blacklist`, as .parquet or .csv tables
    whose first column is the index; `name_mapping` gives other file names. `market`: the
    benchmark's weights are the field `{market}_weight` of the source, or `benchmark_weights`, a
    table with a row a date and a column an instrument. Risk model, weights and what had volume are
    those of the bar before. What has no score counts as the lowest. Answers to Qlib's strategy of
    that name. Differences: no pickles are read; `turn_limit`, which Qlib does not use, is
    refused (`optimizer_kwargs: {delta: ...}`). Needs the extra `optimize`.
    """

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
        if signal is None:
            raise ConfigError("EnhancedIndexingStrategy needs signal: scores, or (model, dataset).")
        self.root = Path(riskmodel_root)
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
            raise DataError(f"riskmodel_root {self.root} is no folder.")
        if self.benchmark_weights is None:
            self.benchmark_weights = self._from_source(exchange.source, exchange.freq, dates)

    def target_weights(self, now: Moment) -> Floats:
        assert now.score is not None
        weights = np.full(now.score.shape, np.nan)
        if now.before is None:
            return weights
        day = now.before.date
        model = self._risk_model(day)
        if model is None:
            log.warning("no risk model for %s: nothing is traded", f"{day:%Y-%m-%d}")
            return weights
        place = now.instruments.get_indexer(model.universe)
        bench = self._benchmark(day, model.universe)
        hold = ~(np.nan_to_num(_taken(now.before.volume, place)) > 0)
        current = now.account.amount * np.nan_to_num(now.account.price)
        shares = current / now.account.value()[:, None] / self.risk_degree
        for member, score in enumerate(now.score):
            if np.isnan(score).all():
                continue
            found = self.optimizer(
                np.where(np.isnan(s := _taken(score, place)), np.nanmin(score), s),
                model.exposure,
                model.factor_cov,
                model.residual**2,
                np.nan_to_num(_taken(shares[member], place)),
                bench,
                hold,
                np.asarray(model.universe.isin(model.blacklist)),
            )
            weights[member] = 0.0
            weights[member, place[place >= 0]] = found[place >= 0]
        return weights

    def _checked(self, weights: pd.DataFrame) -> pd.DataFrame:
        return weights  # scores, not weights

    def _risk_model(self, day: pd.Timestamp) -> RiskModel | None:
        folder = self.root / f"{day:%Y%m%d}"
        if not folder.is_dir():
            return None
        exposure, cov, residual = (self._table(folder, name) for name in FILES[:3])
        if exposure is None or cov is None or residual is None:
            raise DataError(f"{folder} needs {', '.join(FILES[:3])} as .parquet or .csv.")
        black = self._table(folder, FILES[3])
        risk = residual.iloc[:, 0]
        return RiskModel(
            exposure.index.astype("str"),
            exposure.to_numpy(dtype=np.float64),
            cov.to_numpy(dtype=np.float64),
            # Without a figure of its own an instrument counts as the most volatile.
            risk.reindex(exposure.index).fillna(risk.max()).to_numpy(dtype=np.float64),
            pd.Index([], dtype="str") if black is None else black.index.astype("str"),
        )

    def _table(self, folder: Path, name: str) -> pd.DataFrame | None:
        given = self.files.get(name)
        for path in (
            [folder / given] if given else [folder / f"{name}.parquet", folder / f"{name}.csv"]
        ):
            if path.exists():
                if path.suffix == ".parquet":
                    return pd.read_parquet(path)
                return pd.read_csv(path, index_col=0)
        return None

    def _benchmark(self, day: pd.Timestamp, universe: pd.Index) -> Floats:
        table = self.benchmark_weights
        assert table is not None
        if day not in table.index:
            raise DataError(f"the benchmark has no weights on {day:%Y-%m-%d}.")
        return np.asarray(table.loc[day].reindex(universe).fillna(0.0), dtype=np.float64)

    def _from_source(self, source: Source, freq: str, dates: pd.DatetimeIndex) -> pd.DataFrame:
        name = f"{self.market}_weight"
        if name not in source.fields(freq):
            raise DataError(
                f"the source has no field {name}; give benchmark_weights, a table with a row a "
                "date and a column an instrument."
            )
        begin = dates[0] - pd.Timedelta(days=14)
        panel = source.feature_panel("all", [f"${name}"], begin, dates[-1], freq)
        values = panel.column(f"${name}").cpu().numpy()
        return pd.DataFrame(values, index=panel.calendar, columns=panel.instruments)


def _taken(values: Floats, place: Any) -> Floats:
    """Values at places, NaN where a place is -1."""
    return np.where(place >= 0, values[place], np.nan)
