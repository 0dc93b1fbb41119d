"""One job of a sweep: what of it is done already is not done again."""

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
from qtorch.core.instantiate import init_instance_by_config, plain
from qtorch.core.session import session
from qtorch.study.claim import claimed
from qtorch.study.sweep import JOB_TAG, SECONDS_TAG, SETTING_TAG, TASK_TAG, claim_path
from qtorch.tracking.errors import NotInStoreError
from qtorch.tracking.lineage import PARENT_TAG, born_with
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder
from qtorch.tracking.rows import RunRow
from qtorch.trainer.failure import error_of, note_started, started_runs
from qtorch.trainer.prepare import complete_task
from qtorch.trainer.run import record_train, task_train

log = logging.getLogger(__name__)

FIT_KEY_TAG = "qtorch.fit_key"  # a training but for its data: known without reading them
FIT_TAG = "qtorch.fit_id"
FIT_FROM_TAG = "qtorch.fit_from"  # the run whose training this one's records were made of
LOOK_SECONDS = 0.5  # between two looks at a job that another process has claimed
ENDED = (Recorder.STATUS_FI, Recorder.STATUS_FA, Recorder.STATUS_K)
INTERRUPTED = (Recorder.STATUS_R, Recorder.STATUS_K, Recorder.STATUS_S)

TRAINED, SKIPPED, RESUMED, RETRIED = "trained", "skipped", "resumed", "retried"
RECORDED, ELSEWHERE, REFUSED = "records only", "elsewhere", "failed before"


@dataclass(frozen=True)
class Membership:
    """A job's place in a sweep: the sweep's run, the job's number and overrides.

    `retry`: what failed is tried again. `reuse`: runs of the experiment that are no part of the
    sweep count too, if they are finished or their training is what is wanted.
    """

    sweep_id: str
    number: int
    overrides: tuple[str, ...]
    retry: bool = False
    reuse: bool = True

    @property
    def tags(self) -> dict[str, str]:
        """What a run of this job is tagged with."""
        told = {"number": self.number, "overrides": list(self.overrides)}
        return {JOB_TAG + self.sweep_id: json.dumps(told)}


@dataclass(frozen=True)
class JobOutcome:
    """The run of a job, and how it came about: one of the words above."""

    recorder: Recorder
    how: str

    @property
    def error(self) -> str | None:
        """Why the job is not finished."""
        if self.how == REFUSED:
            return f"{error_of(self.recorder)} (failed before; sweep.retry=true tries it again)"
        if self.how == ELSEWHERE:
            return "another process works on it."
        return None


def identified(task: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The task, complete, and the tags that tell it: of the whole, without seed, of its training.

    A task without a seed gets one that depends on its definition, so that it has an identity.
    """
    given = plain(task)
    if given.get("seed") is None and session().seed is None:
        given = {**given, "seed": int(digest(given)[:8], 16) % 2**31}
    complete = complete_task(given)
    tags = {
        TASK_TAG: task_id(complete),
        SETTING_TAG: digest(_without_seed(complete)),
        FIT_KEY_TAG: fit_id(complete, ""),
    }
    return complete, tags


def run_sweep_job(
    task: Mapping[str, Any],
    place: Membership,
    experiment_name: str | None = None,
    recorder_name: str | None = None,
) -> JobOutcome:
    """See a job done: its run, in which nothing is repeated that an earlier one has done.

    A finished run of the same task is taken as it is; an interrupted one goes on from its
    checkpoint; a failed one stays so, unless `retry`. Where only the records differ the training
    of the other run is used. A job that another living process works on is left to it.
    """
    complete, tags = identified(task)
    experiment = R.get_exp(experiment_name=experiment_name)
    finished = _finished(experiment.id, tags, place)
    if finished is not None:
        return _adopted(finished, place, SKIPPED)
    waits = False
    while True:
        with claimed(claim_path(experiment.id, tags)) as mine:
            earlier = _earlier(experiment.id, tags, place)
            if earlier is not None and earlier.status == Recorder.STATUS_FI:
                return _adopted(earlier, place, SKIPPED)
            if mine:
                return _done(complete, tags, place, earlier, experiment_name, recorder_name)
        if earlier is not None:
            return _adopted(earlier, place, ELSEWHERE)
        if not waits:
            log.info("another process is about to begin this job: waiting for its run, or its end")
            waits = True
        time.sleep(LOOK_SECONDS)


def _done(
    task: dict[str, Any],
    tags: Mapping[str, str],
    place: Membership,
    earlier: RunRow | None,
    experiment_name: str | None,
    recorder_name: str | None,
) -> JobOutcome:
    """A job whose claim is held: what is left of it, done."""
    if earlier is not None and earlier.status == Recorder.STATUS_FA and not place.retry:
        return _adopted(earlier, place, REFUSED)
    born = {**tags, **place.tags, PARENT_TAG: place.sweep_id}
    with born_with(born):
        if earlier is not None:
            return _again(task, place, earlier)
        experiment = R.get_exp(experiment_name=experiment_name)
        fitted = _fitted(experiment.id, task, tags, place)
        return _anew(task, fitted, experiment_name, recorder_name)


def has_settled_jobs(experiment_name: str | None = None) -> bool:
    """Whether any run of the experiment is finished or failed: one question to the store."""
    from qtorch.tracking.mlflow_store import store_at

    experiment = R.get_exp(experiment_name=experiment_name)
    rows = (
        store_at(R.get_uri()).runs(
            [experiment.id],
            filter_string=f"attributes.status = '{status}' and tags.`{TASK_TAG}` != ''",
            max_results=1,
        )
        for status in (Recorder.STATUS_FI, Recorder.STATUS_FA)
    )
    return any(rows)


def settled_sweep_job(
    task: Mapping[str, Any], place: Membership, experiment_name: str | None = None
) -> JobOutcome | None:
    """The run of a job in which `run_sweep_job` would do nothing: a finished one, or one that
    failed and is not to be tried again. None where there is something to do."""
    _, tags = identified(task)
    earlier = _earlier(R.get_exp(experiment_name=experiment_name).id, tags, place)
    if earlier is not None and earlier.status == Recorder.STATUS_FI:
        return _adopted(earlier, place, SKIPPED)
    if earlier is not None and earlier.status == Recorder.STATUS_FA and not place.retry:
        return _adopted(earlier, place, REFUSED)
    return None


def _anew(task: dict[str, Any], fitted: list[RunRow], *names: str | None) -> JobOutcome:
    for row in fitted:
        with born_with({FIT_FROM_TAG: row.id, FIT_TAG: row.tags[FIT_TAG]}):
            recorder = _recorded(task, row.id, *names)
        if recorder is not None:
            return JobOutcome(recorder, RECORDED)
    return JobOutcome(task_train(task, *names, on_fitted=partial(_tag_fit, task)), TRAINED)


def _again(task: dict[str, Any], place: Membership, earlier: RunRow) -> JobOutcome:
    """In the run that there is, from its checkpoint."""
    _adopted(earlier, place, RESUMED)
    attempt = {"experiment_id": earlier.experiment_id, "recorder_id": earlier.id}
    recorder = None
    if FIT_FROM_TAG in earlier.tags:  # only the records were to be made
        recorder = _recorded(task, earlier.tags[FIT_FROM_TAG], run=attempt)
    if recorder is None:
        if FIT_TAG in earlier.tags:  # true again when this attempt has saved its own
            R.get_recorder(recorder_id=earlier.id).delete_tags(FIT_TAG)
        recorder = task_train(task, run=attempt, on_fitted=partial(_tag_fit, task))
    return JobOutcome(recorder, RETRIED if earlier.status == Recorder.STATUS_FA else RESUMED)


def _recorded(
    task: dict[str, Any], fitted_id: str, *names: str | None, run: Mapping[str, str] | None = None
) -> Recorder | None:
    """The run with the records of what another one has trained; None if that cannot be used."""
    begun: list[Recorder] = []
    try:
        with started_runs(begun):
            return record_train(task, R.get_recorder(recorder_id=fitted_id), *names, run=run)
    except (NotInStoreError, LoadObjectError, TrustError) as error:
        if begun:  # a record's own error
            raise
        log.warning("run %s has trained this, but cannot be used: %s", fitted_id, error)
        return None
    finally:
        for recorder in begun:
            note_started(recorder)


# -- earlier runs ----------------------------------------------------------------------------------


def _finished(experiment_id: str, tags: Mapping[str, str], place: Membership) -> RunRow | None:
    found = _earlier(experiment_id, tags, place)
    return found if found is not None and found.status == Recorder.STATUS_FI else None


def _earlier(experiment_id: str, tags: Mapping[str, str], place: Membership) -> RunRow | None:
    """The run of the same task that counts: a finished one before an interrupted one before a
    failed one, the newest of each."""
    rows = _counting(_rows(experiment_id, TASK_TAG, tags[TASK_TAG]), place)
    for statuses in ((Recorder.STATUS_FI,), INTERRUPTED, (Recorder.STATUS_FA,)):
        for row in rows:
            of_a_sweep = any(key.startswith(JOB_TAG) for key in row.tags)
            if row.status in statuses and (of_a_sweep or row.status == Recorder.STATUS_FI):
                return row
    return None


def _rows(experiment_id: str, tag: str, value: str) -> list[RunRow]:
    """Runs with a tag, the newest first."""
    from qtorch.tracking.mlflow_store import store_at

    condition = f"tags.`{tag}` = '{value}'"
    return store_at(R.get_uri()).runs([experiment_id], filter_string=condition)


def _counting(rows: list[RunRow], place: Membership) -> list[RunRow]:
    """Without `reuse` those of the sweep alone."""
    return rows if place.reuse else [r for r in rows if JOB_TAG + place.sweep_id in r.tags]


def _adopted(row: RunRow, place: Membership, how: str) -> JobOutcome:
    """An earlier run as this sweep's job."""
    recorder: Recorder = R.get_recorder(recorder_id=row.id)
    if place.tags.items() - row.tags.items():
        recorder.set_tags(**place.tags)
    note_started(recorder)
    return JobOutcome(recorder, how)


def _fitted(
    experiment_id: str, task: Mapping[str, Any], tags: Mapping[str, str], place: Membership
) -> list[RunRow]:
    """The runs that have trained just this, on the same data, finished ones first.

    One that failed or was stopped after its training (in a record, say) has trained too; one that
    may be alive is left alone.
    """
    rows = _counting(_rows(experiment_id, FIT_KEY_TAG, tags[FIT_KEY_TAG]), place)
    rows = [r for r in rows if r.status in ENDED and FIT_TAG in r.tags]
    if not rows:
        return []
    wanted = _fit_id(task, init_instance_by_config(task["dataset"]))
    rows = [r for r in rows if r.tags[FIT_TAG] == wanted]
    return sorted(rows, key=lambda r: r.status != Recorder.STATUS_FI)


# -- what a run is told ----------------------------------------------------------------------------


def _tag_fit(task: Mapping[str, Any], recorder: Recorder, dataset: Any) -> None:
    own = _fit_id(task, dataset)
    if own is not None:
        recorder.set_tags(**{FIT_TAG: own})


def _fit_id(task: Mapping[str, Any], dataset: Any) -> str | None:
    """None where the dataset is a class of the user's own that cannot tell its data."""
    fingerprint = getattr(dataset, "fingerprint", None)
    return fit_id(task, fingerprint()) if callable(fingerprint) else None


def _without_seed(task: Mapping[str, Any]) -> dict[str, Any]:
    bare = {k: v for k, v in task.items() if k != "seed"}
    model = task["model"]
    if isinstance(model, Mapping):
        model = {k: v for k, v in model.items() if k != "seed"}
        if isinstance(model.get("kwargs"), Mapping):
            model["kwargs"] = {k: v for k, v in model["kwargs"].items() if k != "seed"}
        bare["model"] = model
    return bare


def note_seconds(recorder: Recorder, seconds: float) -> None:
    """Add seconds of work to what a job's run says of its attempts."""
    before = float(recorder.list_tags().get(SECONDS_TAG, "0"))
    recorder.set_tags(**{SECONDS_TAG: f"{before + seconds:.2f}"})
