"""Processors, which transform the raw columns of a loader into the inputs of a model."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.data.processor.base import Processor as Processor
    from qtorch.data.processor.day import CSRankNorm as CSRankNorm
    from qtorch.data.processor.day import CSZFillna as CSZFillna
    from qtorch.data.processor.day import CSZScoreNorm as CSZScoreNorm
    from qtorch.data.processor.elementwise import Fillna as Fillna
    from qtorch.data.processor.elementwise import ProcessInf as ProcessInf
    from qtorch.data.processor.elementwise import TanhProcess as TanhProcess
    from qtorch.data.processor.pandas_processor import PandasProcessor as PandasProcessor
    from qtorch.data.processor.rows import DropnaLabel as DropnaLabel
    from qtorch.data.processor.rows import DropnaProcessor as DropnaProcessor
    from qtorch.data.processor.rows import TimeRangeFlt as TimeRangeFlt
    from qtorch.data.processor.selection import DropCol as DropCol
    from qtorch.data.processor.selection import FilterCol as FilterCol
    from qtorch.data.processor.selection import HashStockFormat as HashStockFormat
    from qtorch.data.processor.statistics import MinMaxNorm as MinMaxNorm
    from qtorch.data.processor.statistics import RobustZScoreNorm as RobustZScoreNorm
    from qtorch.data.processor.statistics import ZScoreNorm as ZScoreNorm

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Processor": "qtorch.data.processor.base",
        "CSRankNorm": "qtorch.data.processor.day",
        "CSZFillna": "qtorch.data.processor.day",
        "CSZScoreNorm": "qtorch.data.processor.day",
        "Fillna": "qtorch.data.processor.elementwise",
        "ProcessInf": "qtorch.data.processor.elementwise",
        "TanhProcess": "qtorch.data.processor.elementwise",
        "PandasProcessor": "qtorch.data.processor.pandas_processor",
        "DropnaLabel": "qtorch.data.processor.rows",
        "DropnaProcessor": "qtorch.data.processor.rows",
        "TimeRangeFlt": "qtorch.data.processor.rows",
        "DropCol": "qtorch.data.processor.selection",
        "FilterCol": "qtorch.data.processor.selection",
        "HashStockFormat": "qtorch.data.processor.selection",
        "MinMaxNorm": "qtorch.data.processor.statistics",
        "RobustZScoreNorm": "qtorch.data.processor.statistics",
        "ZScoreNorm": "qtorch.data.processor.statistics",
    },
)
