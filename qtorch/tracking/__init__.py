"""Experiment tracking on MLflow: R, ExpManager, Experiment and Recorder, as in Qlib."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.tracking.experiment import Experiment as Experiment
    from qtorch.tracking.experiment import MLflowExperiment as MLflowExperiment
    from qtorch.tracking.manager import ExpManager as ExpManager
    from qtorch.tracking.manager import MLflowExpManager as MLflowExpManager
    from qtorch.tracking.manager import R as R
    from qtorch.tracking.manager import list_recorders as list_recorders
    from qtorch.tracking.recorder import MLflowRecorder as MLflowRecorder
    from qtorch.tracking.recorder import Recorder as Recorder
    from qtorch.tracking.recorder import current_recorder as current_recorder

__getattr__, __dir__ = lazy_names(__name__, __file__)
