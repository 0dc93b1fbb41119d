"""How much of a backtest is the luck of its first portfolio."""

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
from qtorch.record.signal_analysis import finite
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

_FIGURES = ("annualized_return", "information_ratio")


class MultiPassPortAnaRecord(PortAnaRecord):
    """`pass_num` backtests whose first portfolios are random; mean and spread of their figures.

    With `shuffle_init_score` the scores of the first day traded on are shuffled among its
    instruments, in each pass another way (by `seed`). All passes run at once, a score column each.
    Writes `multi_pass_port_analysis_1day` with `mean`, `std` and `mean_std` of the annualised
    return and the information ratio; logs `mean.excess_return_with_cost.annualized_return` and the
    like. The strategy's signal must be `<PRED>`. Answers to Qlib's record of that name.
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
            raise ConfigError(f"pass_num={pass_num!r}: a spread needs two passes at least.")
        if PRED not in str(getattr(self.strategy, "_arguments", self.strategy)):
            raise ConfigError(f"MultiPassPortAnaRecord needs a strategy with signal: {PRED}.")
        self.pass_num, self.shuffle_init_score, self.seed = pass_num, shuffle_init_score, seed

    def generate(self) -> dict[str, Any] | None:
        if self.skip_existing and all(self._holds(self.get_path(n)) for n in self.list()):
            log.info("the passes are there already and stay as they are")
            return None
        self.check()
        result = self._run(self._shuffled(self.load("pred.pkl").iloc[:, 0]))
        objects: dict[str, Any] = {}
        metrics: dict[str, float] = {}
        for freq in self.risk_freqs:
            risks = [self._analysed(member)[0][f"port_analysis_{freq}.pkl"] for member in result]
            figures = pd.concat([risk["risk"] for risk in risks], axis=1)
            figures = figures[figures.index.get_level_values(1).isin(_FIGURES)]
            spread = pd.DataFrame({"mean": figures.mean(axis=1), "std": figures.std(axis=1)})
            spread["mean_std"] = spread["mean"] / spread["std"].where(spread["std"] > 0)
            objects[f"multi_pass_port_analysis_{freq}.pkl"] = spread
            nested = {c: spread[c].unstack().T.to_dict() for c in spread}
            metrics |= {str(k): float(v) for k, v in flatten_dict(nested).items()}
        self.recorder.log_batch(finite(metrics), step=0)
        self.save(**objects)
        return objects

    def list(self) -> Names:
        return [f"multi_pass_port_analysis_{freq}.pkl" for freq in self.risk_freqs]

    def _shuffled(self, scores: pd.Series) -> pd.DataFrame:
        """The scores once a pass, those of the first day in another order."""
        days = scores.index.get_level_values("datetime")
        start = self.backtest.get("start_time")
        traded = days if start is None else days[days >= pd.Timestamp(start)]
        if not len(traded):
            raise RecordError(f"no score is from {start} on; the last is of {days.max()}.")
        first = np.flatnonzero(days == traded.min())
        columns = {}
        for number in range(self.pass_num):
            values = scores.to_numpy(copy=True)
            if self.shuffle_init_score:
                random = np.random.default_rng([self.seed, number])
                values[first] = random.permutation(values[first])
            columns[f"pass{number}"] = values
        return pd.DataFrame(columns, index=scores.index)
