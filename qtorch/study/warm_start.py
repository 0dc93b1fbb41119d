"""A model that does not begin at nothing but at another run's weights."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import pandas as pd

from qtorch.core.configured import check_arguments
from qtorch.core.errors import ConfigError, NotFittedError
from qtorch.core.instantiate import auto_filter_kwargs, init_instance_by_config
from qtorch.core.names import dotted_name
from qtorch.core.serial import State, Stateful
from qtorch.core.trust import check_name
from qtorch.model.base import Model, ModelFT
from qtorch.tracking.current import current_recorder
from qtorch.tracking.lineage import tag_lineage
from qtorch.tracking.r import R

if TYPE_CHECKING:
    from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)


class WarmStart(ModelFT):
    """Goes on from the fitted model of an earlier run: its `fit` is that model's `finetune`.

    As data it says what comes before, so that a task of a pool can be one: `recorder_id` is the
    earlier run, whose `params.pkl` holds a ModelFT. `options` are arguments of its `finetune`
    (`max_epochs`, `lora`, ...); ArgumentError for one that it does not take. The run's tags keep
    the lineage: `warm_start.from` and `warm_start.depth`.

    Raises NotFittedError where it is used before `fit`, ConfigError where the earlier model
    cannot be trained on.
    """

    def __init__(
        self,
        recorder_id: str,
        experiment_id: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.recorder_id = recorder_id
        self.experiment_id = experiment_id
        self.options = dict(options or {})
        self.model_: Model | None = None

    def fit(
        self, dataset: Any, reweighter: Any = None, *, recorder: Recorder | None = None
    ) -> None:
        """Train the earlier run's model on."""
        run = current_recorder() if recorder is None else recorder
        model = self._previous(run)
        self._finetune(model, dataset, reweighter, run)

    def finetune(
        self, dataset: Any, reweighter: Any = None, *, recorder: Recorder | None = None
    ) -> None:
        """Train on from what is fitted here."""
        self._finetune(self._fitted(), dataset, reweighter, recorder)

    def _previous(self, run: Recorder | None) -> Model:
        earlier = R.get_recorder(recorder_id=self.recorder_id, experiment_id=self.experiment_id)
        model = earlier.load_object("params.pkl")
        if isinstance(model, WarmStart):
            model = model._fitted()
        if not callable(getattr(model, "finetune", None)):
            raise ConfigError(
                f"run {self.recorder_id} holds a {type(model).__name__}, which has no finetune: "
                "nothing can begin from it."
            )
        if run is not None:
            tag_lineage(run, earlier)
        found: Model = model
        return found

    def _finetune(
        self, model: Model, dataset: Any, reweighter: Any, recorder: Recorder | None
    ) -> None:
        act: Any = model.finetune  # type: ignore[attr-defined]
        # A model of the user's may take no recorder; an option that it does not take is a mistake.
        check_arguments(act, inspect.signature(act), self.options)
        given: dict[str, Any] = {"recorder": recorder, **self.options}
        if reweighter is not None:
            given["reweighter"] = reweighter
        auto_filter_kwargs(act)(dataset, **given)
        self.model_ = model

    def predict(self, dataset: Any, segment: str | slice = "test") -> pd.Series:
        """The model's scores."""
        return self._fitted().predict(dataset, segment)

    def _fitted(self) -> Model:
        if self.model_ is None:
            raise NotFittedError(
                "this WarmStart has no weights yet: call fit(dataset) first, or load a fitted one."
            )
        return self.model_

    @property
    def network_(self) -> Any:
        """The model's fitted network; None before `fit`, or where it has none."""
        return getattr(self.model_, "network_", None)

    @property
    def learnt_(self) -> Any:
        """The form of the samples that the model learnt from, where it tells."""
        return getattr(self.model_, "learnt_", None)

    @property
    def fit_report_(self) -> dict[str, Any]:
        """The model's figures of its last training."""
        return dict(getattr(self.model_, "fit_report_", None) or {})

    # -- saving --------------------------------------------------------------------------------

    def to_state(self) -> State:
        """Where it began, and the model's own state; ConfigError where that has none."""
        state = State({"warm_start": self.to_config(), "model": None})
        if self.model_ is not None:
            if not isinstance(self.model_, Stateful):
                raise ConfigError(f"a {type(self.model_).__name__} is stored as a pickle.")
            inner = self.model_.to_state()
            state.config["model"] = {"class": dotted_name(type(self.model_)), "state": inner.config}
            state.tensors = inner.tensors
        return state

    @classmethod
    def from_state(cls, state: State) -> Self:
        """The model again. Names in it pass the trust rule."""
        built = init_instance_by_config(state.config["warm_start"], stored=True)
        if not isinstance(built, cls):
            raise TypeError(f"the state is of a {type(built).__qualname__}, not a {cls.__name__}.")
        inner = state.config["model"]
        if inner is not None:
            built.model_ = _class_of(inner["class"]).from_state(
                State(inner["state"], state.tensors)
            )
        return built


def _class_of(name: str) -> Any:
    from qtorch.core.names import locate

    check_name(name)
    return locate(name)
