"""Records: what a run stores after training: scores, labels, their quality, backtest, report."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.record.base import Record as Record
    from qtorch.record.portfolio import MultiPassPortAnaRecord as MultiPassPortAnaRecord
    from qtorch.record.portfolio import PortAnaRecord as PortAnaRecord
    from qtorch.record.report.report import ReportRecord as ReportRecord
    from qtorch.record.signal import HFSignalRecord as HFSignalRecord
    from qtorch.record.signal import SegmentICRecord as SegmentICRecord
    from qtorch.record.signal import SigAnaRecord as SigAnaRecord
    from qtorch.record.signal import SignalMseRecord as SignalMseRecord
    from qtorch.record.signal import SignalRecord as SignalRecord

__getattr__, __dir__ = lazy_names(__name__, __file__)
