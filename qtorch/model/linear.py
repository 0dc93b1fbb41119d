"""Linear regression, the first thing that a network has to be better than."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError, unknown_name
from qtorch.model.tabular import Rows, TabularModel

if TYPE_CHECKING:
    from qtorch.tracking.recorder import Recorder

ESTIMATORS = ("ols", "ridge", "lasso", "nnls")
PIECE = 16384  # rows whose products are summed in float64 at once
SWEEPS, TOLERANCE = 10_000, 1e-10


class LinearModel(TabularModel):
    """score = x . w (+ intercept), by `estimator`, with sample weights where they are given.

    "ols": least squares (of several solutions the shortest); "ridge": + alpha |w|^2; "lasso":
    the mean square / 2 + alpha |w|; "nnls": least squares with w >= 0. `include_valid` learns
    from the segment valid too. A row with a missing feature teaches nothing and scores NaN.

    Answers to qlib/contrib/model/linear.py, with its arguments. Differences: sums of products in
    float64 take the place of a second copy of the data, weights hold for each estimator, and the
    intercept of nnls may be negative.
    """

    def __init__(
        self,
        estimator: str = "ols",
        alpha: float = 0.0,
        fit_intercept: bool = False,
        include_valid: bool = False,
    ) -> None:
        if estimator not in ESTIMATORS:
            raise ConfigError(unknown_name("estimator", estimator, ESTIMATORS))
        if alpha < 0 or (alpha and estimator not in ("ridge", "lasso")):
            raise ConfigError(
                f"alpha={alpha} with estimator={estimator!r}: ridge and lasso alone take one, >= 0."
            )
        self.estimator, self.alpha = estimator, alpha
        self.fit_intercept, self.include_valid = fit_intercept, include_valid
        self.coef_: np.ndarray | None = None
        self.intercept_ = 0.0
        self.fit_report_: dict[str, Any] = {}

    def fit(
        self, dataset: Any, reweighter: Any = None, *, recorder: Recorder | None = None
    ) -> None:
        """Learn from the segment train, with `include_valid` from valid too.

        Raises DataError where no row is complete.
        """
        begin = time.perf_counter()
        rows = self._rows(dataset, "train", reweighter)
        moments = _Moments(len(rows.names))
        moments.add(rows)
        if self.include_valid and "valid" in getattr(dataset, "segments", ("valid",)):
            moments.add(self._rows(dataset, "valid", reweighter, rows.names))
        if not moments.weight:
            raise DataError("no sample has all its features; put Fillna among the processors.")
        coef = self._solved(moments)
        self.coef_, self.feature_names_ = coef, rows.names
        mean_x, mean_y = moments.means()
        self.intercept_ = float(mean_y - mean_x @ coef) if self.fit_intercept else 0.0
        seconds = time.perf_counter() - begin
        self.fit_report_ = {
            "epochs": 1,
            "monitor": None,
            "seconds": seconds,
            "samples": len(rows),
            "valid_samples": 0,
            "samples_per_second": len(rows) / seconds,
            "device": "cpu",
        }

    def _solved(self, moments: _Moments) -> np.ndarray:
        gram, moment = moments.centred() if self.fit_intercept else (moments.xx, moments.xy)
        if self.estimator in ("ols", "ridge"):
            found: np.ndarray = np.linalg.lstsq(gram + self.alpha * np.eye(len(gram)), moment)[0]
            return found
        gram, moment = gram / moments.weight, moment / moments.weight
        return _descent(gram, moment, self.alpha, positive=self.estimator == "nnls")

    def _score(self, x: np.ndarray) -> np.ndarray:
        assert self.coef_ is not None, "it was asked before"
        parts = [x[k : k + PIECE].astype(np.float64) @ self.coef_ for k in range(0, len(x), PIECE)]
        return np.concatenate(parts) + self.intercept_

    def _fitted_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fitted = {"intercept": self.intercept_, "fit_report": self.fit_report_}
        return fitted, {"coef": torch.tensor(self.coef_)}

    def _take_state(self, fitted: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.intercept_, self.coef_ = fitted["intercept"], tensors["coef"].numpy()
        self.fit_report_ = fitted["fit_report"]


class _Moments:
    """Weighted sums over complete rows: all that a linear fit has to know of them."""

    def __init__(self, num_features: int) -> None:
        self.xx = np.zeros((num_features, num_features))
        self.xy, self.x = np.zeros(num_features), np.zeros(num_features)
        self.y, self.weight = 0.0, 0.0

    def add(self, rows: Rows) -> None:
        for first in range(0, len(rows), PIECE):
            part = slice(first, first + PIECE)
            x = rows.x[part].astype(np.float64)
            known = ~np.isnan(x).any(axis=1)
            x, y = x[known], rows.y[part][known].astype(np.float64)
            weight = np.ones(len(x)) if rows.weight is None else rows.weight[part][known]
            weighted = x * weight[:, None]
            self.xx += weighted.T @ x
            self.xy += weighted.T @ y
            self.x += weighted.sum(axis=0)
            self.y += float(weight @ y)
            self.weight += float(weight.sum())

    def means(self) -> tuple[np.ndarray, float]:
        return self.x / self.weight, self.y / self.weight

    def centred(self) -> tuple[np.ndarray, np.ndarray]:
        """The sums of products of deviations from the means: what an intercept leaves."""
        mean_x, mean_y = self.means()
        return self.xx - np.outer(self.x, mean_x), self.xy - self.x * mean_y


def _descent(gram: np.ndarray, moment: np.ndarray, alpha: float, *, positive: bool) -> np.ndarray:
    """min w'Gw / 2 - m'w + alpha |w|, one coordinate after another (Friedman et al., 2010)."""
    coef, slope = np.zeros(len(moment)), moment.copy()
    scale = np.abs(moment).max(initial=0.0)
    for _ in range(SWEEPS):
        largest = 0.0
        for k in np.flatnonzero(np.diag(gram) > 0):
            target = slope[k] + gram[k, k] * coef[k]
            shrunk = max(abs(target) - alpha, 0.0) * (0.0 if positive and target < 0 else 1.0)
            step = np.copysign(shrunk, target) / gram[k, k] - coef[k]
            coef[k] += step
            slope -= step * gram[k]
            largest = max(largest, abs(step) * gram[k, k])
        if largest <= TOLERANCE * scale:
            break
    return coef
