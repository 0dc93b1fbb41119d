"""Records: what a run stores after training: scores, labels, their quality, backtest, report."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.record.base import Record as Record
    from qtorch.record.hf_signal import HFSignalRecord as HFSignalRecord
    from qtorch.record.multi_pass import MultiPassPortAnaRecord as MultiPassPortAnaRecord
    from qtorch.record.portfolio import PortAnaRecord as PortAnaRecord
    from qtorch.record.report import ReportRecord as ReportRecord
    from qtorch.record.segment_ic import SegmentICRecord as SegmentICRecord
    from qtorch.record.signal import SignalRecord as SignalRecord
    from qtorch.record.signal_analysis import SigAnaRecord as SigAnaRecord

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "HFSignalRecord": "qtorch.record.hf_signal",
        "MultiPassPortAnaRecord": "qtorch.record.multi_pass",
        "PortAnaRecord": "qtorch.record.portfolio",
        "Record": "qtorch.record.base",
        "ReportRecord": "qtorch.record.report",
        "SegmentICRecord": "qtorch.record.segment_ic",
        "SigAnaRecord": "qtorch.record.signal_analysis",
        "SignalRecord": "qtorch.record.signal",
    },
)
