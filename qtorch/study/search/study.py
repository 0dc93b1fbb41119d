"""An Optuna study that several processes share: ask for trials, tell results, retry lost trials.

One process at a time asks the study for a trial (`SharedStudy.ask`). It sends heartbeats while the
trial's job runs, and then tells the study the result. If the process dies, its trial is queued
again with the same parameters, and the next process that asks gets it. Optuna cannot restart a
trial: a new trial that refers to the original one takes its place.

The job itself may run in a further process. There a `RunningTrial` reports the metric after each
epoch and asks the pruner whether to stop.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from qtorch.core.errors import ConfigError, unknown_name_message
from qtorch.process.lease import ProcessIdentity, RenewalThread, machine_id
from qtorch.study.search.sampler import (
    build_distribution,
    build_pruner,
    build_sampler,
    placeholder_sampler,
    suppress_warnings,
)
from qtorch.study.search.storage import open_storage, study_lock
from qtorch.study.search.trial import Space, TrialJob, TrialRow, storage_url
from qtorch.tracking.locations import default_uri
from qtorch.tracking.pruning import TrialJudge

log = logging.getLogger(__name__)

DIRECTIONS = ("maximize", "minimize")
MAX_RETRIES = 3  # a job that kills its process this often counts as failed
COMPLETE, PRUNED, FAILED = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
RUNNING, WAITING = TrialState.RUNNING, TrialState.WAITING
# Names of the user attributes of a trial (stored in the database).
ERROR, PROCESS, RUN, PRUNED_AT = "error", "process", "run_id", "pruned_at"
# How often the trial was retried because its process died; the number of the original trial;
# whether a user asked for the retry (`retry_failed_trials`).
NUM_RETRIES, RETRY_OF, ON_REQUEST = "retries", "retry_of", "retry"


class SharedStudy:
    """One process's access to a study that other processes work on too.

    `sampler` and `pruner` are names (`tpe`, `median`, ...) or configurations. Each trial gets a new
    sampler, seeded by `seed` and the trial's number: a study that was stopped continues as if it
    had not been, and processes that start together do not draw the same parameters.
    `grace`: seconds without a heartbeat after which a process on another machine counts as dead
    (a process on this machine is looked up directly).
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        direction: str = "maximize",
        sampler: Any = "tpe",
        pruner: Any = None,
        seed: int | None = None,
        grace: float = 60.0,
    ) -> None:
        if direction not in DIRECTIONS:
            raise ConfigError(unknown_name_message("direction", str(direction), DIRECTIONS))
        self.name, self.url, self.seed = name, url, seed
        self.direction, self.sampler = direction, sampler
        self.interval = max(grace / 4, 0.2)
        pruner_object = build_pruner(pruner)
        self._storage = open_storage(url, grace=grace, on_stale_trial=_requeue_trial)
        with suppress_warnings(), study_lock(url, self._storage.engine):
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                direction=StudyDirection[direction.upper()],
                pruner=pruner_object,
                sampler=placeholder_sampler(),
                load_if_exists=True,
            )
        if self._study.direction.name.lower() != direction:
            raise ConfigError(
                f"the study {name!r} exists with direction {self._study.direction.name.lower()}, "
                f"not {direction}. Use another study_name."
            )

    # -- getting trials ------------------------------------------------------------------------

    def ask(self, space: Space, limit: int) -> TrialJob | None:
        """Return the next trial; None if `limit` trials have ended or are running.

        Trials whose process died do not count. They are queued again and come first.
        """
        distributions = {name: build_distribution(part) for name, part in space.items()}
        with suppress_warnings(), study_lock(self.url, self._storage.engine) as is_exclusive:
            self._requeue_dead(is_exclusive)
            trials = self._study.get_trials(deepcopy=False)
            waiting = next((t for t in trials if t.state == WAITING), None)
            if waiting is None and _num_used_slots(trials) >= limit:
                return None
            # A queued trial has its parameters already. It needs a sampler only if it was lost
            # before all of them were drawn.
            if waiting is None or distributions.keys() - waiting.params.keys():
                seed = self._sampler_seed(len(trials))
                self._study.sampler = build_sampler(self.sampler, seed, space)
            try:
                trial = self._study.ask(distributions)
            except ValueError as error:
                raise ConfigError(
                    f"the study {self.name!r} was started with another search space: {error} Use "
                    "another study_name."
                ) from error
            finally:
                self._study.sampler = placeholder_sampler()
            trial.set_user_attr(PROCESS, _current_owner())
            self._storage.record_heartbeat(trial._trial_id)
        is_retry = bool(trial.user_attrs.get(ON_REQUEST))
        return TrialJob(trial.number, trial._trial_id, dict(trial.params), retry=is_retry)

    def _sampler_seed(self, number: int) -> int | None:
        """Return the seed of the sampler of trial `number`; None if the study has no seed."""
        return None if self.seed is None else (self.seed * 1_000_003 + number) % 2**32

    def retry_failed_trials(self) -> int:
        """Queue all failed trials again with the same parameters; return how many there were.

        The failed trials no longer count; their replacements do.
        """
        with study_lock(self.url, self._storage.engine):
            trials = self._study.get_trials(deepcopy=False)
            failed_trials = [t for t in _final_trials(trials) if t.state == FAILED]
            for trial in failed_trials:
                _add_retry(self._study, trial, {ON_REQUEST: True})
        return len(failed_trials)

    def _requeue_dead(self, is_exclusive: bool) -> None:
        """Queue trials of dead processes again; `is_exclusive`: no other process is asking now."""
        # Trials whose heartbeats stopped, on any machine; `_requeue_trial` is called for each.
        optuna.storages.fail_stale_trials(self._study)
        for trial in self._study.get_trials(deepcopy=False, states=(RUNNING,)):
            owner = trial.user_attrs.get(PROCESS)
            # A running trial without an owner: its process died in `ask`.
            if _has_died(owner) or (owner is None and is_exclusive):
                self._storage.set_trial_state_values(trial._trial_id, state=FAILED)
                _requeue_trial(self._study, trial)

    def keep_heartbeats(self, trials: Sequence[TrialJob]) -> RenewalThread:
        """Return a context manager that sends heartbeats for these trials from a thread."""

        def send_heartbeats() -> bool:
            for trial in trials:
                self._storage.record_heartbeat(trial.id)
            return True

        heartbeats = RenewalThread(send_heartbeats, self.interval, "heartbeats of the trials")
        heartbeats.wake()  # send the first ones immediately
        return heartbeats

    # -- reporting results ---------------------------------------------------------------------

    def tell(
        self,
        trial: TrialJob,
        value: float | None,
        *,
        run_id: str | None = None,
        has_pruned_run: bool = False,
    ) -> None:
        """Report the final value of a trial.

        The trial ends as PRUNED, with the last value that it reported instead, if the pruner
        stopped it, or if its run is pruned (it may have reused the run of an equal trial).
        """
        self._set_attributes(trial, **({RUN: run_id} if run_id else {}))
        was_pruned = has_pruned_run or self.is_pruned(trial)
        self._finish(trial, PRUNED if was_pruned else COMPLETE, None if was_pruned else value)

    def fail(self, trial: TrialJob, error: str, *, run_id: str | None = None) -> None:
        """Report that a trial's job failed: the trial counts and is not run again."""
        self._set_attributes(trial, **{ERROR: error[:1000]}, **({RUN: run_id} if run_id else {}))
        self._finish(trial, FAILED)

    def requeue(self, trial: TrialJob, *, count_retry: bool = True) -> bool:
        """Queue an interrupted trial again with the same parameters.

        Returns False if the trial is given up after MAX_RETRIES retries. Without `count_retry`
        (an orderly stop) this queueing does not count as a retry.
        """
        with study_lock(self.url, self._storage.engine):
            if not self._finish(trial, FAILED):
                return True  # the process that took it over has queued it
            frozen = self._storage.get_trial(trial.id)
            if count_retry:
                _requeue_trial(self._study, frozen)
                return not _is_final(frozen)
            _add_retry(self._study, frozen, {NUM_RETRIES: frozen.user_attrs.get(NUM_RETRIES, 0)})
        return True

    def _set_attributes(self, trial: TrialJob, **values: Any) -> None:
        for name, value in values.items():
            try:
                self._storage.set_trial_user_attr(trial.id, name, value)
            except RuntimeError as error:
                log.debug(
                    "trial %d does not accept the attribute %s: %s", trial.number, name, error
                )

    def _finish(self, trial: TrialJob, state: TrialState, value: float | None = None) -> bool:
        """End a trial; return False if another process took it over, believing this one dead."""
        with suppress_warnings():
            try:
                self._study.tell(trial.number, value, state=state)
            except (ValueError, RuntimeError) as error:
                if not self._storage.get_trial(trial.id).state.is_finished():
                    raise
                log.warning("trial %d was taken over by another process: %s", trial.number, error)
                return False
        return True

    # -- reading the study ---------------------------------------------------------------------

    def rows(self) -> list[TrialRow]:
        """Return all trials by number, including those that were replaced."""
        trials = self._study.get_trials(deepcopy=False)
        final_numbers = {t.number for t in _final_trials(trials)}
        return [
            TrialRow(
                t.number,
                t.state.name,
                t.value if t.state in (COMPLETE, PRUNED) else None,
                dict(t.params),
                t.user_attrs.get(RUN),
                _failure_text(t, is_requeued=t.number not in final_numbers),
                len(t.intermediate_values),
                t.user_attrs.get(RETRY_OF),
                replaced=t.state == FAILED and t.number not in final_numbers,
            )
            for t in trials
        ]

    def num_final_trials(self) -> int:
        """Return how many trials have ended for good."""
        return len(_final_trials(self._study.get_trials(deepcopy=False)))

    def has_work(self, limit: int) -> bool:
        """Whether `ask` would return a trial; queues the trials of dead processes again first."""
        with suppress_warnings(), study_lock(self.url, self._storage.engine) as is_exclusive:
            self._requeue_dead(is_exclusive)
            trials = self._study.get_trials(deepcopy=False)
        return any(t.state == WAITING for t in trials) or _num_used_slots(trials) < limit

    def is_pruned(self, trial: TrialJob) -> bool:
        """Whether the pruner has stopped the trial."""
        return PRUNED_AT in self._storage.get_trial(trial.id).user_attrs

    def num_running(self) -> int:
        """Return how many trials are running, in this or other processes."""
        return len(self._study.get_trials(deepcopy=False, states=(RUNNING,)))

    def importances(self) -> dict[str, float]:
        """Return the importance of each parameter among the better trials, the largest first.

        PED-ANOVA (Watanabe et al. 2023). Empty if there are too few completed trials.
        """
        finished_trials = self._study.get_trials(deepcopy=False, states=(COMPLETE,))
        if len(finished_trials) < 4 or len({t.value for t in finished_trials}) < 2:
            return {}
        try:
            with suppress_warnings():
                return dict(optuna.importance.get_param_importances(self._study))
        except (ValueError, RuntimeError) as error:
            log.debug("no parameter importances: %s", error)
            return {}


def _current_owner() -> dict[str, Any]:
    """Return the attribute that identifies this process as the owner of a trial."""
    identity = ProcessIdentity.current()
    return {"host": identity.machine, "pid": identity.pid, "start": identity.start}


def _has_died(owner: Any) -> bool:
    """Whether a trial's owner is known to be dead; False for a process on another machine."""
    if not owner:
        return False
    machine = owner["host"]
    if machine == socket.gethostname():  # earlier versions of qtorch stored the host name alone
        machine = machine_id()
    return ProcessIdentity(machine, owner["pid"], owner["start"]).is_alive() is False


def _num_used_slots(trials: Sequence[FrozenTrial]) -> int:
    """Return how many trials have ended for good or are running."""
    return len(_final_trials(trials)) + sum(t.state == RUNNING for t in trials)


def _final_trials(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that have ended for good; of a retried trial only the last attempt."""
    last_numbers = {_original_number(t): t.number for t in trials}
    return [t for t in trials if _is_final(t) and last_numbers[_original_number(t)] == t.number]


def _original_number(trial: FrozenTrial) -> int:
    """Return the number of the trial's first attempt."""
    return int(trial.user_attrs.get(RETRY_OF, trial.number))


def _is_final(trial: FrozenTrial) -> bool:
    """Whether a trial has ended for good: with a value, pruned, failed, or lost too often."""
    if trial.state in (COMPLETE, PRUNED):
        return True
    is_given_up = ERROR in trial.user_attrs or trial.user_attrs.get(NUM_RETRIES, 0) >= MAX_RETRIES
    return bool(trial.state == FAILED and is_given_up)


def _failure_text(trial: FrozenTrial, *, is_requeued: bool) -> str | None:
    """Return why a trial failed or was lost; None if it was neither."""
    if trial.state != FAILED or ERROR in trial.user_attrs:
        return trial.user_attrs.get(ERROR)
    return "interrupted, run again" if is_requeued else "its process died each time"


def _requeue_trial(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a trial again whose process died, unless it has been retried too often."""
    num_retries = int(trial.user_attrs.get(NUM_RETRIES, 0))
    if num_retries < MAX_RETRIES:
        _add_retry(study, trial, {NUM_RETRIES: num_retries + 1})


def _add_retry(study: optuna.Study, trial: FrozenTrial, attributes: dict[str, Any]) -> None:
    """Add a waiting trial with the parameters and intermediate values of an earlier one."""
    grid_attributes = {"grid_id", "search_space"}
    if not trial.params and not grid_attributes & trial.system_attrs.keys():
        return  # nothing was drawn yet that a retry could repeat: the next `ask` draws anew
    kept_attributes = {k: v for k, v in trial.user_attrs.items() if k in (PRUNED_AT, ON_REQUEST)}
    study.add_trial(
        optuna.create_trial(
            state=WAITING,
            params=trial.params,
            distributions=trial.distributions,
            intermediate_values=trial.intermediate_values,
            user_attrs={**kept_attributes, RETRY_OF: _original_number(trial), **attributes},
            system_attrs={k: v for k, v in trial.system_attrs.items() if k in grid_attributes},
        )
    )


class RunningTrial(TrialJudge):
    """Reports a trial's intermediate values and asks the pruner whether to stop.

    `storage`: the URL of the trials' database; None derives it from the tracking URI.
    """

    def __init__(
        self,
        study: str,
        id: int,
        storage: str | None,
        pruner: Any,
        tracking_uri: str | None = None,
    ) -> None:
        self.id, self._pruner = id, build_pruner(pruner)
        self._storage = open_storage(storage_url(storage, tracking_uri or default_uri()))
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
    def pruner_name(self) -> str:
        """Return the name of the pruner's class."""
        return type(self._pruner).__name__
