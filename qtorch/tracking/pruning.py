"""How a search stops a training that does not look promising; both sides know only this module."""

from __future__ import annotations

from typing import Protocol

PRUNED_TAG = "pruned"  # tag of a run that the search's pruner has stopped
# Environment variable of a trial's process. JSON: `judge` is the configuration of a TrialJudge
# without its tracking URI, `report` the metric to report to it.
TRIAL_VARIABLE = "QTORCH_TRIAL"


class TrialJudge(Protocol):
    """What a running training uses of a search: it reports values and asks whether to stop."""

    @property
    def pruner_name(self) -> str:
        """The name of the rule that decides."""

    def should_stop(self, step: int, value: float) -> bool:
        """Report the value after `step`; return whether the training should stop."""
