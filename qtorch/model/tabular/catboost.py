"""Gradient-boosted trees of CatBoost."""

from __future__ import annotations

import inspect
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from qtorch.core.errors import ArgumentError, check_name
from qtorch.core.session import session
from qtorch.model.tabular.base import Rows
from qtorch.model.tabular.boosting import (
    BoostedTrees,
    Boosting,
    Evaluations,
    Rounds,
    check_values,
    library_names,
    list_first_metric,
    require_library,
)
from qtorch.process.heartbeat import beat

if TYPE_CHECKING:
    import catboost

log = logging.getLogger(__name__)

LOSSES = ("RMSE", "MAE", "MAPE", "Poisson", "Quantile", "LogCosh", "Logloss", "CrossEntropy")
# CatBoost's names of parameters that are arguments of CatBoostModel.
RENAMED_PARAMETERS = {
    **dict.fromkeys(("loss_function", "objective"), "loss"),
    **dict.fromkeys(("iterations", "n_estimators", "num_trees"), "num_boost_round"),
    "od_wait": "early_stopping_rounds",
}
# The library's own names; `verbose_eval` is one that its classes for scikit-learn do not take.
OTHER_PARAMETERS = ("verbose_eval",)
LOG_NAMES = ("verbose", "verbose_eval", "silent", "logging_level")
SEED_NAMES = ("random_seed", "random_state")
# The parts of CatBoost's source that read the values of parameters.
OPTION_SOURCES = ("private/libs/options", "enum_parser", "libs/metrics", "util/string/cast")


class CatBoostModel(BoostedTrees):
    """CatBoost on rows of features; needs the extra `catboost`.

    `loss`: "RMSE", "Logloss" (labels 0 and 1), or another CatBoost loss with one score (MAE, MAPE,
    Poisson, Quantile, LogCosh, CrossEntropy). Boosting stops when the metric of the valid segment
    has not improved for `early_stopping_rounds` (0: never), at the latest after `num_boost_round`
    rounds; the trees up to its best round are kept. `parameters` are CatBoost's, by name or alias;
    an unknown one raises an error with the nearest name. It trains on a GPU if there is one
    (`task_type: CPU` prevents that); on the CPU, where CatBoost has no Poisson bootstrap, the
    Bernoulli bootstrap takes its place, with a warning.

    Corresponds to qlib/contrib/model/catboost_model.py, whose `fit` takes the rounds. Difference:
    the seed is the session's unless one is set.

    After `fit`: `booster`, `evals_result_` ({"train": {"RMSE": [...]}, "valid": {...}}),
    `fit_report_`.
    """

    def __init__(
        self,
        loss: str = "RMSE",
        early_stopping_rounds: int = 50,
        num_boost_round: int = 1000,
        **parameters: Any,
    ) -> None:
        check_name("loss of CatBoostModel", loss.partition(":")[0], LOSSES)
        super().__init__(early_stopping_rounds, num_boost_round)
        _check_parameters(parameters)
        self.loss = loss
        self.params = dict(parameters)
        check_values("CatBoostModel", {**parameters, "loss_function": loss}, _find_fault)

    def _boost(
        self, train: Rows, valid: Rows | None, rounds: Rounds, init_booster: Any = None
    ) -> Boosting:
        library = _import_catboost()
        parameters = self._train_parameters()
        stops_early = valid is not None and rounds.patience > 0
        if stops_early:
            parameters["early_stopping_rounds"] = rounds.patience
        # CatBoost has no callbacks on a GPU.
        callbacks = [_Report(rounds)] if parameters["task_type"] == "CPU" else None
        beat("training", epoch=0)
        booster = library.CatBoost({**parameters, "iterations": rounds.limit})
        booster.fit(
            _pool(library, train),
            eval_set=None if valid is None else _pool(library, valid),
            use_best_model=stops_early,
            init_model=init_booster,
            callbacks=callbacks,
        )
        results = booster.get_evals_result()
        return Boosting(
            _save_booster(booster),
            _rename_segments(results),
            booster.get_best_iteration() if stops_early else None,
            str(parameters["task_type"]).lower(),
        )

    def _list_evaluations(self) -> dict[str, Any]:
        return list_first_metric(self.evals_result_)

    def _train_parameters(self) -> dict[str, Any]:
        defaults: dict[str, Any] = {"allow_writing_files": False, "task_type": _default_device()}
        if not self.params.keys() & set(LOG_NAMES):
            defaults["logging_level"] = "Silent"
        if session().seed is not None and not self.params.keys() & set(SEED_NAMES):
            defaults["random_seed"] = session().seed
        parameters = {**defaults, **self.params, "loss_function": self.loss}
        if parameters["task_type"] == "CPU" and _has_poisson_bootstrap(parameters):
            log.warning(
                "bootstrap_type=Poisson needs a GPU; on the CPU it is Bernoulli, which draws the "
                "same share of the samples. To be without this warning, set "
                "bootstrap_type=Bernoulli."
            )
            parameters["bootstrap_type"] = "Bernoulli"
        return parameters

    def _load_booster(self, content: bytes) -> catboost.CatBoost:
        booster: catboost.CatBoost = _import_catboost().CatBoost()
        booster.load_model(blob=content)
        return booster

    def _score(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.booster.predict(np.ascontiguousarray(x)))

    def get_feature_importance(self, importance_type: str = "PredictionValuesChange") -> pd.Series:
        """Return the importance of each feature, sorted: how much it changes the scores, in %."""
        return self._sort_importance(self.booster.get_feature_importance(type=importance_type))


def _default_device() -> str:
    """Return "GPU" if there is one, as in Qlib (CatBoost's own count writes to stderr if not)."""
    return "GPU" if torch.cuda.is_available() else "CPU"


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    """Raise ArgumentError for a parameter that CatBoost does not have."""
    library = _import_catboost()
    classes = (library.CatBoostRegressor, library.CatBoostClassifier)
    names = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    valid_names = sorted({*names, *OTHER_PARAMETERS} - {"self"} - set(RENAMED_PARAMETERS))
    for name in parameters:
        if name in RENAMED_PARAMETERS:
            raise ArgumentError(f"use {RENAMED_PARAMETERS[name]} instead of {name}.")
        check_name("parameter of CatBoost", name, valid_names, error=ArgumentError)


def _find_fault(parameters: Mapping[str, Any]) -> str | None:
    """Return what CatBoost says against the values of parameters on a CPU; None if it takes them.

    It reads them when it trains, for which a few rows are enough. Values that do not fit these rows
    may fit the user's.
    """
    if parameters.get("task_type", _default_device()) == "GPU":
        return None
    library = _import_catboost()
    replaced = {*LOG_NAMES, *(["bootstrap_type"] if _has_poisson_bootstrap(parameters) else [])}
    booster = library.CatBoost(
        {name: value for name, value in parameters.items() if name not in replaced}
        | {"allow_writing_files": False, "logging_level": "Silent", "iterations": 1}
    )
    try:
        booster.fit(library.Pool(np.arange(8.0).reshape(4, 2), np.array([0.0, 1.0, 0.0, 1.0])))
    except library.CatBoostError as error:
        place, _, reason = str(error).partition(": ")
        return reason if any(part in place for part in OPTION_SOURCES) else None
    return None


def _has_poisson_bootstrap(parameters: Mapping[str, Any]) -> bool:
    return bool(parameters.get("bootstrap_type") == "Poisson")


def _pool(library: Any, rows: Rows) -> catboost.Pool:
    pool: catboost.Pool = library.Pool(
        np.ascontiguousarray(rows.x),
        rows.y,
        weight=rows.weight,
        feature_names=library_names(rows.names),
    )
    return pool


def _save_booster(booster: catboost.CatBoost) -> bytes:
    """Return a booster in CatBoost's binary format, which it writes to a file only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.cbm")
        booster.save_model(str(path), format="cbm")
        return path.read_bytes()


def _rename_segments(evaluations: Mapping[str, Mapping[str, Any]]) -> Evaluations:
    """Return the metrics of CatBoost's segments with the names of ours."""
    names = {"train": "learn", "valid": "validation"}
    return {name: dict(evaluations[key]) for name, key in names.items() if key in evaluations}


class _Report:
    """Reports finished rounds; a callback of CatBoost, which counts them from 1."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds

    def after_iteration(self, info: Any) -> bool:
        self.rounds.report(info.iteration - 1, _rename_segments(info.metrics))
        return True


def _import_catboost() -> Any:
    with require_library("CatBoostModel", "CatBoost", "catboost"):
        import catboost
    return catboost
