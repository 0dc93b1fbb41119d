"""Sources of bars: Qlib's files, parquet and CSV, a DataFrame, a synthetic market."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.data.source.base import Bars as Bars
    from qtorch.data.source.base import Source as Source
    from qtorch.data.source.frame import FrameSource as FrameSource
    from qtorch.data.source.frame import as_source as as_source
    from qtorch.data.source.qlib import QlibSource as QlibSource
    from qtorch.data.source.synthetic import SyntheticSource as SyntheticSource
    from qtorch.data.source.table import TableSource as TableSource
    from qtorch.data.source.writer import write_qlib as write_qlib

__getattr__, __dir__ = lazy_names(__name__, __file__)
