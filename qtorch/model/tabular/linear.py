"""Linear regression, the first baseline that a network has to beat."""

from __future__ import annotations

import time
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError, check_name
from qtorch.model.input_schema import has_valid_segment
from qtorch.model.tabular.base import Rows, TabularModel

if TYPE_CHECKING:
    from qtorch.tracking.recorder import Recorder

ESTIMATORS = ("ols", "ridge", "lasso", "nnls")
CHUNK_SIZE = 16384  # rows per float64 product
MAX_SWEEPS, TOLERANCE = 10_000, 1e-10


class LinearModel(TabularModel):
    """Linear regression: score = x . w (+ intercept), with sample weights if a reweighter is set.

    `estimator`: "ols" is least squares (the minimum-norm solution if there are several), "ridge"
    adds alpha |w|^2, "lasso" is half the mean square plus alpha |w|, "nnls" is least squares with w
    >= 0. `include_valid` also trains on the valid segment. A row with a missing feature is not used
    in training, and its score is NaN.

    Corresponds to qlib/contrib/model/linear.py, with the same arguments. Differences: sums of
    products in float64 replace a second copy of the data, sample weights work with every estimator,
    and the intercept of nnls may be negative.
    """

    def __init__(
        self,
        estimator: str = "ols",
        alpha: float = 0.0,
        fit_intercept: bool = False,
        include_valid: bool = False,
    ) -> None:
        check_name("estimator", estimator, ESTIMATORS)
        value: Any = alpha  # a configuration may hold something else
        if not isinstance(value, Real):
            raise ConfigError(f"alpha is {value!r}; expected a number.")
        if alpha < 0 or (alpha and estimator not in ("ridge", "lasso")):
            raise ConfigError(
                f"alpha={alpha} with estimator={estimator!r}: only ridge and lasso use it, >= 0."
            )
        self.estimator, self.alpha = estimator, alpha
        self.fit_intercept, self.include_valid = fit_intercept, include_valid
        self.coef_: np.ndarray | None = None
        self.intercept_ = 0.0
        self.fit_report_: dict[str, Any] = {}

    def fit(
        self, dataset: Any, reweighter: Any = None, *, recorder: Recorder | None = None
    ) -> None:
        """Train on the segment "train", and on "valid" too if `include_valid` is set.

        Raises DataError if no row has all its features.
        """
        start_time = time.perf_counter()
        rows = self._rows(dataset, "train", reweighter)
        moments = _Moments(len(rows.names))
        moments.add(rows)
        if self.include_valid and has_valid_segment(dataset):
            moments.add(self._rows(dataset, "valid", reweighter, rows.names))
        if not moments.weight:
            raise DataError("no sample has all its features: add Fillna to the processors.")
        coef = self._solve(moments)
        self.coef_, self.feature_names_ = coef, rows.names
        mean_x, mean_y = moments.means()
        self.intercept_ = float(mean_y - mean_x @ coef) if self.fit_intercept else 0.0
        seconds = time.perf_counter() - start_time
        self.fit_report_ = {
            "epochs": 1,
            "monitor": None,
            "seconds": seconds,
            "samples": len(rows),
            "valid_samples": 0,
            "samples_per_second": len(rows) / seconds,
            "device": "cpu",
        }

    def _solve(self, moments: _Moments) -> np.ndarray:
        gram, xy = moments.deviation_products() if self.fit_intercept else (moments.xx, moments.xy)
        if self.estimator in ("ols", "ridge"):
            coef: np.ndarray = np.linalg.lstsq(gram + self.alpha * np.eye(len(gram)), xy)[0]
            return coef
        gram, xy = gram / moments.weight, xy / moments.weight
        return _coordinate_descent(gram, xy, self.alpha, positive=self.estimator == "nnls")

    def _score(self, x: np.ndarray) -> np.ndarray:
        assert self.coef_ is not None, "predict has checked that the model is fitted"
        chunks = (x[start : start + CHUNK_SIZE] for start in range(0, len(x), CHUNK_SIZE))
        scores = np.concatenate([chunk.astype(np.float64) @ self.coef_ for chunk in chunks])
        return scores + self.intercept_

    def _get_fitted_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fitted_state = {"intercept": self.intercept_, "fit_report": self.fit_report_}
        return fitted_state, {"coef": torch.tensor(self.coef_)}

    def _load_fitted_state(self, fitted_state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.intercept_, self.coef_ = fitted_state["intercept"], tensors["coef"].numpy()
        self.fit_report_ = fitted_state["fit_report"]


class _Moments:
    """Weighted sums over complete rows: the sufficient statistics of a linear fit."""

    def __init__(self, num_features: int) -> None:
        self.xx = np.zeros((num_features, num_features))
        self.xy, self.x = np.zeros(num_features), np.zeros(num_features)
        self.y, self.weight = 0.0, 0.0

    def add(self, rows: Rows) -> None:
        for start in range(0, len(rows), CHUNK_SIZE):
            chunk = slice(start, start + CHUNK_SIZE)
            is_complete = ~np.isnan(rows.x[chunk]).any(axis=1)
            chosen = slice(None) if is_complete.all() else is_complete
            x = rows.x[chunk][chosen].astype(np.float64)
            y = rows.y[chunk][chosen].astype(np.float64)
            weight = None if rows.weight is None else rows.weight[chunk][chosen]
            # Without weights numpy computes one half of the symmetric product.
            weighted_x = x if weight is None else x * weight[:, None]
            self.xx += weighted_x.T @ x
            self.xy += weighted_x.T @ y
            self.x += weighted_x.sum(axis=0)
            self.y += float(y.sum() if weight is None else weight @ y)
            self.weight += float(len(y) if weight is None else weight.sum())

    def means(self) -> tuple[np.ndarray, float]:
        return self.x / self.weight, self.y / self.weight

    def deviation_products(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums of products of deviations from the means, for a fit with intercept."""
        mean_x, mean_y = self.means()
        return self.xx - np.outer(self.x, mean_x), self.xy - self.x * mean_y


def _coordinate_descent(
    gram: np.ndarray, xy: np.ndarray, alpha: float, *, positive: bool
) -> np.ndarray:
    """Minimize w'Gw / 2 - m'w + alpha |w| by coordinate descent (Friedman et al., 2010)."""
    coef, slope = np.zeros(len(xy)), xy.copy()
    scale = np.abs(xy).max(initial=0.0)
    for _ in range(MAX_SWEEPS):
        largest_change = 0.0
        for k in np.flatnonzero(np.diag(gram) > 0):
            partial_slope = slope[k] + gram[k, k] * coef[k]
            shrunk_slope = max(abs(partial_slope) - alpha, 0.0)
            if positive and partial_slope < 0:
                shrunk_slope = 0.0
            step = np.copysign(shrunk_slope, partial_slope) / gram[k, k] - coef[k]
            coef[k] += step
            slope -= step * gram[k]
            largest_change = max(largest_change, abs(step) * gram[k, k])
        if largest_change <= TOLERANCE * scale:
            break
    return coef
