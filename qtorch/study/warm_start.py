"""A model that continues training from the weights of an earlier run."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import pandas as pd

from qtorch.core.configured import check_arguments
from qtorch.core.errors import ConfigError, NotFittedError
from qtorch.core.instantiate import auto_filter_kwargs, init_instance_by_config
from qtorch.core.names import import_path
from qtorch.core.serial import State, Stateful
from qtorch.core.trust import locate
from qtorch.model.base import Model, ModelFT
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import current_recorder, tag_lineage

if TYPE_CHECKING:
    from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)


class WarmStart(ModelFT):
    """Continues from the fitted model of an earlier run: its `fit` calls that model's `finetune`.

    It refers to the earlier run by ID, so a task with this model is plain data and can be put into
    a task pool: `recorder_id` is the run, whose `params.pkl` must hold a ModelFT. `options` are
    arguments of its `finetune` (`max_epochs`, `lora`, ...); an unknown one raises ArgumentError.
    The tags `warm_start.from` and `warm_start.depth` of the new run record the lineage.

    Raises NotFittedError if used before `fit`, ConfigError if the earlier model has no `finetune`.
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
        """Load the earlier run's model and finetune it."""
        run = current_recorder() if recorder is None else recorder
        model = self._load_previous_model(run)
        self._finetune(model, dataset, reweighter, run)

    def finetune(
        self, dataset: Any, reweighter: Any = None, *, recorder: Recorder | None = None
    ) -> None:
        """Finetune the fitted model further."""
        self._finetune(self._require_model(), dataset, reweighter, recorder)

    def _load_previous_model(self, run: Recorder | None) -> Model:
        earlier = R.get_recorder(recorder_id=self.recorder_id, experiment_id=self.experiment_id)
        model = earlier.load_object("params.pkl")
        if isinstance(model, WarmStart):
            model = model._require_model()
        if not callable(getattr(model, "finetune", None)):
            raise ConfigError(
                f"the model of run {self.recorder_id} is a {type(model).__name__}, which has no "
                "finetune method: a warm start from it is not possible."
            )
        if run is not None:
            tag_lineage(run, earlier)
        previous_model: Model = model
        return previous_model

    def _finetune(
        self, model: Model, dataset: Any, reweighter: Any, recorder: Recorder | None
    ) -> None:
        finetune: Any = model.finetune  # type: ignore[attr-defined]
        # The options must be arguments of finetune; `recorder` is only passed if it is one too.
        check_arguments(finetune, inspect.signature(finetune), self.options)
        kwargs: dict[str, Any] = {"recorder": recorder, **self.options}
        if reweighter is not None:
            kwargs["reweighter"] = reweighter
        auto_filter_kwargs(finetune)(dataset, **kwargs)
        self.model_ = model

    def predict(self, dataset: Any, segment: str | slice = "test") -> pd.Series:
        """Return the model's scores."""
        return self._require_model().predict(dataset, segment)

    def _require_model(self) -> Model:
        if self.model_ is None:
            raise NotFittedError(
                "this WarmStart is not fitted: call fit(dataset) first, or load a fitted one."
            )
        return self.model_

    @property
    def allow_nonfinite(self) -> bool:
        """Whether the model returns NaN and infinite scores; see `LightningModel`."""
        return bool(getattr(self.model_, "allow_nonfinite", False))

    @allow_nonfinite.setter
    def allow_nonfinite(self, value: bool) -> None:
        self._require_model().allow_nonfinite = value  # type: ignore[attr-defined]

    @property
    def network_(self) -> Any:
        """The model's fitted network; None before `fit`, or if the model has none."""
        return getattr(self.model_, "network_", None)

    @property
    def input_schema_(self) -> Any:
        """The schema of the samples that the model was fitted on; None if unknown."""
        return getattr(self.model_, "input_schema_", None)

    @property
    def fit_report_(self) -> dict[str, Any]:
        """The model's report of its last training."""
        return dict(getattr(self.model_, "fit_report_", None) or {})

    # -- saving --------------------------------------------------------------------------------

    def to_state(self) -> State:
        """Return the configuration and the model's state; ConfigError if the model has none."""
        state = State({"warm_start": self.to_config(), "model": None})
        if self.model_ is not None:
            if not isinstance(self.model_, Stateful):
                raise ConfigError(f"a {type(self.model_).__name__} can only be stored as a pickle.")
            inner = self.model_.to_state()
            state.config["model"] = {"class": import_path(type(self.model_)), "state": inner.config}
            state.tensors = inner.tensors
        return state

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild the model; class names in the state must be trusted."""
        model = init_instance_by_config(state.config["warm_start"])
        if not isinstance(model, cls):
            raise TypeError(f"the state is of a {type(model).__qualname__}, not a {cls.__name__}.")
        inner = state.config["model"]
        if inner is not None:
            inner_state = State(inner["state"], state.tensors)
            model.model_ = locate(inner["class"]).from_state(inner_state)
        return model
