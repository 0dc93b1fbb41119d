"""DoubleEnsemble: trees of LightGBM, each trained on other weights of samples and other features.

Zhang et al., "DoubleEnsemble: A New Ensemble Method Based on Sample Reweighting and Feature
Selection for Financial Data Analysis", ICDM 2020.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import Tensor

from qtorch.core.errors import ConfigError, check_count, check_name
from qtorch.core.session import session
from qtorch.model.input_schema import has_valid_segment
from qtorch.model.tabular.base import Rows, TabularModel
from qtorch.model.tabular.boosting import Evaluations, Rounds, bytes_tensor, log_curves
from qtorch.model.tabular.gbdt import (
    boost_lightgbm,
    check_parameter_values,
    load_lightgbm,
    resolve_parameters,
)
from qtorch.tracking.recorder import current_recorder

if TYPE_CHECKING:
    import lightgbm

    from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

SAMPLE_RATIOS = (0.8, 0.7, 0.6, 0.5, 0.4)
# LightGBM's names of parameters that are arguments of DEnsembleModel.
RENAMED_PARAMETERS = {
    "objective": "loss",
    "num_iterations": "epochs",
    "early_stopping_round": "early_stopping_rounds",
}
ENSEMBLE_METRIC = "l2"
CURVE_SHARE = 0.1  # of a loss curve at its beginning and at its end
SMALLEST_SPREAD = 1e-7
WEIGHT_OFFSET = 0.1


class DEnsembleModel(TabularModel):
    """DoubleEnsemble over LightGBM on rows of features; needs the extra `lightgbm`.

    `num_models` models of `epochs` trees each are trained one after another; the score is their
    mean, weighted by `sub_weights`. After each model
    - `enable_sr` weighs the samples for the next one. A sample's h is `alpha1` times the rank of
      its loss under the ensemble (the largest loss has the lowest rank), plus `alpha2` times the
      rank of its loss at the end of the last model's training over that at its beginning. Samples
      are divided into `bins_sr` bins of h; a bin of mean h has the weight 1 / (decay^k h + 0.1)
      after model k: hard samples that are still being learnt count most.
    - `enable_fs` draws the features of the next one. A feature's g is the mean rise of the
      samples' losses, over its standard deviation, when the feature is shuffled over the samples.
      Features are divided into `bins_fs` bins of g, and of each bin a share is drawn:
      `sample_ratios`, from the highest bin to the lowest.

    `parameters` are LightGBM's. With `early_stopping_rounds` each model stops by the valid segment.
    `decay=None` is a decay of 1. Weights of a reweighter multiply those of the samples.

    Corresponds to qlib/contrib/model/double_ensemble.py. Differences: `decay=None` does not fail,
    shuffled features are judged by the same weighted mean as the others (Qlib's is not weighted
    there), a model that has stopped early is judged by the trees that it keeps, features keep
    their order, and it works without a valid segment. The only base model is "gbm", the only loss
    "mse", as in Qlib.

    After `fit`: `boosters`, `sub_features_`, `fit_report_`, and `evals_result_`: the mean squared
    error of the models so far ({"train": {"l2": [...]}, "valid": ...}, by model), and the metrics
    of each model by round ({"model1/train": {"l2": [...]}, ...}).
    """

    def __init__(
        self,
        base_model: str = "gbm",
        loss: str = "mse",
        num_models: int = 6,
        enable_sr: bool = True,
        enable_fs: bool = True,
        alpha1: float = 1.0,
        alpha2: float = 1.0,
        bins_sr: int = 10,
        bins_fs: int = 5,
        decay: float | None = None,
        sample_ratios: Sequence[float] | None = None,
        sub_weights: Sequence[float] | None = None,
        epochs: int = 100,
        early_stopping_rounds: int | None = None,
        **parameters: Any,
    ) -> None:
        check_name("base_model of DEnsembleModel", base_model, ("gbm",))
        check_name("loss of DEnsembleModel", loss, ("mse",))
        for name, count in {"num_models": num_models, "epochs": epochs}.items():
            check_count(f"{name} of DEnsembleModel", count)
        self.base_model, self.loss = base_model, loss
        self.num_models, self.epochs = num_models, epochs
        self.enable_sr, self.enable_fs = enable_sr, enable_fs
        self.alpha1, self.alpha2 = alpha1, alpha2
        self.bins_sr, self.bins_fs = bins_sr, bins_fs
        self.decay = 1.0 if decay is None else decay
        self.sample_ratios = list(SAMPLE_RATIOS if sample_ratios is None else sample_ratios)
        self.sub_weights = [1.0] * num_models if sub_weights is None else list(sub_weights)
        _check_length("sample_ratios", self.sample_ratios, "bins_fs", bins_fs)
        _check_length("sub_weights", self.sub_weights, "num_models", num_models)
        self.early_stopping_rounds = early_stopping_rounds or 0
        self.params = resolve_parameters(parameters, RENAMED_PARAMETERS)
        check_parameter_values("DEnsembleModel", self.params)
        self.contents_: list[bytes] = []
        self.sub_features_: list[list[str]] = []
        self.evals_result_: Evaluations = {}
        self.fit_report_: dict[str, Any] = {}
        self._boosters: list[Any] = []  # are not stored, but rebuilt from contents_

    @property
    def boosters(self) -> list[lightgbm.Booster]:
        """The boosters of LightGBM, one of each model."""
        self._require_feature_names()
        boosters = getattr(self, "_boosters", [])  # a loaded model lacks the attribute
        if len(boosters) < len(self.contents_):
            boosters = [load_lightgbm(content) for content in self.contents_]
            self._boosters = boosters
        return boosters

    # -- training ------------------------------------------------------------------------------

    def fit(
        self, dataset: Any, reweighter: Any = None, *, recorder: Recorder | None = None
    ) -> None:
        """Train on the segment "train", with early stopping on "valid" if the dataset has it.

        Logged to the recorder: the metrics of each round of model k as `model1/train/l2`, ..., and
        the mean squared error of the models so far as `train/l2`, `valid/l2`, by model. Raises
        DataError if there is nothing to learn from.
        """
        start_time = time.perf_counter()
        train = self._rows(dataset, "train", reweighter)
        valid = None
        if has_valid_segment(dataset):
            valid = self._rows(dataset, "valid", reweighter, train.names)
        self.contents_, self.sub_features_, self._boosters = [], [], []
        self.feature_names_ = train.names
        segments = ["train"] if valid is None else ["train", "valid"]
        losses: dict[str, list[float]] = {segment: [] for segment in segments}
        curves: list[Evaluations] = []
        for evaluations, scores in self._train_models(train, valid):
            curves.append(evaluations)
            losses["train"].append(_mean_loss(train, scores))
            if valid is not None:
                losses["valid"].append(_mean_loss(valid, self._score(valid.x)))
        seconds = time.perf_counter() - start_time
        self.fit_report_ = _make_fit_report(train, valid, losses, curves, seconds)
        log.info("trained %d models in %.1f s", self.num_models, seconds)
        parts = [{name: {ENSEMBLE_METRIC: values} for name, values in losses.items()}]
        for k, curve in enumerate(curves, 1):
            parts.append({f"model{k}/{name}": metrics for name, metrics in curve.items()})
        self.evals_result_ = {name: metrics for part in parts for name, metrics in part.items()}
        run = current_recorder() if recorder is None else recorder
        if run is not None:
            log_curves(parts, run, "fit")

    def _train_models(
        self, train: Rows, valid: Rows | None
    ) -> Iterator[tuple[Evaluations, np.ndarray]]:
        """Train the models one after another.

        Yields the metrics of each model's rounds, and the scores `[S]` of the models so far.
        """
        # The stream of numpy's first generator, so that a seed draws the features that it draws in
        # Qlib.
        random = np.random.RandomState(self._seed())
        features, weight = np.arange(len(train.names)), np.ones(len(train))
        total = np.zeros(len(train))
        for k in range(self.num_models):
            evaluations = self._train_model(train, valid, features, weight)
            part = self._score_part(k, train.x)
            total += self.sub_weights[k] * part
            scores = total / sum(self.sub_weights[: k + 1])
            yield evaluations, scores
            if k + 1 == self.num_models:
                return
            losses = _sample_losses(train, scores)
            if self.enable_sr:
                weight = self._sample_weights(k, train, losses)
            if self.enable_fs:
                features = self._draw_features(train, total, losses, random)

    def _seed(self) -> int | None:
        seed = self.params.get("seed", session().seed)
        return None if seed is None else int(seed)

    def _train_model(
        self, train: Rows, valid: Rows | None, features: np.ndarray, weight: np.ndarray
    ) -> Evaluations:
        """Train the next model; return the metrics of its rounds."""
        own_weight = weight if train.weight is None else weight * train.weight
        boosting = boost_lightgbm(
            {**self.params, "objective": self.loss},
            _select_features(replace(train, weight=own_weight), features),
            None if valid is None else _select_features(valid, features),
            Rounds(self.epochs, self.early_stopping_rounds),
        )
        self.contents_.append(boosting.content)
        self.sub_features_.append([train.names[k] for k in features])
        return boosting.evaluations

    def _sample_weights(self, k: int, rows: Rows, losses: np.ndarray) -> np.ndarray:
        """Return the weights `[S]` of the samples for the model after model k (from 0)."""
        start, end = self._loss_ranks(k, rows)
        h = self.alpha1 * _rank(-losses) + self.alpha2 * _rank(end / start)
        table = pd.DataFrame({"h": h, "bin": pd.cut(h, self.bins_sr, labels=False)})
        mean = table.groupby("bin")["h"].transform("mean").to_numpy()
        weights: np.ndarray = 1.0 / (self.decay ** (k + 1) * mean + WEIGHT_OFFSET)
        return weights

    def _loss_ranks(self, k: int, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean rank of each sample's loss `[S]` at the beginning and end of model k.

        The ranks are those among the samples after the same number of trees, from 0 to 1.
        """
        booster, x = self.boosters[k], self._columns(k, rows.x)
        num_trees = booster.num_trees()
        count = max(int(num_trees * CURVE_SHARE), 1)
        scores, start, end = np.zeros(len(rows)), np.zeros(len(rows)), np.zeros(len(rows))
        for tree in range(num_trees):
            scores += booster.predict(x, start_iteration=tree, num_iteration=1)
            if tree < count or tree >= num_trees - count:
                rank = _rank(_sample_losses(rows, scores)) / count
                start += rank if tree < count else 0.0
                end += rank if tree >= num_trees - count else 0.0
        return start, end

    def _draw_features(
        self, rows: Rows, total: np.ndarray, losses: np.ndarray, random: np.random.RandomState
    ) -> np.ndarray:
        """Return the features of the next model: a share of each bin of their importance."""
        importance = self._shuffle_importance(rows, total, losses, random)
        bins = pd.cut(importance, self.bins_fs, labels=False)
        parts = []
        for ratio, number in zip(self.sample_ratios, sorted(set(bins), reverse=True), strict=False):
            members = np.flatnonzero(bins == number)
            count = int(np.ceil(ratio * len(members)))
            parts.append(random.choice(members, count, replace=False))
        return np.sort(np.concatenate(parts))

    def _shuffle_importance(
        self, rows: Rows, total: np.ndarray, losses: np.ndarray, random: np.random.RandomState
    ) -> np.ndarray:
        """Return for each feature how much the losses rise when it is shuffled, `[F]`.

        `total [S]` are the models' scores, weighted and added. A model is asked again only if one
        of its trees has the feature.
        """
        count = len(self.contents_)
        weight_sum = sum(self.sub_weights[:count])
        users = [_split_names(b, n) for b, n in zip(self.boosters, self.sub_features_, strict=True)]
        parts = [self._score_part(k, rows.x) for k in range(count)]
        x = rows.x.copy()
        importance = np.zeros(x.shape[1])
        for column, name in enumerate(rows.names):
            x[:, column] = random.permutation(x[:, column])
            scores = total.copy()
            for k in (k for k in range(count) if name in users[k]):
                scores += self.sub_weights[k] * (self._score_part(k, x) - parts[k])
            rise = _sample_losses(rows, scores / weight_sum) - losses
            importance[column] = rise.mean() / (rise.std() + SMALLEST_SPREAD)
            x[:, column] = rows.x[:, column]
        return importance

    # -- fitted model --------------------------------------------------------------------------

    def _columns(self, k: int, x: np.ndarray) -> np.ndarray:
        """Return the features of model k from all features `x [S, F]`."""
        positions = {name: place for place, name in enumerate(self._require_feature_names())}
        columns = [positions[name] for name in self.sub_features_[k]]
        return np.ascontiguousarray(x[:, columns])

    def _score_part(self, k: int, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.boosters[k].predict(self._columns(k, x)))

    def _score(self, x: np.ndarray) -> np.ndarray:
        parts = [w * self._score_part(k, x) for k, w in self._list_weights()]
        scores: np.ndarray = np.sum(parts, axis=0) / sum(w for _, w in self._list_weights())
        return scores

    def _list_weights(self) -> list[tuple[int, float]]:
        """Return the models that are trained already, and their weights."""
        return list(enumerate(self.sub_weights[: len(self.contents_)]))

    def get_feature_importance(self, importance_type: str = "split") -> pd.Series:
        """Return the models' importance of each feature ("split" or "gain"), weighted and added."""
        names = list(self._require_feature_names())
        importance = pd.Series(0.0, index=names)
        for (_, weight), booster, features in zip(
            self._list_weights(), self.boosters, self.sub_features_, strict=True
        ):
            values = booster.feature_importance(importance_type=importance_type)
            importance[features] += weight * values
        return importance.sort_values(ascending=False)

    def _get_fitted_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fitted_state = {
            "sub_features": self.sub_features_,
            "evals_result": self.evals_result_,
            "fit_report": self.fit_report_,
        }
        contents = {f"booster{k}": bytes_tensor(c) for k, c in enumerate(self.contents_)}
        return fitted_state, contents

    def _load_fitted_state(self, fitted_state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.sub_features_ = fitted_state["sub_features"]
        self.contents_ = [
            tensors[f"booster{k}"].numpy().tobytes() for k in range(len(self.sub_features_))
        ]
        self.evals_result_ = fitted_state["evals_result"]
        self.fit_report_ = fitted_state["fit_report"]


def _make_fit_report(
    train: Rows,
    valid: Rows | None,
    losses: dict[str, list[float]],
    curves: list[Evaluations],
    seconds: float,
) -> dict[str, Any]:
    """Return a report with the keys of the networks'; an epoch is a round of any model."""
    segment = "train" if valid is None else "valid"
    rounds = sum(len(next(iter(curve["train"].values()))) for curve in curves)
    return {
        "epochs": rounds,
        "best_epoch": None,
        "monitor": f"{segment}/{ENSEMBLE_METRIC}",
        "best_value": losses[segment][-1],
        "seconds": seconds,
        "samples": len(train),
        "valid_samples": 0 if valid is None else len(valid),
        "samples_per_second": len(train) * rounds / seconds,
        "device": "cpu",
    }


def _check_length(name: str, values: Sequence[float], other: str, length: int) -> None:
    if len(values) != length:
        raise ConfigError(
            f"{name}={list(values)} has {len(values)} values, but {other} is {length}: give one "
            "value for each."
        )


def _select_features(rows: Rows, features: np.ndarray) -> Rows:
    """Return the rows with some of their features, by place."""
    return replace(rows, x=rows.x[:, features], names=tuple(rows.names[k] for k in features))


def _split_names(booster: lightgbm.Booster, names: Sequence[str]) -> set[str]:
    """Return the features by which a booster's trees split."""
    return {name for name, count in zip(names, booster.feature_importance(), strict=True) if count}


def _sample_losses(rows: Rows, scores: np.ndarray) -> np.ndarray:
    error: np.ndarray = (rows.y - scores) ** 2
    return error


def _mean_loss(rows: Rows, scores: np.ndarray) -> float:
    return float(np.average(_sample_losses(rows, scores), weights=rows.weight))


def _rank(values: np.ndarray) -> np.ndarray:
    """Return the ranks of values `[S]`, above 0 and up to 1; equal values share their mean rank."""
    return pd.Series(values).rank(pct=True).to_numpy()
