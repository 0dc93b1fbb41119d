"""Base class of models on plain rows: a sample is the features of its own day."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from torch import Tensor

from qtorch.core.errors import ConfigError, NotFittedError
from qtorch.core.serial import State
from qtorch.data.dataset.qlib_dataset import get_samples
from qtorch.data.dataset.samples import Samples, require_segment
from qtorch.data.panel.infinite import check_processed_columns
from qtorch.model.base import SCORE, Model
from qtorch.model.input_schema import InputSchema, check_labels, load_training_samples


@dataclass(frozen=True)
class Rows:
    """Samples as float32 arrays: `x [S, F]`, `y [S]`, `weight [S]` or None."""

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray | None
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.y)


class TabularModel(Model):
    """A model that sees the features of a sample's own day, without a window.

    With a dataset of windows it sees their last step (Qlib's models of this kind fail there); with
    Alpha360, whose features are a window themselves, it sees all of them. There must be one label.
    Samples whose label horizon reaches into the next segment are left out, as for networks.
    """

    feature_names_: tuple[str, ...] | None = None

    def check_segment_names(self, names: Collection[str]) -> None:
        require_segment("train", names, f"on which {type(self).__name__} is trained")

    def predict(self, dataset: Any, segment: str | slice = "test") -> pd.Series:
        """Return the scores of a segment, each sample once.

        The result is a float32 Series "score", indexed by (datetime, instrument). Raises
        NotFittedError before `fit`, and DataError if a feature of the training is missing.
        """
        names = self._require_feature_names()
        samples = get_samples(dataset, segment, data_key="infer")
        score = self._score(_matrix(samples, names)).astype(np.float32)
        return pd.Series(score, index=samples.index, name=SCORE)

    def _require_feature_names(self) -> tuple[str, ...]:
        if self.feature_names_ is None:
            raise NotFittedError(
                f"this {type(self).__name__} is not fitted yet: call fit(dataset) first, or "
                "load a fitted model."
            )
        return self.feature_names_

    @abstractmethod
    def _score(self, x: np.ndarray) -> np.ndarray:
        """Return the scores `[S]` of rows `x [S, F]`."""

    def _rows(
        self,
        dataset: Any,
        segment: str,
        reweighter: Any = None,
        names: Sequence[str] | None = None,
    ) -> Rows:
        """Return a segment's rows for training; `names` are the features of an earlier fit."""
        samples = load_training_samples(dataset, segment, reweighter)
        check_labels(samples, None)
        assert samples.target is not None, "check_labels has checked it"
        if samples.target.shape[1] != 1:
            raise ConfigError(
                f"{type(self).__name__} needs one label; the dataset has {samples.label_names}."
            )
        names = samples.feature_names if names is None else tuple(names)
        return Rows(
            x=_matrix(samples, names),
            y=samples.target[:, 0].cpu().numpy(),
            weight=None if samples.weight is None else samples.weight.cpu().numpy(),
            names=names,
        )

    # -- saving --------------------------------------------------------------------------------

    def to_state(self) -> State:
        """Return configuration and fitted state as JSON and tensors, without pickle."""
        config: dict[str, Any] = {"model": self.to_config(), "fitted": None}
        if self.feature_names_ is None:
            return State(config)
        fitted_state, tensors = self._get_fitted_state()
        config["fitted"] = {"feature_names": list(self.feature_names_), **fitted_state}
        return State(config, tensors)

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Build a model from its saved state. Names in it must be trusted."""
        model = cls._from_stored_config(state.config["model"])
        fitted_state = state.config["fitted"]
        if fitted_state is not None:
            model.feature_names_ = tuple(fitted_state["feature_names"])
            model._load_fitted_state(fitted_state, state.tensors)
        return model

    @abstractmethod
    def _get_fitted_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the fitted state as plain data and tensors."""

    @abstractmethod
    def _load_fitted_state(self, fitted_state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Load the result of `_get_fitted_state`."""


def _matrix(samples: Samples, names: Sequence[str]) -> np.ndarray:
    """Return `[S, F]` of the features `names`, each column contiguous."""
    input_schema = InputSchema(tuple(names), samples.num_features, samples.num_steps)
    x: np.ndarray = input_schema.match_features(samples).rows().cpu().numpy()
    check_processed_columns(names, (bool(np.isinf(column).any()) for column in x.T), "features")
    return x
