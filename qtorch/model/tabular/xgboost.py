"""Gradient-boosted trees of XGBoost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qtorch.core.errors import ArgumentError, ConfigError, check_name
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

if TYPE_CHECKING:
    import xgboost

RENAMED_PARAMETERS = {"n_estimators": "num_boost_round", "num_round": "num_boost_round"}
# Parameters of the training, which a booster's own configuration does not list.
TRAINING_PARAMETERS = ("eval_metric", "verbosity")
SEED_NAMES = ("seed", "random_state")
# Objectives with several scores of a sample, with groups of samples, and with censored labels.
REFUSED_OBJECTIVES = ("multi:", "rank:", "survival:")


class XGBModel(BoostedTrees):
    """XGBoost on rows of features; needs the extra `xgboost`.

    Boosting stops when the last metric of the valid segment has not improved for
    `early_stopping_rounds` (0: never), at the latest after `num_boost_round` rounds; the trees up
    to that metric's best round are kept. `parameters` are XGBoost's, by name or alias (`objective`
    is the loss, by default the squared error; `device: cuda` trains on a GPU); an unknown one
    raises an error with the nearest name.

    Corresponds to qlib/contrib/model/xgboost.py, whose `fit` takes the rounds. Differences: scores
    are those of the best round (Qlib also adds the trees of the rounds after it), and the seed is
    the session's unless one is set.

    After `fit`: `booster`, `evals_result_` ({"train": {"rmse": [...]}, "valid": {...}}),
    `fit_report_`.
    """

    def __init__(
        self, early_stopping_rounds: int = 50, num_boost_round: int = 1000, **parameters: Any
    ) -> None:
        super().__init__(early_stopping_rounds, num_boost_round)
        _check_parameters(parameters)
        self.params = dict(parameters)

    def _boost(
        self, train: Rows, valid: Rows | None, rounds: Rounds, init_booster: Any = None
    ) -> Boosting:
        library = _import_xgboost()
        sets = [(self._matrix(train), "train")]
        callbacks = [_report_rounds(library, rounds)]
        stops_early = valid is not None and rounds.patience > 0
        if valid is not None:
            sets.append((self._matrix(valid), "valid"))
        if stops_early:
            callbacks.append(library.callback.EarlyStopping(rounds=rounds.patience))
        evaluations: Evaluations = {}
        booster = library.train(
            self._train_parameters(),
            sets[0][0],
            num_boost_round=rounds.limit,
            evals=sets,
            evals_result=evaluations,
            xgb_model=init_booster,
            callbacks=callbacks,
            verbose_eval=False,
        )
        best_round = booster.best_iteration if stops_early else None
        if best_round is not None:
            booster = booster[: best_round + 1]
        return Boosting(
            bytes(booster.save_raw("ubj")),
            {name: dict(values) for name, values in evaluations.items()},
            best_round,
            str(self.params.get("device", "cpu")),
        )

    def _list_evaluations(self) -> dict[str, Any]:
        return list_first_metric(self.evals_result_)

    def _matrix(self, rows: Rows) -> xgboost.DMatrix:
        matrix: xgboost.DMatrix = _import_xgboost().DMatrix(
            rows.x, rows.y, weight=rows.weight, feature_names=library_names(rows.names)
        )
        return matrix

    def _train_parameters(self) -> dict[str, Any]:
        seed = session().seed
        if seed is None or self.params.keys() & set(SEED_NAMES):
            return self.params
        return {"seed": seed, **self.params}

    def _load_booster(self, content: bytes) -> xgboost.Booster:
        booster: xgboost.Booster = _import_xgboost().Booster()
        booster.load_model(bytearray(content))
        return booster

    def _score(self, x: np.ndarray) -> np.ndarray:
        scores = self.booster.predict(_import_xgboost().DMatrix(x), validate_features=False)
        if scores.ndim != 1:
            raise ConfigError(
                f"the objective {self.params.get('objective')!r} gives {scores.shape[1]} scores of "
                "each sample; choose one that gives a single score."
            )
        return np.asarray(scores)

    def get_feature_importance(self, importance_type: str = "weight") -> pd.Series:
        """Return the importance of each feature, sorted; 0 for one that no tree uses.

        `importance_type`: "weight" (how often it splits), "gain" or "cover" (the mean over its
        splits), "total_gain", "total_cover".
        """
        importance = self.booster.get_score(importance_type=importance_type)
        names = library_names(self._require_feature_names())
        return self._sort_importance([importance.get(name, 0.0) for name in names])


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    """Raise ArgumentError for a parameter that XGBoost does not have with this objective."""
    for name, argument in RENAMED_PARAMETERS.items():
        if name in parameters:
            raise ArgumentError(f"use {argument} instead of {name}.")
    objective = str(parameters.get("objective", ""))
    if objective.startswith(REFUSED_OBJECTIVES):
        raise ConfigError(
            f"objective={objective!r}: XGBModel learns one score of each sample by itself; "
            "expected a regression (reg:...) or binary classification (binary:...)."
        )
    if parameters.get("booster") == "gblinear":
        raise ConfigError("booster='gblinear' has no trees: use LinearModel.")
    check_values("XGBModel", parameters, _find_fault)
    valid_names = _parameter_names(parameters)
    for name in parameters:
        check_name("parameter of XGBoost", name, valid_names, error=ArgumentError)


def _parameter_names(parameters: Mapping[str, Any]) -> list[str]:
    """Return the names of XGBoost's parameters, for the booster and objective that are set."""
    config = _complete_parameters(parameters)
    return sorted({*_leaf_names(config), *TRAINING_PARAMETERS})


def _find_fault(parameters: Mapping[str, Any]) -> str | None:
    """Return what XGBoost says against the values of parameters; None if it takes them."""
    try:
        _complete_parameters(parameters)
    except _import_xgboost().core.XGBoostError as error:
        return str(error).partition("Stack trace")[0].strip()
    return None


def _complete_parameters(parameters: Mapping[str, Any]) -> Any:
    """Return XGBoost's own description of its parameters, with those that are not set."""
    library = _import_xgboost()
    # One sample is enough for a booster to fill in its configuration, which lists the names.
    sample = library.DMatrix(np.zeros((1, 1)), np.zeros(1))
    booster = library.Booster({**parameters, "verbosity": 0, "device": "cpu"}, [sample])
    return json.loads(booster.save_config())


def _leaf_names(config: Any) -> Iterator[str]:
    """Yield the names of the values of nested mappings."""
    if isinstance(config, list):
        for part in config:
            yield from _leaf_names(part)
    elif isinstance(config, dict):
        for name, part in config.items():
            if isinstance(part, list | dict):
                yield from _leaf_names(part)
            else:
                yield name


def _report_rounds(library: Any, rounds: Rounds) -> Any:
    """Return a callback that reports finished rounds."""

    class Report(library.callback.TrainingCallback):  # type: ignore[misc]  # known at run time
        def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
            rounds.report(epoch, evals_log)
            return False

    return Report()


def _import_xgboost() -> Any:
    with require_library("XGBModel", "XGBoost", "xgboost"):
        import xgboost
    return xgboost
