"""Processors, which transform the raw columns of a loader into the inputs of a model."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.data.processor.base import Processor as Processor
    from qtorch.data.processor.cross_section import CSRankNorm as CSRankNorm
    from qtorch.data.processor.cross_section import CSZFillna as CSZFillna
    from qtorch.data.processor.cross_section import CSZScoreNorm as CSZScoreNorm
    from qtorch.data.processor.elementwise import Fillna as Fillna
    from qtorch.data.processor.elementwise import ProcessInf as ProcessInf
    from qtorch.data.processor.elementwise import TanhProcess as TanhProcess
    from qtorch.data.processor.pandas_processor import FrameProcessor as FrameProcessor
    from qtorch.data.processor.pandas_processor import PandasProcessor as PandasProcessor
    from qtorch.data.processor.selection import DropCol as DropCol
    from qtorch.data.processor.selection import DropnaLabel as DropnaLabel
    from qtorch.data.processor.selection import DropnaProcessor as DropnaProcessor
    from qtorch.data.processor.selection import FilterCol as FilterCol
    from qtorch.data.processor.selection import HashStockFormat as HashStockFormat
    from qtorch.data.processor.selection import TimeRangeFlt as TimeRangeFlt
    from qtorch.data.processor.statistics import MinMaxNorm as MinMaxNorm
    from qtorch.data.processor.statistics import RobustZScoreNorm as RobustZScoreNorm
    from qtorch.data.processor.statistics import ZScoreNorm as ZScoreNorm

__getattr__, __dir__ = lazy_names(__name__, __file__)
