"""What the models of plain rows share: a sample is its own day's features, matched by name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError, NotFittedError
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.serial import State
from qtorch.data.gather import infinite_message
from qtorch.data.sample_set import Samples
from qtorch.data.samples import samples_of
from qtorch.model.base import Model
from qtorch.model.matching import LearntFrom, check_labels

SCORE = "score"


@dataclass(frozen=True)
class Rows:
    """Samples as arrays: `x [S, F]`, `y [S]`, `weight [S]` or None, float32."""

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray | None
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.y)


class TabularModel(Model):
    """A model that sees a sample's own day and no window.

    Given a dataset of windows it sees their last step (Qlib's models of this kind fail there);
    of Alpha360, whose features are a window themselves, all of them. One label is learnt;
    samples that a label's horizon carries into the next segment are left out as for networks.
    """

    feature_names_: tuple[str, ...] | None = None

    def predict(self, dataset: Any, segment: str | slice = "test") -> pd.Series:
        """Scores of a segment: float32 Series "score" by (datetime, instrument), each sample once.

        Raises NotFittedError before `fit`, DataError where a feature that was learnt is missing.
        """
        names = self._learnt_names()
        samples = samples_of(dataset, segment, data_key="infer")
        score = self._score(_matrix(samples, names)).astype(np.float32)
        return pd.Series(score, index=samples.index, name=SCORE)

    def _learnt_names(self) -> tuple[str, ...]:
        if self.feature_names_ is None:
            raise NotFittedError(
                f"this {type(self).__name__} has learnt nothing yet: call fit(dataset) first, or "
                "load a fitted one."
            )
        return self.feature_names_

    @abstractmethod
    def _score(self, x: np.ndarray) -> np.ndarray:
        """Scores `[S]` of the rows `x [S, F]`."""

    def _rows(
        self,
        dataset: Any,
        segment: str,
        reweighter: Any = None,
        names: Sequence[str] | None = None,
    ) -> Rows:
        """A segment to learn from; `names` are features that were learnt already."""
        if callable(getattr(reweighter, "bind", None)):
            reweighter.bind(dataset)
        samples = samples_of(dataset, segment, data_key="learn").reweighted(reweighter)
        check_labels(samples, None)
        assert samples.target is not None, "it was checked"
        if samples.target.shape[1] != 1:
            raise ConfigError(
                f"{type(self).__name__} learns one label; the dataset has {samples.label_names}."
            )
        x = _matrix(samples, samples.feature_names if names is None else names)
        weight = samples.weight
        return Rows(
            x,
            samples.target[:, 0].cpu().numpy(),
            None if weight is None else weight.cpu().numpy(),
            samples.feature_names if names is None else tuple(names),
        )

    # -- saving --------------------------------------------------------------------------------

    def to_state(self) -> State:
        """Configuration and what was learnt: JSON and tensors, no pickle."""
        config: dict[str, Any] = {"model": self.to_config(), "fitted": None}
        if self.feature_names_ is None:
            return State(config)
        fitted, tensors = self._fitted_state()
        config["fitted"] = {"feature_names": list(self.feature_names_), **fitted}
        return State(config, tensors)

    @classmethod
    def from_state(cls, state: State) -> Self:
        """The model again. Names in it pass the trust rule."""
        built = init_instance_by_config(state.config["model"], stored=True)
        if not isinstance(built, cls):
            raise TypeError(f"the state is of a {type(built).__qualname__}, not a {cls.__name__}.")
        fitted = state.config["fitted"]
        if fitted is not None:
            built.feature_names_ = tuple(fitted["feature_names"])
            built._take_state(fitted, state.tensors)
        return built

    @abstractmethod
    def _fitted_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What was learnt, as plain data and tensors."""

    @abstractmethod
    def _take_state(self, fitted: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take what `_fitted_state` gave."""


def _matrix(samples: Samples, names: Sequence[str]) -> np.ndarray:
    """`[S, F]` of the features `names`, each column in one piece."""
    learnt = LearntFrom(tuple(names), samples.num_features, samples.num_steps)
    x: np.ndarray = learnt.matched(samples).rows().cpu().numpy()
    bad = [name for k, name in enumerate(names) if np.isinf(x[:, k]).any()]
    if bad:
        raise DataError(infinite_message(bad, "features"))
    return x
