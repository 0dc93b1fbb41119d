"""Gradient-boosted trees of LightGBM, the usual baseline for networks on tabular features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qtorch.core.errors import ArgumentError, check_name, nearest_name, unknown_name_message
from qtorch.core.session import session
from qtorch.model.tabular.base import Rows
from qtorch.model.tabular.boosting import (
    BoostedTrees,
    Boosting,
    Evaluations,
    Rounds,
    check_values,
    library_names,
    require_library,
)

if TYPE_CHECKING:
    import lightgbm

LOSSES = ("mse", "mae", "huber", "fair", "quantile", "binary")
# LightGBM's names of parameters that are arguments of LGBModel.
RENAMED_PARAMETERS = {
    "objective": "loss",
    "num_iterations": "num_boost_round",
    "early_stopping_round": "early_stopping_rounds",
}
# Parameters whose values fit certain data or devices only; LightGBM checks them when it trains.
DATA_PARAMETERS = (
    "categorical_feature",
    "device_type",
    "feature_contri",
    "forcedbins_filename",
    "forcedsplits_filename",
    "interaction_constraints",
    "monotone_constraints",
)


class LGBModel(BoostedTrees):
    """LightGBM on rows of features; needs the extra `lightgbm`.

    `loss`: "mse", "binary" (labels 0 and 1), or another LightGBM loss with one score (mae, huber,
    fair, quantile). Boosting stops when a metric of the valid segment has not improved for
    `early_stopping_rounds` (0: never), at the latest after `num_boost_round` rounds; the trees up
    to that metric's best round are kept. `parameters` are LightGBM's, by name or alias; an unknown
    one raises an error with the nearest name.

    Corresponds to qlib/contrib/model/gbdt.py. Differences: the seed is the session's unless one is
    set, equal runs give equal trees (`deterministic`, `force_col_wise`), and `finetune` works.

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
        check_name("loss of LGBModel", loss, LOSSES)
        super().__init__(early_stopping_rounds, num_boost_round)
        self.loss = loss
        self.params = resolve_parameters(parameters)
        check_parameter_values("LGBModel", self.params)

    def _boost(
        self, train: Rows, valid: Rows | None, rounds: Rounds, init_booster: Any = None
    ) -> Boosting:
        parameters = {**self.params, "objective": self.loss}
        return boost_lightgbm(parameters, train, valid, rounds, init_booster)

    def _load_booster(self, content: bytes) -> lightgbm.Booster:
        return load_lightgbm(content)

    def _score(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.booster.predict(x))

    def get_feature_importance(self, importance_type: str = "split") -> pd.Series:
        """Return how often each feature splits ("split") or the total gain ("gain"), sorted."""
        return self._sort_importance(
            self.booster.feature_importance(importance_type=importance_type)
        )


def boost_lightgbm(
    parameters: Mapping[str, Any],
    train: Rows,
    valid: Rows | None,
    rounds: Rounds,
    init_booster: Any = None,
) -> Boosting:
    """Train LightGBM on rows; equal rows, parameters and seeds give equal trees."""
    library = _import_lightgbm()
    data = library.Dataset(
        train.x, train.y, weight=train.weight, feature_name=library_names(train.names)
    )
    sets = {"train": data}
    evaluations: Evaluations = {}

    def report_round(env: Any) -> None:
        """Report a finished round; LightGBM calls it after the values are in `evaluations`."""
        rounds.report(env.iteration, evaluations)

    report_round.order = 25  # type: ignore[attr-defined]  # LightGBM's place for it: 20 records
    callbacks = [library.record_evaluation(evaluations), report_round]
    if valid is not None:
        sets["valid"] = data.create_valid(valid.x, valid.y, weight=valid.weight)
        if rounds.patience > 0:
            callbacks.append(library.early_stopping(rounds.patience, verbose=False))
    booster = library.train(
        _add_defaults(parameters),
        data,
        num_boost_round=rounds.limit,
        valid_sets=list(sets.values()),
        valid_names=list(sets),
        init_model=init_booster,
        callbacks=callbacks,
    )
    best = booster.best_iteration  # counts from 1; 0 without early stopping
    return Boosting(
        booster.model_to_string().encode(),
        {name: dict(values) for name, values in evaluations.items()},
        best - 1 if best > 0 else None,
    )


def load_lightgbm(content: bytes) -> lightgbm.Booster:
    """Return the booster that `boost_lightgbm` has saved."""
    booster: lightgbm.Booster = _import_lightgbm().Booster(model_str=content.decode())
    return booster


def _add_defaults(parameters: Mapping[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"verbosity": -1, "deterministic": True}
    if session().seed is not None:
        defaults["seed"] = session().seed
    if not parameters.keys() & {"force_col_wise", "force_row_wise"}:
        # Otherwise LightGBM chooses by timing, which is not reproducible.
        defaults["force_col_wise"] = True
    return {**defaults, **parameters}


def resolve_parameters(
    parameters: Mapping[str, Any], renames: Mapping[str, str] = RENAMED_PARAMETERS
) -> dict[str, Any]:
    """Return LightGBM's parameters by canonical name; unknown ones raise ArgumentError.

    `renames` are LightGBM's names of parameters that are arguments of the model.
    """
    canonical_names = _canonical_parameter_names()
    out: dict[str, Any] = {}
    for alias, value in parameters.items():
        if alias not in canonical_names:
            valid = {*canonical_names.values(), *renames.values()}
            valid -= set(renames)
            if nearest_name(alias, valid) is None:  # suggest an alias only if no name is near
                valid |= set(canonical_names)
            raise ArgumentError(unknown_name_message("parameter of LightGBM", alias, valid))
        name = canonical_names[alias]
        if name in renames:
            raise ArgumentError(f"use {renames[name]} instead of {alias}.")
        if name in out:
            raise ArgumentError(f"{alias} and another alias of {name} are both set.")
        out[name] = value
    return out


def check_parameter_values(model: str, parameters: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value that LightGBM does not take, by canonical name of parameter."""
    values = {name: value for name, value in parameters.items() if name not in DATA_PARAMETERS}
    check_values(model, values, _find_fault)


def _find_fault(parameters: Mapping[str, Any]) -> str | None:
    """Return what LightGBM says against the values of parameters; None if it takes them."""
    library = _import_lightgbm()
    # A booster reads all parameters before it sees its data, of which a few rows are enough.
    rows = np.arange(128.0).reshape(64, 2)
    data = library.Dataset(rows, rows[:, 0], params={"verbosity": -1})
    try:
        library.Booster({**parameters, "verbosity": -1}, data)
    except library.basic.LightGBMError as error:
        return str(error).partition(" at /")[0].strip()  # without the place in its source
    return None


def _canonical_parameter_names() -> dict[str, str]:
    """Return the canonical name of each of LightGBM's parameters by name and by alias."""
    # There is no public API for this.
    aliases_by_name = _import_lightgbm().basic._ConfigAliases._get_all_param_aliases()
    return {alias: name for name, aliases in aliases_by_name.items() for alias in (name, *aliases)}


def _import_lightgbm() -> Any:
    with require_library("LGBModel", "LightGBM", "lightgbm"):
        import lightgbm
    return lightgbm
