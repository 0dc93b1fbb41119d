"""A sweep is a thing: a run that knows its command, with the jobs' runs as its children."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from qtorch.core.errors import ConfigError, QtorchError, unknown_name
from qtorch.core.files import cache_folder, whole_file
from qtorch.study.claim import claims_folder, is_held
from qtorch.tracking.errors import NotInStoreError
from qtorch.tracking.experiment import MLflowExperiment
from qtorch.tracking.lineage import PARENT_TAG, born_with
from qtorch.tracking.locations import file_lock, redacted
from qtorch.tracking.mlflow_recorder import MLflowRecorder
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder
from qtorch.tracking.rows import RunRow
from qtorch.trainer.failure import ERROR_TAG

log = logging.getLogger(__name__)

SWEEP_TAG = "qtorch.sweep"  # the sweep's name, on its own run
COMMAND_TAG, COUNT_TAG = "qtorch.sweep.overrides", "qtorch.sweep.count"
TASK_TAG, SETTING_TAG = "qtorch.task_id", "qtorch.setting"  # a setting is a task without its seed
JOB_TAG = "qtorch.job."  # + the sweep's id: a job's number and overrides, as JSON
SECONDS_TAG = "qtorch.seconds"  # of work, over all attempts
PLAN, PLAN_FORMAT = "sweep", 1
REGISTER = "sweeps"


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep, as the store has it. `seconds` are those of work."""

    number: int
    overrides: list[str]
    status: str
    run_id: str | None
    metrics: Mapping[str, float]
    seconds: float
    setting: str = ""
    error: str | None = None
    note: str | None = None


def begin_sweep(
    name: str,
    experiment_name: str | None,
    command: Sequence[str],
    *,
    told: Sequence[str],
    count: int | None = None,
    **about: Any,
) -> MLflowRecorder:
    """The started run of the sweep of that name: a new one, or the one that there is.

    `command` is what `resume` repeats, `told` the words of it that say what is run (commands that
    differ in others are one), `about` what is needed beside (JSON). A sweep that was begun by
    several commands keeps them all. Processes that begin one sweep at once get one run.
    """
    uri = R.get_uri()
    experiment: MLflowExperiment = R.get_exp(experiment_name=experiment_name)
    lock = sha256(f"{experiment.id} {name}".encode()).hexdigest()[:16]
    with file_lock(claims_folder(uri) / f".sweep-{lock}.lock"):
        found = _runs(f"tags.`{SWEEP_TAG}` = '{name}'", [experiment.id])
        if found:
            recorder = experiment.start(recorder_id=found[0].id, resume=True)
        else:
            with born_with({SWEEP_TAG: name}):
                recorder = experiment.create_recorder(f"sweep {name}").start_run()
            recorder = _first_of_several(experiment, name, recorder)
        own = {"words": list(command), "told": list(told)}
        _keep_plan(recorder, own, {**about, "experiment": experiment.name})
    recorder.set_tags(**{COMMAND_TAG: " ".join(told)})
    if count is not None:
        recorder.set_tags(**{COUNT_TAG: count})
    _register(name, recorder)
    return recorder


def _first_of_several(
    experiment: MLflowExperiment, name: str, mine: MLflowRecorder
) -> MLflowRecorder:
    """Where machines share no lock, all take the run that was first, and drop their own."""
    first = _runs(f"tags.`{SWEEP_TAG}` = '{name}'", [experiment.id])[0]
    if first.id == mine.id:
        return mine
    mine.end_run(Recorder.STATUS_K)
    experiment.delete_recorder(recorder_id=mine.id)
    return experiment.start(recorder_id=first.id, resume=True)


def _keep_plan(recorder: MLflowRecorder, command: Any, about: dict[str, Any]) -> None:
    """The newest of commands that run the same, beside the others."""
    before: list[Any] = []
    if PLAN in recorder.list_artifacts():
        before = list(recorder.load_object(PLAN)["commands"])
    if command not in before:
        others = [c for c in before if c["told"] != command["told"]]
        plan = {"format": PLAN_FORMAT, "tracking_uri": redacted(recorder.uri), **about}
        saved: dict[str, Any] = {PLAN: {**plan, "commands": [*others, command]}}
        recorder.save_objects(**saved)


def end_sweep(recorder: MLflowRecorder, *, interrupted: bool = False, sent: bool = False) -> None:
    """FINISHED where all jobs are, FAILED where one failed, KILLED where it was interrupted.

    A sweep that another process still works on goes on RUNNING; one whose jobs were `sent` to a
    pool and wait there is SCHEDULED.
    """
    jobs = sweep_jobs(str(recorder.id))
    statuses = {job.status for job in jobs}
    final = Recorder.STATUS_FI
    if interrupted or statuses & {Recorder.STATUS_K, Recorder.STATUS_S}:
        final = Recorder.STATUS_K
    elif Recorder.STATUS_FA in statuses:
        final = Recorder.STATUS_FA
    expected = recorder.list_tags().get(COUNT_TAG, "0")
    if final == Recorder.STATUS_FI and sent:
        final = Recorder.STATUS_S
    elif final == Recorder.STATUS_FI and len(jobs) < int(expected):
        final = Recorder.STATUS_FA  # some failed before they had a run
    recorder.end_run(final)
    if Recorder.STATUS_R in statuses and not interrupted:
        from qtorch.tracking.mlflow_store import store_at

        store_at(recorder.uri).set_status(str(recorder.id), Recorder.STATUS_R)


# -- what there is ---------------------------------------------------------------------------------


def sweep_jobs(sweep_id: str) -> list[SweepJob]:
    """The jobs of a sweep that have a run, by number; the newest run of each."""
    key = JOB_TAG + sweep_id
    jobs: dict[str, SweepJob] = {}
    for row in _runs(f"tags.`{key}` != ''"):
        told = json.loads(row.tags[key])
        jobs[row.tags.get(TASK_TAG, row.id)] = _job(row, told)
    return sorted(jobs.values(), key=lambda j: (j.number, j.run_id))


def _job(row: RunRow, told: Mapping[str, Any]) -> SweepJob:
    status, note = row.status, None
    if status == Recorder.STATUS_R and not is_held(claim_path(row.experiment_id, row.tags)):
        status, note = Recorder.STATUS_K, "its process is gone"
    seconds = float(row.tags.get(SECONDS_TAG, "nan"))
    if seconds != seconds and row.start_time and row.end_time:
        seconds = (row.end_time - row.start_time) / 1000
    return SweepJob(
        number=int(told["number"]),
        overrides=list(told["overrides"]),
        status=status,
        run_id=row.id,
        metrics=row.metrics,
        seconds=seconds,
        setting=row.tags.get(SETTING_TAG, row.id),
        error=row.tags.get(ERROR_TAG) if status == Recorder.STATUS_FA else None,
        note=note,
    )


def adopt(run_id: str, sweep_id: str, number: int, overrides: Sequence[str]) -> None:
    """Make a run that others have begun (the workers of a pool) a job of the sweep."""
    recorder: Recorder = R.get_recorder(recorder_id=run_id)
    told = {"number": number, "overrides": list(overrides)}
    tags = {JOB_TAG + sweep_id: json.dumps(told)}
    if PARENT_TAG not in recorder.list_tags():
        tags[PARENT_TAG] = sweep_id
    recorder.set_tags(**tags)


def claim_path(experiment_id: str, tags: Mapping[str, str]) -> Any:
    """The claim on the task that a run's tags name."""
    task = tags.get(TASK_TAG, "none")
    return claims_folder(R.get_uri()) / f"{experiment_id}-{task}.json"


def list_sweeps() -> list[RunRow]:
    """The runs of all sweeps of the store, the newest first."""
    return _runs(f"tags.`{SWEEP_TAG}` != ''")[::-1]


def count_of(sweep: RunRow) -> int | None:
    """How many jobs a sweep's last command has, where that is known."""
    told = sweep.tags.get(COUNT_TAG)
    return None if told is None else int(told)


def find_sweep(named: str) -> RunRow:
    """The sweep of a name or of a run's id; ConfigError with the nearest name otherwise."""
    found = list_sweeps()
    mine = [s for s in found if named in (s.id, s.tags[SWEEP_TAG])]
    if not mine:
        raise ConfigError(
            f"{unknown_name('sweep', named, {s.tags[SWEEP_TAG] for s in found})} "
            f"Looked for in {redacted(R.get_uri())} (tracking.uri=... names another store)."
        )
    if len(mine) > 1:
        ids = ", ".join(s.id for s in mine)
        raise ConfigError(f"{len(mine)} experiments have a sweep {named!r}; give its run: {ids}.")
    return mine[0]


def plan_of(sweep_id: str) -> dict[str, Any]:
    """What `resume` needs: the commands of a sweep, folder and all; ConfigError if unreadable."""
    plan: dict[str, Any] = R.get_recorder(recorder_id=sweep_id).load_object(PLAN)
    if plan.get("format") != PLAN_FORMAT:
        raise ConfigError(
            f"the sweep {sweep_id} was written in format {plan.get('format')}, this version of "
            f"qtorch reads {PLAN_FORMAT}: resume it with the version that began it."
        )
    return plan


def _runs(condition: str, experiment_ids: Sequence[str] | None = None) -> list[RunRow]:
    """The runs that meet a condition, the oldest first."""
    from qtorch.tracking.mlflow_store import store_at

    store = store_at(R.get_uri())
    ids = experiment_ids or [e.id for e in store.experiments()]
    found = store.runs(ids, filter_string=condition)
    return sorted(found, key=lambda r: (r.start_time or 0, r.id))


# -- sweeps of other folders -----------------------------------------------------------------------


def _register(name: str, recorder: MLflowRecorder) -> None:
    """Note in the user's cache which store a sweep is in, for commands in other folders."""
    if redacted(recorder.uri) != recorder.uri:
        return  # passwords stay where they are
    note = {"name": name, "id": recorder.id, "tracking_uri": recorder.uri}
    try:
        with whole_file(cache_folder() / REGISTER / f"{recorder.id}.json") as path:
            path.write_text(json.dumps(note))
    except OSError as error:
        log.debug("the sweep is not registered: %s", error)


def registered_uri(named: str) -> str | None:
    """The tracking URI of a sweep that this user began somewhere; None unless there is one."""
    uris = set()
    for path in (cache_folder() / REGISTER).glob("*.json"):
        try:
            note = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if named in (note["name"], note["id"]) and _is_there(note):
            uris.add(note["tracking_uri"])
    return uris.pop() if len(uris) == 1 else None


def _is_there(note: Mapping[str, Any]) -> bool:
    uri = str(note["tracking_uri"])
    if uri.startswith("sqlite:///") and not os.path.exists(uri.removeprefix("sqlite:///")):
        return False
    try:
        with R.uri_context(uri):
            return not R.get_recorder(recorder_id=note["id"]).deleted
    except NotInStoreError:
        return False
    except QtorchError as error:
        log.debug("%s: %s", uri, error)
        return False
