"""The data layer: panels, sources, expressions, processors, handlers, datasets and batches."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.data.dataset.batch import Batch as Batch
    from qtorch.data.dataset.batches import BatchLoader as BatchLoader
    from qtorch.data.dataset.concept_matrix import ConceptMatrix as ConceptMatrix
    from qtorch.data.dataset.dataset import Dataset as Dataset
    from qtorch.data.dataset.dataset import DatasetH as DatasetH
    from qtorch.data.dataset.dataset import TSDatasetH as TSDatasetH
    from qtorch.data.dataset.extras import Concepts as Concepts
    from qtorch.data.dataset.extras import Extra as Extra
    from qtorch.data.dataset.qlib_dataset import get_samples as get_samples
    from qtorch.data.dataset.reweighter import ExpressionWeight as ExpressionWeight
    from qtorch.data.dataset.reweighter import LiquidityWeight as LiquidityWeight
    from qtorch.data.dataset.reweighter import Reweighter as Reweighter
    from qtorch.data.dataset.reweighter import TimeDecay as TimeDecay
    from qtorch.data.dataset.reweighter import VolatilityWeight as VolatilityWeight
    from qtorch.data.dataset.sampler import TSDataSampler as TSDataSampler
    from qtorch.data.dataset.samples import Samples as Samples
    from qtorch.data.expression.evaluation import evaluate as evaluate
    from qtorch.data.expression.operators import register_operator as register_operator
    from qtorch.data.handler.alpha import Alpha158 as Alpha158
    from qtorch.data.handler.alpha import Alpha158DL as Alpha158DL
    from qtorch.data.handler.alpha import Alpha158vwap as Alpha158vwap
    from qtorch.data.handler.alpha import Alpha360 as Alpha360
    from qtorch.data.handler.alpha import Alpha360DL as Alpha360DL
    from qtorch.data.handler.alpha import Alpha360vwap as Alpha360vwap
    from qtorch.data.handler.alpha101 import Alpha101 as Alpha101
    from qtorch.data.handler.alpha101 import Alpha101DL as Alpha101DL
    from qtorch.data.handler.filter import ExpressionDFilter as ExpressionDFilter
    from qtorch.data.handler.filter import NameDFilter as NameDFilter
    from qtorch.data.handler.handler import DataHandler as DataHandler
    from qtorch.data.handler.handler import DataHandlerLP as DataHandlerLP
    from qtorch.data.handler.loader import DataLoader as DataLoader
    from qtorch.data.handler.loader import DataLoaderDH as DataLoaderDH
    from qtorch.data.handler.loader import NestedDataLoader as NestedDataLoader
    from qtorch.data.handler.loader import QlibDataLoader as QlibDataLoader
    from qtorch.data.handler.loader import StaticDataLoader as StaticDataLoader
    from qtorch.data.handler.provider import D as D
    from qtorch.data.handler.provider import DataProvider as DataProvider
    from qtorch.data.panel.panel import Panel as Panel
    from qtorch.data.panel.view import View as View
    from qtorch.data.source.base import Source as Source
    from qtorch.data.source.frame import FrameSource as FrameSource
    from qtorch.data.source.qlib import QlibSource as QlibSource
    from qtorch.data.source.qlib import exists_qlib_data as exists_qlib_data
    from qtorch.data.source.synthetic import SyntheticSource as SyntheticSource
    from qtorch.data.source.table import TableSource as TableSource
    from qtorch.data.source.writer import write_qlib as write_qlib

__getattr__, __dir__ = lazy_names(__name__, __file__)
