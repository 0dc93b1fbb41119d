"""Models: fit, predict, finetune; one training loop on Lightning for every network."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.model.adarnn_module import ADARNNModule as ADARNNModule
    from qtorch.model.add_module import ADDModule as ADDModule
    from qtorch.model.base import BaseModel as BaseModel
    from qtorch.model.base import Model as Model
    from qtorch.model.base import ModelFT as ModelFT
    from qtorch.model.gbdt import LGBModel as LGBModel
    from qtorch.model.igmtf_module import IGMTFModule as IGMTFModule
    from qtorch.model.interruption import TrainingInterrupted as TrainingInterrupted
    from qtorch.model.lightning_model import LightningModel as LightningModel
    from qtorch.model.linear import LinearModel as LinearModel
    from qtorch.model.module import ScoreModule as ScoreModule
    from qtorch.model.tabnet_module import TabNetModule as TabNetModule
    from qtorch.model.tcts_module import TCTSModule as TCTSModule
    from qtorch.model.tra_module import TRAModule as TRAModule

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
        "TCTSModule": "qtorch.model.tcts_module",
        "TRAModule": "qtorch.model.tra_module",
        "ADARNNModule": "qtorch.model.adarnn_module",
        "IGMTFModule": "qtorch.model.igmtf_module",
        "TabNetModule": "qtorch.model.tabnet_module",
        "ADDModule": "qtorch.model.add_module",
    },
)
