"""Run one job of a sweep, reusing the work that earlier runs of the same task have completed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from qtorch.core.errors import LoadObjectError, TrustError
from qtorch.core.identity import digest, fit_id, task_id
from qtorch.core.instantiate import init_instance_by_config, resolve_config
from qtorch.core.session import session
from qtorch.process.lease import hold_claim
from qtorch.study.sweep import JOB_TAG, SECONDS_TAG, SETTING_TAG, TASK_TAG, claim_path
from qtorch.tracking.claims import is_run_held
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import PARENT_TAG, Recorder, with_run_tags
from qtorch.tracking.store_types import NotInStoreError, RunRow
from qtorch.trainer.failure import announce_run, collect_started_runs, get_error
from qtorch.trainer.run import complete_task, reuse_trained_run, task_train

log = logging.getLogger(__name__)

FIT_KEY_TAG = "qtorch.fit_key"  # identifies a training except for its data, without reading them
FIT_TAG = "qtorch.fit_id"  # identifies a training including its data
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
    A job that another live process works on is left to that process.
    """
    complete, tags = identify_task(task)
    experiment = R.get_exp(experiment_name=experiment_name)
    # A finished run needs no claim: taking over that of a dead process of another machine lasts a
    # minute.
    earlier = _find_earlier_run(experiment.id, tags, member)
    if earlier is not None and earlier.status == Recorder.STATUS_FI:
        return _adopt_earlier_run(earlier, member, SKIPPED)
    is_waiting = False
    while True:
        with hold_claim(claim_path(experiment.id, tags)) as has_claim:
            earlier = _find_earlier_run(experiment.id, tags, member)
            if earlier is not None and earlier.status == Recorder.STATUS_FI:
                return _adopt_earlier_run(earlier, member, SKIPPED)
            if has_claim:
                names = (experiment_name, recorder_name)
                return _run_with_claim(complete, tags, member, earlier, experiment.id, *names)
        if earlier is not None:
            return _adopt_earlier_run(earlier, member, ELSEWHERE)
        if not is_waiting:
            log.info("another process has claimed this job: waiting until it starts a run or ends")
            is_waiting = True
        time.sleep(POLL_SECONDS)


def _run_with_claim(
    task: dict[str, Any],
    tags: Mapping[str, str],
    member: SweepMember,
    earlier: RunRow | None,
    experiment_id: str,
    *names: str | None,
) -> JobOutcome:
    """Do the remaining work of a job whose claim this process holds.

    A new run uses the training of an earlier one if possible. `names` are those of the experiment
    and of the run.
    """
    if earlier is not None and is_run_held(earlier.id, R.get_uri()):  # somebody has resumed it
        return _adopt_earlier_run(earlier, member, ELSEWHERE)
    if earlier is not None and earlier.status == Recorder.STATUS_FA and not member.retry:
        return _adopt_earlier_run(earlier, member, FAILED_BEFORE)
    with with_run_tags({**tags, **member.tags, PARENT_TAG: member.sweep_id}):
        if earlier is not None:
            return _resume_run(task, member, earlier)
        for row in _find_trained_runs(experiment_id, task, tags, member):
            with with_run_tags({FIT_FROM_TAG: row.id, FIT_TAG: row.tags[FIT_TAG]}):
                recorder = _reuse_training(task, row.id, *names)
            if recorder is not None:
                return JobOutcome(recorder, RECORDS_ONLY)
        return JobOutcome(task_train(task, *names, on_fitted=partial(_tag_fit, task)), TRAINED)


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
        recorder = task_train(task, run=attempt, on_fitted=partial(_tag_fit, task))
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
    _, tags = identify_task(task)
    earlier = _find_earlier_run(R.get_exp(experiment_name=experiment_name).id, tags, member)
    if earlier is not None and earlier.status == Recorder.STATUS_FI:
        return _adopt_earlier_run(earlier, member, SKIPPED)
    if earlier is not None and earlier.status == Recorder.STATUS_FA and not member.retry:
        return _adopt_earlier_run(earlier, member, FAILED_BEFORE)
    return None


# -- earlier runs ----------------------------------------------------------------------------------


def _find_earlier_run(
    experiment_id: str, tags: Mapping[str, str], member: SweepMember
) -> RunRow | None:
    """The earlier run of the same task to use.

    A finished run comes before an interrupted one, which comes before a failed one; of several
    the newest is used. Unfinished runs only count if they belong to a sweep.
    """
    rows = _runs_with_tag(experiment_id, TASK_TAG, tags, member)
    for statuses in ((Recorder.STATUS_FI,), INTERRUPTED, (Recorder.STATUS_FA,)):
        for row in rows:
            is_in_sweep = any(key.startswith(JOB_TAG) for key in row.tags)
            if row.status in statuses and (is_in_sweep or row.status == Recorder.STATUS_FI):
                return row
    return None


def _runs_with_tag(
    experiment_id: str, tag: str, tags: Mapping[str, str], member: SweepMember
) -> list[RunRow]:
    """The runs with the same value of a tag, the newest first; without `reuse` the sweep's only."""
    from qtorch.tracking.mlflow_store import open_store

    condition = f"tags.`{tag}` = '{tags[tag]}'"
    rows = open_store(R.get_uri()).runs([experiment_id], filter_string=condition)
    return rows if member.reuse else [r for r in rows if JOB_TAG + member.sweep_id in r.tags]


def _adopt_earlier_run(row: RunRow, member: SweepMember, action: str) -> JobOutcome:
    """Tag an earlier run as a job of this sweep."""
    recorder: Recorder = R.get_recorder(recorder_id=row.id)
    if member.tags.items() - row.tags.items():
        recorder.set_tags(**member.tags)
    announce_run(recorder)
    return JobOutcome(recorder, action)


def _find_trained_runs(
    experiment_id: str, task: Mapping[str, Any], tags: Mapping[str, str], member: SweepMember
) -> list[RunRow]:
    """The runs with the same training on the same data, finished ones first.

    Runs that failed or were stopped after their training (in a record, say) are included; runs
    that may still be alive are not.
    """
    rows = _runs_with_tag(experiment_id, FIT_KEY_TAG, tags, member)
    rows = [r for r in rows if r.status in ENDED and FIT_TAG in r.tags]
    if not rows:
        return []
    task_fit_id = _compute_fit_id(task, init_instance_by_config(task["dataset"]))
    rows = [r for r in rows if r.tags[FIT_TAG] == task_fit_id]
    return sorted(rows, key=lambda r: r.status != Recorder.STATUS_FI)


# -- tags of a run ---------------------------------------------------------------------------------


def _tag_fit(task: Mapping[str, Any], recorder: Recorder, dataset: Any) -> None:
    task_fit_id = _compute_fit_id(task, dataset)
    if task_fit_id is not None:
        recorder.set_tags(**{FIT_TAG: task_fit_id})


def _compute_fit_id(task: Mapping[str, Any], dataset: Any) -> str | None:
    """The ID of a training; None if the dataset is a user's class without a fingerprint."""
    fingerprint = getattr(dataset, "fingerprint", None)
    return fit_id(task, fingerprint()) if callable(fingerprint) else None


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
