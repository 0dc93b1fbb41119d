"""What a model is: Qlib's BaseModel, Model and ModelFT."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import pandas as pd

from qtorch.core.configured import Configured
from qtorch.core.serial import Serializable
from qtorch.core.trust import trusted_type

if TYPE_CHECKING:
    from qtorch.tracking.recorder import Recorder


@trusted_type
class BaseModel(Serializable, Configured, ABC):
    """Something that predicts; calling it is predicting."""

    @abstractmethod
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predictions."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.predict(*args, **kwargs)


class Model(BaseModel):
    """A model that learns from a dataset and scores its segments.

    Attributes that are to be saved with the model do not start with `_`; what `fit` finds out
    ends with one. Answers to qlib/model/base.py. Difference: every model takes `segment`,
    `reweighter` and `recorder`.
    """

    @abstractmethod
    def fit(
        self, dataset: Any, reweighter: Any = None, *, recorder: Recorder | None = None
    ) -> None:
        """Learn from the segments train and valid.

        `reweighter` gives each training sample a weight. `recorder` takes metrics and
        checkpoints; None is the run that is current, or none.
        """

    @abstractmethod
    def predict(self, dataset: Any, segment: str | slice = "test") -> pd.Series:
        """A Series "score" by (datetime, instrument): every sample of the segment once.

        `segment` is a segment's name or a slice of dates, both inclusive. Raises NotFittedError
        before `fit`.
        """


class ModelFT(Model):
    """A model that can go on learning from where it is."""

    @abstractmethod
    def finetune(self, dataset: Any, *, recorder: Recorder | None = None) -> None:
        """Learn from a dataset, starting at what is fitted.

        The idiom, in two runs and two processes::

            with R.start(experiment_name="init"):
                model.fit(dataset)
                R.save_objects(init_model=model)
                rid = R.get_recorder().id

            with R.start(experiment_name="finetune"):
                recorder = R.get_recorder(recorder_id=rid, experiment_name="init")
                recorder.load_object("init_model").finetune(dataset)
        """
