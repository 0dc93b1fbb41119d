"""Work on many runs: rolling studies, sweeps, collectors, ensembles, comparisons, exports."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.study.collect import AverageEnsemble as AverageEnsemble
    from qtorch.study.collect import Collector as Collector
    from qtorch.study.collect import Ensemble as Ensemble
    from qtorch.study.collect import Group as Group
    from qtorch.study.collect import MergeCollector as MergeCollector
    from qtorch.study.collect import RecorderCollector as RecorderCollector
    from qtorch.study.collect import RollingEnsemble as RollingEnsemble
    from qtorch.study.collect import RollingGroup as RollingGroup
    from qtorch.study.collect import SingleKeyEnsemble as SingleKeyEnsemble
    from qtorch.study.comparison import Comparison as Comparison
    from qtorch.study.comparison import RunSelection as RunSelection
    from qtorch.study.comparison import assess_runs as assess_runs
    from qtorch.study.comparison import compare_runs as compare_runs
    from qtorch.study.comparison_page import write_comparison as write_comparison
    from qtorch.study.export import ExportResult as ExportResult
    from qtorch.study.export import export_model as export_model
    from qtorch.study.export import load_network as load_network
    from qtorch.study.leakage.probe import probe as probe
    from qtorch.study.leakage.report import ProbeReport as ProbeReport
    from qtorch.study.replay import Replay as Replay
    from qtorch.study.replay import replay_run as replay_run
    from qtorch.study.rolling import RollingResult as RollingResult
    from qtorch.study.rolling import StitchedSignal as StitchedSignal
    from qtorch.study.rolling import StudyError as StudyError
    from qtorch.study.rolling import rolling_study as rolling_study
    from qtorch.study.warm_start import WarmStart as WarmStart

__getattr__, __dir__ = lazy_names(__name__, __file__)
