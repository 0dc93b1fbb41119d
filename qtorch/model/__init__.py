"""Models: fit, predict, finetune; one training loop on Lightning for every network."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.model.base import BaseModel as BaseModel
    from qtorch.model.base import Model as Model
    from qtorch.model.base import ModelFT as ModelFT
    from qtorch.model.gbdt import LGBModel as LGBModel
    from qtorch.model.igmtf_module import IGMTFModule as IGMTFModule
    from qtorch.model.interruption import TrainingInterrupted as TrainingInterrupted
    from qtorch.model.lightning_model import LightningModel as LightningModel
    from qtorch.model.linear import LinearModel as LinearModel
    from qtorch.model.module import ScoreModule as ScoreModule

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "BaseModel": "qtorch.model.base",
        "LGBModel": "qtorch.model.gbdt",
        "LightningModel": "qtorch.model.lightning_model",
        "LinearModel": "qtorch.model.linear",
        "Model": "qtorch.model.base",
        "ModelFT": "qtorch.model.base",
        "ScoreModule": "qtorch.model.module",
        "TrainingInterrupted": "qtorch.model.interruption",
        "IGMTFModule": "qtorch.model.igmtf_module",
    },
)
