"""Models: fit, predict, finetune; one training loop on Lightning for every network."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.model.base import BaseModel as BaseModel
    from qtorch.model.base import Model as Model
    from qtorch.model.base import ModelFT as ModelFT
    from qtorch.model.fleet.fit import FleetError as FleetError
    from qtorch.model.fleet.fit import fit_fleet as fit_fleet
    from qtorch.model.lightning_model import LightningModel as LightningModel
    from qtorch.model.loop.callbacks import EpochAveraging as EpochAveraging
    from qtorch.model.loop.interruption import TrainingInterrupted as TrainingInterrupted
    from qtorch.model.loop.module import ScoreModule as ScoreModule
    from qtorch.model.loop.schedules import WarmupCosine as WarmupCosine
    from qtorch.model.loop.sharding import Sharded as Sharded
    from qtorch.model.methods.adarnn import ADARNNModule as ADARNNModule
    from qtorch.model.methods.add import ADDModule as ADDModule
    from qtorch.model.methods.igmtf import IGMTFModule as IGMTFModule
    from qtorch.model.methods.tabnet import TabNetModule as TabNetModule
    from qtorch.model.methods.tcts import TCTSModule as TCTSModule
    from qtorch.model.methods.tra import TRAModule as TRAModule
    from qtorch.model.tabular.catboost import CatBoostModel as CatBoostModel
    from qtorch.model.tabular.double_ensemble import DEnsembleModel as DEnsembleModel
    from qtorch.model.tabular.gbdt import LGBModel as LGBModel
    from qtorch.model.tabular.linear import LinearModel as LinearModel
    from qtorch.model.tabular.xgboost import XGBModel as XGBModel

__getattr__, __dir__ = lazy_names(__name__, __file__)
