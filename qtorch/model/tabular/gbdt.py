"""Gradient-boosted trees of LightGBM, the usual baseline for networks on tabular features."""

from __future__ import annotations

import logging
import re
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import (
    ArgumentError,
    ConfigError,
    check_name,
    install_command,
    nearest_name,
    unknown_name_message,
)
from qtorch.core.session import session
from qtorch.model.base import ModelFT
from qtorch.model.input_schema import has_valid_segment
from qtorch.model.tabular.base import Rows, TabularModel
from qtorch.process.heartbeat import beat
from qtorch.tracking.recorder import current_recorder

if TYPE_CHECKING:
    import lightgbm

    from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

LOSSES = ("mse", "mae", "huber", "fair", "quantile", "binary")
# LightGBM's names of parameters that are arguments of LGBModel.
RENAMED_PARAMETERS = {
    "objective": "loss",
    "num_iterations": "num_boost_round",
    "early_stopping_round": "early_stopping_rounds",
}
FINETUNE_ROUNDS = 10


class LGBModel(TabularModel, ModelFT):
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
        self.loss = loss
        self.early_stopping_rounds = early_stopping_rounds
        self.num_boost_round = num_boost_round
        self.params = _resolve_parameters(parameters)
        self.model_text_: str | None = None
        self.evals_result_: dict[str, dict[str, list[float]]] = {}
        self.fit_report_: dict[str, Any] = {}
        self._booster: Any = None  # is not stored, but rebuilt from model_text_

    @property
    def booster(self) -> lightgbm.Booster:
        """The LightGBM booster; `booster.save_model(path)` writes it as text."""
        self._require_feature_names()
        if getattr(self, "_booster", None) is None:  # a loaded model lacks the attribute
            self._booster = _import_lightgbm().Booster(model_str=self.model_text_)
        booster: lightgbm.Booster = self._booster
        return booster

    # -- training ------------------------------------------------------------------------------

    def fit(
        self,
        dataset: Any,
        reweighter: Any = None,
        *,
        recorder: Recorder | None = None,
        evals_result: dict[str, Any] | None = None,
    ) -> None:
        """Train on the segment "train", with early stopping on "valid" if the dataset has it.

        The metrics of each round are logged to the recorder as `train/l2`, `valid/l2`, and written
        into `evals_result`, as in Qlib: `{"train": {"l2": [...]}, "valid": {...}}`. Raises
        DataError if there is nothing to learn from.
        """
        train = self._rows(dataset, "train", reweighter)
        valid = None
        if has_valid_segment(dataset):
            valid = self._rows(dataset, "valid", reweighter, train.names)
        self._boost(train, valid, self.num_boost_round, recorder)
        if evals_result is not None:
            evals_result.update(self.evals_result_)

    def finetune(
        self,
        dataset: Any,
        reweighter: Any = None,
        *,
        recorder: Recorder | None = None,
        num_boost_round: int = FINETUNE_ROUNDS,
    ) -> None:
        """Train more rounds on the segment "train", on top of the fitted trees.

        Raises NotFittedError before `fit`, and DataError if a feature of the training is missing.
        """
        names = self._require_feature_names()
        train = self._rows(dataset, "train", reweighter, names)
        self._boost(train, None, num_boost_round, recorder, self.booster)

    def _boost(
        self,
        train: Rows,
        valid: Rows | None,
        rounds: int,
        recorder: Recorder | None,
        init_model: Any = None,
    ) -> None:
        library, start_time = _import_lightgbm(), time.perf_counter()
        data = library.Dataset(
            train.x, train.y, weight=train.weight, feature_name=_lightgbm_names(train.names)
        )
        sets = {"train": data}
        evaluations: dict[str, dict[str, list[float]]] = {}
        callbacks = [library.record_evaluation(evaluations), _beat_iteration]
        if valid is not None:
            sets["valid"] = data.create_valid(valid.x, valid.y, weight=valid.weight)
            if self.early_stopping_rounds > 0:
                callbacks.append(library.early_stopping(self.early_stopping_rounds, verbose=False))
        booster = library.train(
            self._train_parameters(),
            data,
            num_boost_round=rounds,
            valid_sets=list(sets.values()),
            valid_names=list(sets),
            init_model=init_model,
            callbacks=callbacks,
        )
        self.model_text_ = booster.model_to_string()
        self._booster, self.feature_names_ = None, train.names
        self.evals_result_ = {name: dict(values) for name, values in evaluations.items()}
        seconds = time.perf_counter() - start_time
        self.fit_report_ = self._make_fit_report(train, valid, booster.best_iteration, seconds)
        log.info("trained %d rounds in %.1f s", self.fit_report_["epochs"], seconds)
        run = current_recorder() if recorder is None else recorder
        if run is not None:
            _log_metrics(self.evals_result_, run)

    def _train_parameters(self) -> dict[str, Any]:
        defaults: dict[str, Any] = {"verbosity": -1, "deterministic": True}
        if session().seed is not None:
            defaults["seed"] = session().seed
        if not self.params.keys() & {"force_col_wise", "force_row_wise"}:
            # Otherwise LightGBM chooses by timing, which is not reproducible.
            defaults["force_col_wise"] = True
        return {**defaults, **self.params, "objective": self.loss}

    def _make_fit_report(
        self, train: Rows, valid: Rows | None, best_iteration: int, seconds: float
    ) -> dict[str, Any]:
        """Return a report with the keys of the networks', in which a round is an epoch.

        `best_iteration` counts from 1, as in LightGBM; it is 0 without early stopping.
        """
        segment = "train" if valid is None else "valid"
        metric, values = next(iter(self.evals_result_[segment].items()))
        has_best = best_iteration > 0
        return {
            "epochs": len(values),
            "best_epoch": best_iteration - 1 if has_best else None,
            "monitor": f"{segment}/{metric}",
            "best_value": values[best_iteration - 1] if has_best else values[-1],
            "seconds": seconds,
            "samples": len(train),
            "valid_samples": 0 if valid is None else len(valid),
            "samples_per_second": len(train) * len(values) / seconds,
            "device": "cpu",
        }

    # -- fitted model -----------------------------------------------------------------------

    def _score(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.booster.predict(x))

    def get_feature_importance(self, importance_type: str = "split") -> pd.Series:
        """Return how often each feature splits ("split") or the total gain ("gain"), sorted."""
        values = self.booster.feature_importance(importance_type=importance_type)
        importance = pd.Series(values, index=list(self._require_feature_names()))
        return importance.sort_values(ascending=False)

    def _get_fitted_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fitted_state = {"evals_result": self.evals_result_, "fit_report": self.fit_report_}
        text = np.frombuffer((self.model_text_ or "").encode(), dtype=np.uint8)
        return fitted_state, {"model_text": torch.tensor(text)}

    def _load_fitted_state(self, fitted_state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.model_text_ = tensors["model_text"].numpy().tobytes().decode()
        self.evals_result_ = fitted_state["evals_result"]
        self.fit_report_ = fitted_state["fit_report"]


def _beat_iteration(env: Any) -> None:
    """Report a finished round to the heartbeat; a callback of LightGBM."""
    beat("training", epoch=env.iteration)


def _log_metrics(evaluations: dict[str, dict[str, list[float]]], recorder: Recorder) -> None:
    values_by_metric = {
        f"{segment}/{name}": values
        for segment, metrics in evaluations.items()
        for name, values in metrics.items()
    }
    for step, values in enumerate(zip(*values_by_metric.values(), strict=True)):
        recorder.log_batch(dict(zip(values_by_metric, values, strict=True)), step=step)


def _lightgbm_names(names: tuple[str, ...]) -> list[str]:
    """Return feature names that LightGBM accepts: without JSON's special characters."""
    # Two names can become equal without those characters; then all features are numbered.
    clean_names = [re.sub(r"[\s\",:\[\]{}]", "_", name) for name in names]
    if len(set(clean_names)) < len(names):
        return [f"feature{k}" for k in range(len(names))]
    return clean_names


def _resolve_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return LightGBM's parameters by canonical name; unknown ones raise ArgumentError."""
    canonical_names = _canonical_parameter_names()
    out: dict[str, Any] = {}
    for alias, value in parameters.items():
        if alias not in canonical_names:
            valid = {*canonical_names.values(), *RENAMED_PARAMETERS.values()}
            valid -= set(RENAMED_PARAMETERS)
            if nearest_name(alias, valid) is None:  # suggest an alias only if no name is near
                valid |= set(canonical_names)
            raise ArgumentError(unknown_name_message("parameter of LightGBM", alias, valid))
        name = canonical_names[alias]
        if name in RENAMED_PARAMETERS:
            raise ArgumentError(f"use {RENAMED_PARAMETERS[name]} instead of {alias}.")
        if name in out:
            raise ArgumentError(f"{alias} and another alias of {name} are both set.")
        out[name] = value
    return out


def _canonical_parameter_names() -> dict[str, str]:
    """Return the canonical name of each of LightGBM's parameters by name and by alias."""
    # There is no public API for this.
    aliases_by_name = _import_lightgbm().basic._ConfigAliases._get_all_param_aliases()
    return {alias: name for name, aliases in aliases_by_name.items() for alias in (name, *aliases)}


def _import_lightgbm() -> Any:
    try:
        import lightgbm
    except ModuleNotFoundError as error:
        if error.name != "lightgbm":  # a dependency of LightGBM is missing
            raise
        raise ConfigError(f"LGBModel needs LightGBM: {install_command('lightgbm')}.") from error
    return lightgbm
