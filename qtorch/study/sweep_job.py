"""Run one job of a sweep, reusing the work that earlier runs of the same task have completed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from qtorch.core.errors import LoadObjectError, QtorchError, TrustError
from qtorch.core.identity import digest, fit_id, task_id
from qtorch.core.instantiate import resolve_config
from qtorch.core.session import session
from qtorch.process.lease import hold_claim
from qtorch.study.sweep import JOB_TAG, SECONDS_TAG, SETTING_TAG, TASK_TAG, claim_path
from qtorch.tracking.claims import is_run_held
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import PARENT_TAG, Recorder, with_run_tags
from qtorch.tracking.store_types import NotInStoreError, RunRow
from qtorch.trainer.failure import announce_run, collect_started_runs, get_error
from qtorch.trainer.provenance import DATA_TAG, RunInputs
from qtorch.trainer.run import (
    collect_task_inputs,
    complete_task,
    reuse_trained_run,
    task_train,
)

log = logging.getLogger(__name__)

FIT_KEY_TAG = "qtorch.fit_key"  # identifies a training except for its data, without reading them
FIT_TAG = "qtorch.fit_id"  # identifies a training including its data and code
FIT_FROM_TAG = "qtorch.fit_from"  # the run whose training this run's records were computed from
POLL_SECONDS = 0.5  # between two checks of a job that another process has claimed
ENDED = (Recorder.STATUS_FI, Recorder.STATUS_FA, Recorder.STATUS_K)
INTERRUPTED = (Recorder.STATUS_R, Recorder.STATUS_K, Recorder.STATUS_S)

TRAINED, SKIPPED, RESUMED, RETRIED = "trained", "skipped", "resumed", "retried"
RECORDS_ONLY, ELSEWHERE, FAILED_BEFORE = "records only", "elsewhere", "failed before"


@dataclass(frozen=True)
class SweepMember:
    """A job as a member of a sweep: the sweep's run ID, the job's number and overrides.

    `retry`: failed jobs are tried again. `reuse`: runs of the experiment that do not belong to the
    sweep are used too, if they finished the same task or the same training.
    """

    sweep_id: str
    number: int
    overrides: tuple[str, ...]
    retry: bool = False
    reuse: bool = True

    @property
    def tags(self) -> dict[str, str]:
        """The tags of a run of this job."""
        details = {"number": self.number, "overrides": list(self.overrides)}
        return {JOB_TAG + self.sweep_id: json.dumps(details)}


@dataclass(frozen=True)
class JobOutcome:
    """The run of a job, and what was done with it: one of the constants above."""

    recorder: Recorder
    action: str
    reason: str = ""  # why an earlier run is used

    @property
    def error(self) -> str | None:
        """Why the job is not finished; None if it is."""
        if self.action == FAILED_BEFORE:
            return f"{get_error(self.recorder)} (failed before; set sweep.retry=true to try again)"
        if self.action == ELSEWHERE:
            return "another process is working on it."
        return None


def identify_task(task: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Complete a task, and compute the tags that identify it.

    The tags identify the whole task, the task without its seed, and its training. A task without a
    seed gets one that is derived from its definition, so that it has an identity.
    """
    config = resolve_config(task)
    if config.get("seed") is None and session().seed is None:
        config = {**config, "seed": int(digest(config)[:8], 16) % 2**31}
    complete = complete_task(config)
    tags = {
        TASK_TAG: task_id(complete),
        SETTING_TAG: digest(_without_seed(complete)),
        FIT_KEY_TAG: fit_id(complete, ""),
    }
    return complete, tags


def run_sweep_job(
    task: Mapping[str, Any],
    member: SweepMember,
    experiment_name: str | None = None,
    recorder_name: str | None = None,
) -> JobOutcome:
    """Run a job of a sweep, without repeating the work of an earlier run of the same task.

    A finished run is used as it is; an interrupted one is resumed from its checkpoint; a failed
    one stays failed unless `retry`. If a run differs only in its records, its training is reused.
    A run is only used if the data, the code of the user's modules and qtorch are the same now;
    otherwise the job is trained in a new run, and a warning says why. A job that another live
    process works on is left to that process.
    """
    complete, tags = identify_task(task)
    experiment = R.get_exp(experiment_name=experiment_name)
    runs = _EarlierRuns(experiment.id, complete, tags, member)
    # A finished run needs no claim: taking over that of a dead process of another machine lasts a
    # minute.
    earlier = runs.find()
    if earlier is not None and earlier.status == Recorder.STATUS_FI:
        return runs.skip(earlier)
    is_waiting = False
    while True:
        with hold_claim(claim_path(experiment.id, tags)) as has_claim:
            earlier = runs.find()
            if earlier is not None and earlier.status == Recorder.STATUS_FI:
                return runs.skip(earlier)
            if has_claim:
                return _run_with_claim(runs, earlier, experiment_name, recorder_name)
        if earlier is not None:
            return _adopt_earlier_run(earlier, member, ELSEWHERE)
        if not is_waiting:
            log.info("another process has claimed this job: waiting until it starts a run or ends")
            is_waiting = True
        time.sleep(POLL_SECONDS)


def _run_with_claim(runs: _EarlierRuns, earlier: RunRow | None, *names: str | None) -> JobOutcome:
    """Do the remaining work of a job whose claim this process holds.

    A new run uses the training of an earlier one if possible. `names` are those of the experiment
    and of the run.
    """
    task, member = runs.task, runs.member
    if earlier is not None and is_run_held(earlier.id, R.get_uri()):  # somebody has resumed it
        return _adopt_earlier_run(earlier, member, ELSEWHERE)
    if earlier is not None and earlier.status == Recorder.STATUS_FA and not member.retry:
        return _adopt_earlier_run(earlier, member, FAILED_BEFORE)
    with with_run_tags({**runs.tags, **member.tags, PARENT_TAG: member.sweep_id}):
        if earlier is not None:
            return _resume_run(task, member, earlier)
        for row in runs.find_trained_runs():
            reuse_tags = {FIT_FROM_TAG: row.id, FIT_TAG: row.tags[FIT_TAG]}
            with with_run_tags({**reuse_tags, **runs.inputs.tags}):
                recorder = _reuse_training(task, row.id, *names)
            if recorder is not None:
                log.info("used the training of run %s (%s)", row.id, runs.inputs.describe())
                return JobOutcome(recorder, RECORDS_ONLY, runs.inputs.describe())
        # A job that fails has a run, by which a repeated command knows that it has failed.
        recorder = task_train(task, *names, on_fitted=partial(tag_fit, task), check_first=False)
        return JobOutcome(recorder, TRAINED)


def _resume_run(task: dict[str, Any], member: SweepMember, earlier: RunRow) -> JobOutcome:
    """Continue an earlier run of the same task from its checkpoint."""
    _adopt_earlier_run(earlier, member, RESUMED)
    attempt = {"experiment_id": earlier.experiment_id, "recorder_id": earlier.id}
    recorder = None
    if FIT_FROM_TAG in earlier.tags:  # the run reused a training: only its records are missing
        recorder = _reuse_training(task, earlier.tags[FIT_FROM_TAG], run=attempt)
    if recorder is None:
        # The tag must not promise a trained model while this attempt replaces it.
        if FIT_TAG in earlier.tags:
            R.get_recorder(recorder_id=earlier.id).delete_tags(FIT_TAG)
        recorder = task_train(
            task, run=attempt, on_fitted=partial(tag_fit, task), check_first=False
        )
    return JobOutcome(recorder, RETRIED if earlier.status == Recorder.STATUS_FA else RESUMED)


def _reuse_training(
    task: dict[str, Any], trained_id: str, *names: str | None, run: Mapping[str, str] | None = None
) -> Recorder | None:
    """Compute the task's records from another run's training; None if that cannot be used."""
    started_runs: list[Recorder] = []
    try:
        with collect_started_runs(started_runs):
            return reuse_trained_run(task, R.get_recorder(recorder_id=trained_id), *names, run=run)
    except (NotInStoreError, LoadObjectError, TrustError) as error:
        if started_runs:  # the trained model was loaded, so the error comes from a record
            raise
        log.warning("cannot reuse the training of run %s: %s", trained_id, error)
        return None
    finally:
        for recorder in started_runs:
            announce_run(recorder)


def has_finished_jobs(experiment_name: str | None = None) -> bool:
    """Whether any job of the experiment is finished or failed; a single query to the store."""
    from qtorch.tracking.mlflow_store import open_store

    experiment = R.get_exp(experiment_name=experiment_name)
    rows = (
        open_store(R.get_uri()).runs(
            [experiment.id],
            filter_string=f"attributes.status = '{status}' and tags.`{TASK_TAG}` != ''",
            max_results=1,
        )
        for status in (Recorder.STATUS_FI, Recorder.STATUS_FA)
    )
    return any(rows)


def find_finished_job(
    task: Mapping[str, Any], member: SweepMember, experiment_name: str | None = None
) -> JobOutcome | None:
    """The outcome of a job for which `run_sweep_job` would have nothing to do.

    That is a finished run, or a failed one without `retry`. None if there is work to do.
    """
    complete, tags = identify_task(task)
    experiment = R.get_exp(experiment_name=experiment_name)
    runs = _EarlierRuns(experiment.id, complete, tags, member)
    earlier = runs.find()
    if earlier is not None and earlier.status == Recorder.STATUS_FI:
        return runs.skip(earlier)
    if earlier is not None and earlier.status == Recorder.STATUS_FA and not member.retry:
        return _adopt_earlier_run(earlier, member, FAILED_BEFORE)
    return None


# -- earlier runs ----------------------------------------------------------------------------------


@dataclass
class _EarlierRuns:
    """The runs of an experiment that a job may use instead of training.

    `task` is complete, `tags` identify it.
    """

    experiment_id: str
    task: dict[str, Any]
    tags: Mapping[str, str]
    member: SweepMember
    _reported_ids: set[str] = field(default_factory=set)

    @cached_property
    def inputs(self) -> RunInputs:
        """The data and code of the task as they are now; computed if there is an earlier run."""
        return collect_task_inputs(self.task)

    def find(self) -> RunRow | None:
        """The earlier run of the same task to use; its data and code are the same as now.

        A finished run comes before an interrupted one, which comes before a failed one; of several
        the newest is used. Unfinished runs only count if they belong to a sweep.
        """
        rows = self._rows_with_tag(TASK_TAG)
        for statuses in ((Recorder.STATUS_FI,), INTERRUPTED, (Recorder.STATUS_FA,)):
            for row in rows:
                is_in_sweep = any(key.startswith(JOB_TAG) for key in row.tags)
                is_finished = row.status == Recorder.STATUS_FI
                if row.status in statuses and (is_in_sweep or is_finished) and self._fits(row):
                    return row
        return None

    def find_trained_runs(self) -> list[RunRow]:
        """The runs with the same training on the same data and code, finished ones first.

        Runs that failed or were stopped after their training (in a record, say) are included; runs
        that may still be alive are not.
        """
        rows = self._rows_with_tag(FIT_KEY_TAG)
        rows = [r for r in rows if r.status in ENDED and FIT_TAG in r.tags]
        if not rows:
            return []
        task_fit_id = _compute_fit_id(self.task, self.inputs)
        rows = [r for r in rows if r.tags[FIT_TAG] == task_fit_id]
        return sorted(rows, key=lambda r: r.status != Recorder.STATUS_FI)

    def skip(self, row: RunRow) -> JobOutcome:
        """Use a finished run as it is."""
        log.info("using the finished run %s (%s)", row.id, self.inputs.describe())
        return _adopt_earlier_run(row, self.member, SKIPPED, self.inputs.describe())

    def _rows_with_tag(self, tag: str) -> list[RunRow]:
        """The runs with the same tag, the newest first; without `reuse` the sweep's only."""
        from qtorch.tracking.mlflow_store import open_store

        condition = f"tags.`{tag}` = '{self.tags[tag]}'"
        rows = open_store(R.get_uri()).runs([self.experiment_id], filter_string=condition)
        if self.member.reuse:
            return rows
        return [r for r in rows if JOB_TAG + self.member.sweep_id in r.tags]

    def _fits(self, row: RunRow) -> bool:
        """Whether a run has the data and the code of now; the reason why not is logged once.

        A finished run must be known to have them. One that is continued must not be known to have
        had others.
        """
        if row.status != Recorder.STATUS_FI and DATA_TAG not in row.tags and not row.metrics:
            return True  # it was interrupted, or failed, before its training
        try:
            is_finished = row.status == Recorder.STATUS_FI
            compare = self.inputs.find_differences if is_finished else self.inputs.find_changes
            differences = compare(row.tags)
        except QtorchError as error:
            differences = [f"the dataset cannot be built: {error}"]
        if differences and row.id not in self._reported_ids:
            self._reported_ids.add(row.id)
            reasons = "; ".join(differences)
            log.warning("not using run %s (%s) of the same task: %s", row.id, row.status, reasons)
        return not differences


def _adopt_earlier_run(
    row: RunRow, member: SweepMember, action: str, reason: str = ""
) -> JobOutcome:
    """Tag an earlier run as a job of this sweep."""
    recorder: Recorder = R.get_recorder(recorder_id=row.id)
    if member.tags.items() - row.tags.items():
        recorder.set_tags(**member.tags)
    announce_run(recorder)
    return JobOutcome(recorder, action, reason)


# -- tags of a run ---------------------------------------------------------------------------------


def tag_fit(task: Mapping[str, Any], recorder: Recorder, inputs: RunInputs) -> None:
    """Tag a run with the ID of its training, by which other tasks find and reuse the training.

    `task` is complete, see `identify_task`.
    """
    task_fit_id = _compute_fit_id(task, inputs)
    if task_fit_id is not None:
        recorder.set_tags(**{FIT_TAG: task_fit_id})


def _compute_fit_id(task: Mapping[str, Any], inputs: RunInputs) -> str | None:
    """The ID of a training; None if its data or code is unknown."""
    return None if inputs.identity is None else fit_id(task, inputs.identity)


def _without_seed(task: Mapping[str, Any]) -> dict[str, Any]:
    seedless = {k: v for k, v in task.items() if k != "seed"}
    model = task["model"]
    if isinstance(model, Mapping):
        model = {k: v for k, v in model.items() if k != "seed"}
        if isinstance(model.get("kwargs"), Mapping):
            model["kwargs"] = {k: v for k, v in model["kwargs"].items() if k != "seed"}
        seedless["model"] = model
    return seedless


def add_work_seconds(recorder: Recorder, seconds: float) -> None:
    """Add to the working time of a job's run, which is summed over all attempts."""
    previous = float(recorder.list_tags().get(SECONDS_TAG, "0"))
    recorder.set_tags(**{SECONDS_TAG: f"{previous + seconds:.2f}"})
