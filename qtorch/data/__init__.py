"""The data layer: panels, sources, expressions, processors, handlers, datasets and batches."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.data.alpha import Alpha158 as Alpha158
    from qtorch.data.alpha import Alpha158vwap as Alpha158vwap
    from qtorch.data.alpha import Alpha360 as Alpha360
    from qtorch.data.alpha import Alpha360vwap as Alpha360vwap
    from qtorch.data.batches import Batch as Batch
    from qtorch.data.batches import BatchLoader as BatchLoader
    from qtorch.data.data_loader import DataLoader as DataLoader
    from qtorch.data.dataset import DatasetH as DatasetH
    from qtorch.data.expression.evaluation import evaluate as evaluate
    from qtorch.data.expression.operators import register_operator as register_operator
    from qtorch.data.extras import Concepts as Concepts
    from qtorch.data.extras import Extra as Extra
    from qtorch.data.filter import ExpressionDFilter as ExpressionDFilter
    from qtorch.data.filter import NameDFilter as NameDFilter
    from qtorch.data.handler import DataHandlerLP as DataHandlerLP
    from qtorch.data.loader import NestedDataLoader as NestedDataLoader
    from qtorch.data.loader import QlibDataLoader as QlibDataLoader
    from qtorch.data.loader import StaticDataLoader as StaticDataLoader
    from qtorch.data.panel import Panel as Panel
    from qtorch.data.raw_handler import DataHandler as DataHandler
    from qtorch.data.reweighter import Reweighter as Reweighter
    from qtorch.data.sample_set import Samples as Samples
    from qtorch.data.sampler import TSDataSampler as TSDataSampler
    from qtorch.data.samples import get_samples as get_samples
    from qtorch.data.source.base import Source as Source
    from qtorch.data.source.frame import FrameSource as FrameSource
    from qtorch.data.source.qlib import QlibSource as QlibSource
    from qtorch.data.source.qlib_writer import write_qlib as write_qlib
    from qtorch.data.source.synthetic import SyntheticSource as SyntheticSource
    from qtorch.data.source.table import TableSource as TableSource
    from qtorch.data.view import View as View
    from qtorch.data.weighting import ExpressionWeight as ExpressionWeight
    from qtorch.data.weighting import LiquidityWeight as LiquidityWeight
    from qtorch.data.weighting import TimeDecay as TimeDecay
    from qtorch.data.weighting import VolatilityWeight as VolatilityWeight
    from qtorch.data.window_dataset import TSDatasetH as TSDatasetH

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Alpha158": "qtorch.data.alpha",
        "Alpha158vwap": "qtorch.data.alpha",
        "Alpha360": "qtorch.data.alpha",
        "Alpha360vwap": "qtorch.data.alpha",
        "Batch": "qtorch.data.batches",
        "BatchLoader": "qtorch.data.batches",
        "Concepts": "qtorch.data.extras",
        "Extra": "qtorch.data.extras",
        "DataLoader": "qtorch.data.data_loader",
        "DatasetH": "qtorch.data.dataset",
        "evaluate": "qtorch.data.expression.evaluation",
        "register_operator": "qtorch.data.expression.operators",
        "ExpressionDFilter": "qtorch.data.filter",
        "NameDFilter": "qtorch.data.filter",
        "DataHandlerLP": "qtorch.data.handler",
        "NestedDataLoader": "qtorch.data.loader",
        "QlibDataLoader": "qtorch.data.loader",
        "StaticDataLoader": "qtorch.data.loader",
        "Panel": "qtorch.data.panel",
        "DataHandler": "qtorch.data.raw_handler",
        "Reweighter": "qtorch.data.reweighter",
        "LiquidityWeight": "qtorch.data.weighting",
        "VolatilityWeight": "qtorch.data.weighting",
        "ExpressionWeight": "qtorch.data.weighting",
        "TimeDecay": "qtorch.data.weighting",
        "Samples": "qtorch.data.sample_set",
        "TSDataSampler": "qtorch.data.sampler",
        "get_samples": "qtorch.data.samples",
        "Source": "qtorch.data.source.base",
        "FrameSource": "qtorch.data.source.frame",
        "QlibSource": "qtorch.data.source.qlib",
        "write_qlib": "qtorch.data.source.qlib_writer",
        "SyntheticSource": "qtorch.data.source.synthetic",
        "TableSource": "qtorch.data.source.table",
        "View": "qtorch.data.view",
        "TSDatasetH": "qtorch.data.window_dataset",
    },
)
