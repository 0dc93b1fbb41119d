"""A trial as its job's process sees it."""

from __future__ import annotations

from typing import Any

import optuna

from qtorch.tracking.trials.parts import plain_sampler, pruner_of, quiet
from qtorch.tracking.trials.storage import open_storage
from qtorch.tracking.trials.study import PRUNED_AT


class RunningTrial:
    """A trial as its job sees it: values go in, and whether to stop comes out."""

    def __init__(self, study: str, id: int, url: str, pruner: Any) -> None:
        self.id, self._pruner = id, pruner_of(pruner)
        self._storage = open_storage(url)
        with quiet():
            self._study = optuna.load_study(
                study_name=study,
                storage=self._storage,
                sampler=plain_sampler(),
                pruner=self._pruner,
            )

    def should_stop(self, step: int, value: float) -> bool:
        """Report the value after `step`; True, and noted so, where the pruner gives it up."""
        with quiet():
            self._storage.set_trial_intermediate_value(self.id, step, value)
            trial = self._storage.get_trial(self.id)
            if not self._pruner.prune(self._study, trial):
                return False
            self._storage.set_trial_user_attr(self.id, PRUNED_AT, step)
        return True

    @property
    def pruner(self) -> str:
        """The name of what decides."""
        return type(self._pruner).__name__
