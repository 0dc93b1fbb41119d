"""A minimal model, so that a task's cost is almost only that of the framework."""

from __future__ import annotations

import numpy as np
import pandas as pd

from qtorch.core.session import set_defaults
from qtorch.model import Model

set_defaults(trusted=[__name__])


class Ridge(Model):
    """Ridge regression on the flat features."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha
        self.coef_: np.ndarray | None = None

    def fit(self, dataset, reweighter=None, *, recorder=None):
        frame = dataset.prepare("train", col_set=["feature", "label"], data_key="learn")
        x, y = frame["feature"].to_numpy(), frame["label"].to_numpy()[:, 0]
        self.coef_ = np.linalg.solve(x.T @ x + self.alpha * np.eye(x.shape[1]), x.T @ y)
        return self

    def predict(self, dataset, segment="test"):
        frame = dataset.prepare(segment, col_set="feature", data_key="infer")
        return pd.Series(frame.to_numpy() @ self.coef_, index=frame.index)
