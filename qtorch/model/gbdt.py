"""Gradient-boosted trees of LightGBM, the usual baseline of networks on tabular features."""

from __future__ import annotations

import logging
import re
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import ArgumentError, ConfigError, nearest, unknown_name
from qtorch.core.heartbeat import beat
from qtorch.core.session import session
from qtorch.model.base import ModelFT
from qtorch.model.tabular import Rows, TabularModel
from qtorch.tracking.current import current_recorder

if TYPE_CHECKING:
    import lightgbm

    from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

LOSSES = ("mse", "mae", "huber", "fair", "quantile", "binary")
# What LightGBM calls what has an argument of its own here.
OWN = {
    "objective": "loss",
    "num_iterations": "num_boost_round",
    "early_stopping_round": "early_stopping_rounds",
}
FINETUNE_ROUNDS = 10


class LGBModel(TabularModel, ModelFT):
    """LightGBM on rows of features; needs the extra `lightgbm`.

    `loss`: "mse", "binary" (a label of 0 and 1), or another of LightGBM's for one score (mae,
    huber, fair, quantile). Boosting stops when no metric of the segment valid has improved for
    `early_stopping_rounds` (0: never), at the latest after `num_boost_round`; the best round's
    trees stay. `parameters` are LightGBM's own, by name or alias; an unknown one is an error that
    names the nearest.

    Answers to qlib/contrib/model/gbdt.py. Differences: the seed is the session's unless one is
    given, equal runs give equal trees (`deterministic`, `force_col_wise`), and `finetune` works.

    After `fit`: `booster`, `evals_result_` ({"train": {"l2": [...]}, "valid": {...}}),
    `fit_report_`.
    """

    def __init__(
        self,
        loss: str = "mse",
        early_stopping_rounds: int = 50,
        num_boost_round: int = 1000,
        **parameters: Any,
    ) -> None:
        if loss not in LOSSES:
            raise ConfigError(unknown_name("loss of LGBModel", loss, LOSSES))
        self.loss = loss
        self.early_stopping_rounds = early_stopping_rounds
        self.num_boost_round = num_boost_round
        self.params = _canonical(parameters)
        self.model_text_: str | None = None
        self.evals_result_: dict[str, dict[str, list[float]]] = {}
        self.fit_report_: dict[str, Any] = {}
        self._booster: Any = None

    @property
    def booster(self) -> lightgbm.Booster:
        """LightGBM's own model; `booster.save_model(path)` writes its text."""
        self._learnt_names()
        if getattr(self, "_booster", None) is None:  # a pickle is without it
            self._booster = _lightgbm().Booster(model_str=self.model_text_)
        booster: lightgbm.Booster = self._booster
        return booster

    # -- learning ------------------------------------------------------------------------------

    def fit(
        self, dataset: Any, reweighter: Any = None, *, recorder: Recorder | None = None
    ) -> None:
        """Boost on the segment train, stopped by valid where there is one.

        The metrics of each round go to the recorder as `train/l2`, `valid/l2`. Raises DataError
        where there is nothing to learn from.
        """
        train = self._rows(dataset, "train", reweighter)
        valid = None
        if "valid" in getattr(dataset, "segments", ("valid",)):
            valid = self._rows(dataset, "valid", reweighter, train.names)
        self._boost(train, valid, self.num_boost_round, recorder)

    def finetune(
        self,
        dataset: Any,
        reweighter: Any = None,
        *,
        recorder: Recorder | None = None,
        num_boost_round: int = FINETUNE_ROUNDS,
    ) -> None:
        """More rounds on the segment train of a dataset, on top of the fitted trees.

        Raises NotFittedError before `fit`, DataError where a feature that was learnt is missing.
        """
        names = self._learnt_names()
        train = self._rows(dataset, "train", reweighter, names)
        self._boost(train, None, num_boost_round, recorder, self.booster)

    def _boost(
        self,
        train: Rows,
        valid: Rows | None,
        rounds: int,
        recorder: Recorder | None,
        start: Any = None,
    ) -> None:
        library, begin = _lightgbm(), time.perf_counter()
        data = library.Dataset(
            train.x, train.y, weight=train.weight, feature_name=_shown(train.names)
        )
        sets = {"train": data}
        found: dict[str, dict[str, list[float]]] = {}
        callbacks = [library.record_evaluation(found), _beat]
        if valid is not None:
            sets["valid"] = data.create_valid(valid.x, valid.y, weight=valid.weight)
            if self.early_stopping_rounds > 0:
                stop = library.early_stopping(self.early_stopping_rounds, verbose=False)
                callbacks.append(stop)
        booster = library.train(
            self._parameters(),
            data,
            num_boost_round=rounds,
            valid_sets=list(sets.values()),
            valid_names=list(sets),
            init_model=start,
            callbacks=callbacks,
        )
        self.model_text_ = booster.model_to_string()
        self._booster, self.feature_names_ = None, train.names
        self.evals_result_ = {name: dict(values) for name, values in found.items()}
        self._report(train, valid, booster.best_iteration, time.perf_counter() - begin)
        run = current_recorder() if recorder is None else recorder
        if run is not None:
            _log(self.evals_result_, run)

    def _parameters(self) -> dict[str, Any]:
        fixed: dict[str, Any] = {"verbosity": -1, "deterministic": True}
        if session().seed is not None:
            fixed["seed"] = session().seed
        if not self.params.keys() & {"force_col_wise", "force_row_wise"}:
            fixed["force_col_wise"] = True  # by the clock it would choose now one, now the other
        return {**fixed, **self.params, "objective": self.loss}

    def _report(self, train: Rows, valid: Rows | None, best: int, seconds: float) -> None:
        segment = "train" if valid is None else "valid"
        metric, values = next(iter(self.evals_result_[segment].items()))
        self.fit_report_ = {
            "epochs": len(values),  # rounds
            "best_epoch": best - 1 if best > 0 else None,
            "monitor": f"{segment}/{metric}",
            "best_value": values[best - 1],
            "seconds": seconds,
            "samples": len(train),
            "valid_samples": 0 if valid is None else len(valid),
            "samples_per_second": len(train) * len(values) / seconds,
            "device": "cpu",
        }
        log.info("%d rounds in %.1f s", len(values), seconds)

    # -- what was learnt -----------------------------------------------------------------------

    def _score(self, x: np.ndarray) -> np.ndarray:
        scores: np.ndarray = np.asarray(self.booster.predict(x))
        return scores

    def get_feature_importance(self, importance_type: str = "split") -> pd.Series:
        """How often each feature splits ("split"), or how much that gained ("gain"), by size."""
        values = self.booster.feature_importance(importance_type=importance_type)
        return pd.Series(values, index=list(self._learnt_names())).sort_values(ascending=False)

    def _fitted_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fitted = {"evals_result": self.evals_result_, "fit_report": self.fit_report_}
        text = np.frombuffer((self.model_text_ or "").encode(), dtype=np.uint8)
        return fitted, {"model_text": torch.tensor(text)}

    def _take_state(self, fitted: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.model_text_ = tensors["model_text"].numpy().tobytes().decode()
        self.evals_result_, self.fit_report_ = fitted["evals_result"], fitted["fit_report"]


def _beat(env: Any) -> None:
    beat("training", epoch=env.iteration)


def _log(found: dict[str, dict[str, list[float]]], recorder: Recorder) -> None:
    flat = {f"{seg}/{name}": v for seg, metrics in found.items() for name, v in metrics.items()}
    for step in range(max(map(len, flat.values()), default=0)):
        recorder.log_batch({name: values[step] for name, values in flat.items()}, step=step)


def _shown(names: tuple[str, ...]) -> list[str]:
    """Names as LightGBM takes them: without JSON's own characters."""
    shown = [re.sub(r"[\s\",:\[\]{}]", "_", name) for name in names]
    return shown if len(set(shown)) == len(names) else [f"feature{k}" for k in range(len(names))]


def _canonical(parameters: dict[str, Any]) -> dict[str, Any]:
    """LightGBM's parameters under their own names; an ArgumentError for what is none."""
    names = _names()
    out: dict[str, Any] = {}
    for given, value in parameters.items():
        if given not in names:
            valid = {*names.values(), *OWN.values()} - set(OWN)
            if nearest(given, valid) is None:
                valid |= set(names)
            raise ArgumentError(unknown_name("parameter of LightGBM", given, valid))
        name = names[given]
        if name in OWN:
            raise ArgumentError(f"{given} is given as {OWN[name]} here.")
        if name in out:
            raise ArgumentError(f"{given} and another name of {name} are both given.")
        out[name] = value
    return out


def _names() -> dict[str, str]:
    """Each name that LightGBM knows, aliases too, and what it is an alias of."""
    known = _lightgbm().basic._ConfigAliases._get_all_param_aliases()  # it is told nowhere else
    return {alias: name for name, aliases in known.items() for alias in (name, *aliases)}


def _lightgbm() -> Any:
    try:
        import lightgbm
    except ModuleNotFoundError as error:
        if error.name != "lightgbm":
            raise
        raise ConfigError("LGBModel needs LightGBM: pip install 'qtorch[lightgbm]'.") from error
    return lightgbm
