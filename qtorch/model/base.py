"""Base classes of all models: Qlib's BaseModel, Model and ModelFT."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Self

import pandas as pd

from qtorch.core.configured import Configured
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.serial import Serializable
from qtorch.core.terminal import html_curves, html_summary
from qtorch.core.trust import trust_subclasses

if TYPE_CHECKING:
    from qtorch.tracking.recorder import Recorder

# Entries of `fit_report_`.
SHOWN_IN_NOTEBOOKS = ("parameters", "samples", "epochs", "best_epoch", "monitor", "best_value")
SCORE = "score"  # the name of the Series that predict returns


@trust_subclasses
class BaseModel(Serializable, Configured, ABC):
    """Anything that makes predictions. Calling the object is the same as calling `predict`."""

    @abstractmethod
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Return predictions."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.predict(*args, **kwargs)

    def _repr_html_(self) -> str:
        """Show the arguments in a notebook, and after `fit` the training and its curves."""
        report = getattr(self, "fit_report_", {}) or {}
        facts = {**self._arguments, **{k: report[k] for k in SHOWN_IN_NOTEBOOKS if k in report}}
        results: dict[str, dict[str, list[float]]] = getattr(self, "evals_result_", {}) or {}
        names = dict.fromkeys(name for curves in results.values() for name in curves)
        parts = [
            html_curves({f"{s}/{n}": curves[n] for s, curves in results.items() if n in curves})
            for n in names
            if any(len(curves.get(n, ())) > 1 for curves in results.values())
        ]
        title = type(self).__name__ if report else f"{type(self).__name__} (not fitted)"
        return html_summary(title, facts, *parts)

    @classmethod
    def _from_stored_config(cls, config: Any) -> Self:
        """Build the unfitted model of a saved state; names in it must be trusted."""
        model = init_instance_by_config(config)
        if not isinstance(model, cls):
            raise TypeError(
                f"the state belongs to a {type(model).__qualname__}, not a {cls.__name__}."
            )
        return model


class Model(BaseModel):
    """A model that is trained on a dataset and scores the segments of a dataset.

    Follow scikit-learn's naming: attributes whose name starts with `_` are not saved with the
    model, and attributes that `fit` sets end with `_`. Corresponds to qlib/model/base.py, with one
    difference: every model takes `segment`, `reweighter` and `recorder`.
    """

    @abstractmethod
    def fit(
        self, dataset: Any, reweighter: Any = None, *, recorder: Recorder | None = None
    ) -> None:
        """Train on the segments "train" and "valid".

        `reweighter` assigns a weight to each training sample. `recorder` receives metrics and
        checkpoints; if it is None, the current run is used, if there is one.
        """

    def check_segment_names(self, names: Collection[str]) -> None:
        """Raise ConfigError if a dataset with segments of these names cannot be trained on.

        It is called before the data is read. A user's model may train on any segment.
        """

    @abstractmethod
    def predict(self, dataset: Any, segment: str | slice = "test") -> pd.Series:
        """Return the scores as a Series named "score", indexed by (datetime, instrument).

        The Series has each sample of the segment exactly once. `segment` is the name of a segment
        or a slice of dates, both ends inclusive. Raises NotFittedError before `fit`.
        """


class ModelFT(Model):
    """A model that can continue training from its fitted state."""

    @abstractmethod
    def finetune(self, dataset: Any, *, recorder: Recorder | None = None) -> None:
        """Train on a dataset, starting from the fitted weights.

        The usual pattern takes two runs and two processes::

            with R.start(experiment_name="init"):
                model.fit(dataset)
                R.save_objects(init_model=model)
                rid = R.get_recorder().id

            with R.start(experiment_name="finetune"):
                recorder = R.get_recorder(recorder_id=rid, experiment_name="init")
                recorder.load_object("init_model").finetune(dataset)
        """
