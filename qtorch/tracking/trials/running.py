"""A running trial, as used by the process of its job."""

from __future__ import annotations

from typing import Any

import optuna

from qtorch.tracking.trials.parts import build_pruner, placeholder_sampler, suppress_warnings
from qtorch.tracking.trials.storage import open_storage
from qtorch.tracking.trials.study import PRUNED_AT


class RunningTrial:
    """Reports a trial's intermediate values and asks the pruner whether to stop."""

    def __init__(self, study: str, id: int, url: str, pruner: Any) -> None:
        self.id, self._pruner = id, build_pruner(pruner)
        self._storage = open_storage(url)
        with suppress_warnings():
            self._study = optuna.load_study(
                study_name=study,
                storage=self._storage,
                sampler=placeholder_sampler(),
                pruner=self._pruner,
            )

    def should_stop(self, step: int, value: float) -> bool:
        """Report the value after `step`; record and return whether the pruner stops the trial."""
        with suppress_warnings():
            self._storage.set_trial_intermediate_value(self.id, step, value)
            trial = self._storage.get_trial(self.id)
            if not self._pruner.prune(self._study, trial):
                return False
            self._storage.set_trial_user_attr(self.id, PRUNED_AT, step)
        return True

    @property
    def pruner(self) -> str:
        """Return the name of the pruner's class."""
        return type(self._pruner).__name__
