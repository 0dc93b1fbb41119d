"""A search's trials: asked for, reported, told, taken up again after a death.

Several processes may work on one study: each asks for a trial in its turn,
keeps its heartbeat while the trial's job runs, and tells how it ended. A trial whose process died
is put back to be run again, with the same parameters, by whoever asks next.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.tracking.trials.life import is_dead, this_process
from qtorch.tracking.trials.parts import (
    distribution_of,
    plain_sampler,
    pruner_of,
    quiet,
    sampler_of,
)
from qtorch.tracking.trials.place import turn
from qtorch.tracking.trials.row import Asked, TrialRow
from qtorch.tracking.trials.space import Space
from qtorch.tracking.trials.storage import open_storage

log = logging.getLogger(__name__)

DIRECTIONS = ("maximize", "minimize")
MAX_RETRIES = 3  # a job that takes its process down each time is a failed one
COMPLETE, PRUNED, FAILED = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
RUNNING, WAITING = TrialState.RUNNING, TrialState.WAITING
# What a trial carries beside its values.
ERROR, PROCESS, RUN, PRUNED_AT = "error", "process", "run_id", "pruned_at"
RETRIES, RETRY_OF, RETRY = "retries", "retry_of", "retry"


class Trials:
    """One study, as one of its processes sees it.

    `sampler` and `pruner` are names (`tpe`, `median`, ...) or configurations. A sampler is made
    anew for each trial, seeded by `seed` and the trial's number: a study that was stopped goes on
    as if it had not been, and processes that start together do not draw the same.
    `grace`: seconds without a heartbeat after which a process on another machine counts as dead
    (on this machine it is asked for directly).
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
            raise ConfigError(unknown_name("direction", str(direction), DIRECTIONS))
        self.name, self.url, self.seed = name, url, seed
        self.direction, self.sampler = direction, sampler
        self.interval = max(grace / 4, 0.2)
        built = pruner_of(pruner)
        self._storage = open_storage(url, grace=grace, stale=_put_back)
        with quiet(), turn(url, self._storage.engine):
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                direction="maximize" if direction == DIRECTIONS[0] else "minimize",
                pruner=built,
                sampler=plain_sampler(),
                load_if_exists=True,
            )
        if self._study.direction.name.lower() != direction:
            raise ConfigError(
                f"the study {name!r} is there already, to {self._study.direction.name.lower()}; "
                f"asked for is to {direction}. Give another study_name."
            )

    # -- asking --------------------------------------------------------------------------------

    def ask(self, space: Space, limit: int) -> Asked | None:
        """The next trial; None where the study has `limit` of them, run or running.

        Those whose process died are not counted: they are run again, first of all.
        """
        distributions = {name: distribution_of(part) for name, part in space.items()}
        with quiet(), turn(self.url, self._storage.engine) as alone:
            self._retry_dead(alone)
            trials = self._study.get_trials(deepcopy=False)
            waiting = next((t for t in trials if t.state == WAITING), None)
            if waiting is None and _taken(trials) >= limit:
                return None
            if waiting is None or distributions.keys() - waiting.params.keys():
                self._study.sampler = sampler_of(self.sampler, self._seed(len(trials)), space)
            try:
                trial = self._study.ask(distributions)
            except ValueError as error:
                raise ConfigError(
                    f"the study {self.name!r} was begun with another space: {error} Give another "
                    "study_name."
                ) from error
            finally:
                self._study.sampler = plain_sampler()
            trial.set_user_attr(PROCESS, this_process())
            self._storage.record_heartbeat(trial._trial_id)
        again = bool(trial.user_attrs.get(RETRY))
        return Asked(trial.number, trial._trial_id, dict(trial.params), retry=again)

    def _seed(self, number: int) -> int | None:
        return None if self.seed is None else (self.seed * 1_000_003 + number) % 2**32

    def retry_failed(self) -> int:
        """Have all that failed run again, with their parameters; how many there were.

        They count no longer: those that are run in their stead do.
        """
        with turn(self.url, self._storage.engine):
            trials = self._study.get_trials(deepcopy=False)
            failed = [t for t in _ended(trials) if t.state == FAILED]
            for trial in failed:
                _add_again(self._study, trial, {RETRY: True})
        return len(failed)

    def _retry_dead(self, alone: bool) -> None:
        """Put back the trials whose process died; `alone`: no other one is just asking."""
        optuna.storages.fail_stale_trials(self._study)
        for trial in self._study.get_trials(deepcopy=False, states=(RUNNING,)):
            process = trial.user_attrs.get(PROCESS)
            if is_dead(process) or (process is None and alone):  # it died while it asked
                self._storage.set_trial_state_values(trial._trial_id, state=FAILED)
                _put_back(self._study, trial)

    @contextmanager
    def alive(self, asked: Sequence[Asked]) -> Iterator[None]:
        """Keep the heartbeats of trials inside the block."""
        over = threading.Event()

        def beat() -> None:
            while True:
                for trial in asked:
                    try:
                        self._storage.record_heartbeat(trial.id)
                    except Exception as error:
                        log.warning("the heartbeat of trial %d is lost: %s", trial.number, error)
                if over.wait(self.interval):
                    return

        thread = threading.Thread(target=beat, name="qtorch-trials", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    # -- telling -------------------------------------------------------------------------------

    def tell(
        self,
        trial: Asked,
        value: float | None,
        *,
        run_id: str | None = None,
        pruned: bool = False,
    ) -> None:
        """The trial ended with `value`; one that its pruner stopped (or an equal one, whose run
        it was given: `pruned`) is PRUNED."""
        self._note(trial, **({RUN: run_id} if run_id else {}))
        stopped = pruned or self.is_pruned(trial)
        self._end(trial, PRUNED if stopped else COMPLETE, None if stopped else value)

    def fail(self, trial: Asked, error: str, *, run_id: str | None = None) -> None:
        """The trial's job failed: it counts, and is not run again."""
        self._note(trial, **{ERROR: error[:1000]}, **({RUN: run_id} if run_id else {}))
        self._end(trial, FAILED)

    def give_back(self, trial: Asked, *, lost: bool = True) -> bool:
        """The trial was interrupted: it is run again, with its parameters, by who asks next.

        False where it is not, for it was `lost` too often; one that was stopped in order is not.
        """
        with turn(self.url, self._storage.engine):
            if not self._end(trial, FAILED):
                return True
            frozen = self._storage.get_trial(trial.id)
            if lost:
                _put_back(self._study, frozen)
                return not _is_final(frozen)
            _add_again(self._study, frozen, {RETRIES: frozen.user_attrs.get(RETRIES, 0)})
        return True

    def _note(self, trial: Asked, **values: Any) -> None:
        for name, value in values.items():
            try:
                self._storage.set_trial_user_attr(trial.id, name, value)
            except RuntimeError as error:
                log.debug("trial %d takes no %s: %s", trial.number, name, error)

    def _end(self, trial: Asked, state: TrialState, value: float | None = None) -> bool:
        """False where another process took this one for dead, and the trial from it."""
        with quiet():
            try:
                self._study.tell(trial.number, value, state=state)
            except (ValueError, RuntimeError) as error:
                if not self._storage.get_trial(trial.id).state.is_finished():
                    raise
                log.warning("trial %d had been given to another process: %s", trial.number, error)
                return False
        return True

    # -- looking -------------------------------------------------------------------------------

    def rows(self) -> list[TrialRow]:
        """All trials by number, those that were run again too."""
        trials = self._study.get_trials(deepcopy=False)
        ended = {t.number for t in _ended(trials)}
        return [
            TrialRow(
                t.number,
                t.state.name,
                t.value if t.state in (COMPLETE, PRUNED) else None,
                dict(t.params),
                t.user_attrs.get(RUN),
                _why(t, again=t.number not in ended),
                len(t.intermediate_values),
                t.user_attrs.get(RETRY_OF),
                replaced=t.state == FAILED and t.number not in ended,
            )
            for t in trials
        ]

    def counted(self) -> int:
        """How many trials have ended for good."""
        return len(_ended(self._study.get_trials(deepcopy=False)))

    def has_work(self, limit: int) -> bool:
        """Whether a trial would be given out; those whose process died are put back first."""
        with quiet(), turn(self.url, self._storage.engine) as alone:
            self._retry_dead(alone)
            trials = self._study.get_trials(deepcopy=False)
        return any(t.state == WAITING for t in trials) or _taken(trials) < limit

    def is_pruned(self, trial: Asked) -> bool:
        """Whether the pruner has stopped the trial."""
        return PRUNED_AT in self._storage.get_trial(trial.id).user_attrs

    def running(self) -> int:
        """How many trials run, here or in other processes."""
        return len(self._study.get_trials(deepcopy=False, states=(RUNNING,)))

    def importances(self) -> dict[str, float]:
        """The share of each parameter in the value's changes, of the better trials (PED-ANOVA,
        Watanabe et al. 2023), most first; empty where there are too few trials to say."""
        done = self._study.get_trials(deepcopy=False, states=(COMPLETE,))
        if len(done) < 4 or len({t.value for t in done}) < 2:
            return {}
        try:
            with quiet():
                return dict(optuna.importance.get_param_importances(self._study))
        except (ValueError, RuntimeError) as error:
            log.debug("no importances: %s", error)
            return {}


def _taken(trials: Sequence[FrozenTrial]) -> int:
    """How many of those that were asked for have ended for good or run."""
    return len(_ended(trials)) + sum(t.state == RUNNING for t in trials)


def _ended(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that have ended for good: of one that was run again, the last."""
    last = {_first_of(t): t.number for t in trials}
    return [t for t in trials if _is_final(t) and last[_first_of(t)] == t.number]


def _first_of(trial: FrozenTrial) -> int:
    return int(trial.user_attrs.get(RETRY_OF, trial.number))


def _is_final(trial: FrozenTrial) -> bool:
    if trial.state in (COMPLETE, PRUNED):
        return True
    given_up = ERROR in trial.user_attrs or trial.user_attrs.get(RETRIES, 0) >= MAX_RETRIES
    return bool(trial.state == FAILED and given_up)


def _why(trial: FrozenTrial, *, again: bool) -> str | None:
    """Why a trial has no value."""
    if trial.state != FAILED or ERROR in trial.user_attrs:
        return trial.user_attrs.get(ERROR)
    return "interrupted, run again" if again else "its process was lost each time"


def _put_back(study: optuna.Study, trial: FrozenTrial) -> None:
    """Have a trial whose job or process was lost run again, unless that was too often."""
    retries = int(trial.user_attrs.get(RETRIES, 0))
    if retries < MAX_RETRIES:
        _add_again(study, trial, {RETRIES: retries + 1})


def _add_again(study: optuna.Study, trial: FrozenTrial, noted: dict[str, Any]) -> None:
    """A new trial with the parameters of an earlier one, and what that had reported."""
    known = {"grid_id", "search_space"}
    if not trial.params and not known & trial.system_attrs.keys():
        return  # nothing was drawn yet
    kept = {k: v for k, v in trial.user_attrs.items() if k in (PRUNED_AT, RETRY)}
    study.add_trial(
        optuna.create_trial(
            state=WAITING,
            params=trial.params,
            distributions=trial.distributions,
            intermediate_values=trial.intermediate_values,
            user_attrs={**kept, RETRY_OF: _first_of(trial), **noted},
            system_attrs={k: v for k, v in trial.system_attrs.items() if k in known},
        )
    )
