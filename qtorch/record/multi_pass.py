"""MultiPassPortAnaRecord: how much a backtest depends on its random initial portfolio."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from qtorch.core.errors import ConfigError, RecordError
from qtorch.core.instantiate import flatten_dict
from qtorch.record.base import Names
from qtorch.record.portfolio import PRED, PortAnaRecord
from qtorch.record.signal_analysis import finite_metrics
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

_FIGURES = ("annualized_return", "information_ratio")


class MultiPassPortAnaRecord(PortAnaRecord):
    """Runs `pass_num` backtests with random initial portfolios; records mean and std of the risk.

    With `shuffle_init_score` the scores of the first trading day are shuffled among its
    instruments, differently in each pass (by `seed`). All passes run together, one score column
    each. Writes `multi_pass_port_analysis_1day` with `mean`, `std` and `mean_std` (their ratio) of
    the annualised return and the information ratio, and logs metrics such as
    `mean.excess_return_with_cost.annualized_return`. The strategy's signal must be `<PRED>`.
    Corresponds to Qlib's MultiPassPortAnaRecord.
    """

    artifact_path: ClassVar[str | None] = "portfolio_analysis"

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
    ) -> None:
        super().__init__(
            recorder, config, risk_analysis_freq, skip_existing=skip_existing, dataset=dataset
        )
        if pass_num < 2:
            raise ConfigError(f"pass_num={pass_num!r}: expected at least 2 passes.")
        if PRED not in str(getattr(self.strategy, "_arguments", self.strategy)):
            raise ConfigError(f"MultiPassPortAnaRecord needs a strategy with signal: {PRED}.")
        self.pass_num, self.shuffle_init_score, self.seed = pass_num, shuffle_init_score, seed

    def generate(self) -> dict[str, Any] | None:
        if self.skip_existing and all(self._has_artifact(self.get_path(n)) for n in self.list()):
            log.info("skipped the passes: their artifacts exist")
            return None
        self.check()
        result = self._run_backtest(self._shuffle_first_day(self.load("pred.pkl").iloc[:, 0]))
        objects: dict[str, Any] = {}
        metrics: dict[str, float] = {}
        for freq in self.risk_freqs:
            risks = [self._analyze(member)[0][f"port_analysis_{freq}.pkl"] for member in result]
            figures = pd.concat([risk["risk"] for risk in risks], axis=1)
            figures = figures[figures.index.get_level_values(1).isin(_FIGURES)]
            statistics = pd.DataFrame({"mean": figures.mean(axis=1), "std": figures.std(axis=1)})
            statistics["mean_std"] = statistics["mean"] / statistics["std"].where(
                statistics["std"] > 0
            )
            objects[f"multi_pass_port_analysis_{freq}.pkl"] = statistics
            nested_values = {c: statistics[c].unstack().T.to_dict() for c in statistics}
            metrics |= {str(k): float(v) for k, v in flatten_dict(nested_values).items()}
        self.recorder.log_batch(finite_metrics(metrics), step=0)
        self.save(**objects)
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
