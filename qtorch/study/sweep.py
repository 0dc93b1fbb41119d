"""Store a sweep as a run that knows its command and has the runs of its jobs as children."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from statistics import fmean, stdev
from typing import Any

from qtorch.core.errors import ConfigError, QtorchError, unknown_name_message
from qtorch.core.files import atomic_write, cache_folder, file_lock
from qtorch.core.instantiate import flatten_dict
from qtorch.core.secrets import redact_urls
from qtorch.tracking.claims import PROCESS_GONE, is_run_held
from qtorch.tracking.experiment import Experiment
from qtorch.tracking.locations import claims_folder
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import PARENT_TAG, Recorder, with_run_tags
from qtorch.tracking.store_types import NotInStoreError, RunRow
from qtorch.trainer.failure import ERROR_TAG

log = logging.getLogger(__name__)

SWEEP_TAG = "qtorch.sweep"  # the sweep's name, on its own run
COMMAND_TAG, COUNT_TAG = "qtorch.sweep.overrides", "qtorch.sweep.count"
TASK_TAG, SETTING_TAG = "qtorch.task_id", "qtorch.setting"  # a setting is a task without its seed
JOB_TAG = "qtorch.job."  # + the sweep's run ID: a job's number, overrides, repeats, as JSON
SECONDS_TAG = "qtorch.seconds"  # working time, summed over all attempts
PLAN, PLAN_FORMAT = "sweep", 1
REGISTRY_FOLDER = "sweeps"  # in the user's cache
# The valid segment comes first: a test segment that was used for selection is no test any more.
DEFAULT_METRICS = ("valid.Rank IC", "test.Rank IC", "Rank IC", "valid/rank_ic")
MINIMIZED_METRICS = ("loss", "mse", "mae", "rmse")
MODES = ("max", "min")


@dataclass
class JobResult:
    """The result of one job: of a sweep, as stored in its run, or of a single training.

    `seconds` is working time. `setting` identifies the task without its seed. `note` says how the
    job got its run unless it was simply trained. `pool_task` is its task in a pool: id, pool, url,
    wait. `same_as`: the number of another job of the sweep that is the same task and has the run.
    `repeats`: number and overrides of the jobs that are the same task as this one. The field names
    are stored in job.json.
    """

    number: int
    overrides: list[str]
    status: str
    seconds: float = 0.0
    run_id: str | None = None
    experiment: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    pool_task: dict[str, Any] | None = None
    note: str | None = None
    setting: str = ""
    same_as: int | None = None
    repeats: list[dict[str, Any]] = field(default_factory=list)


def start_sweep(
    name: str,
    experiment_name: str | None,
    command: Sequence[str],
    *,
    overrides: Sequence[str],
    count: int | None = None,
    **settings: Any,
) -> Recorder:
    """Start the run of a sweep: the existing run of that name, or else a new one.

    `command` are the arguments that `resume` repeats. `overrides` are those of them that define
    the jobs; commands that only differ in other arguments count as the same command. `settings`
    are stored with the command (as JSON); if `data` among them is not that of an earlier command,
    a warning says so. A sweep that was started by several commands stores all
    of them. Processes that start the same sweep at the same time get the same run.
    """
    uri = R.get_uri()
    experiment = R.get_exp(experiment_name=experiment_name)
    lock = sha256(f"{experiment.id} {name}".encode()).hexdigest()[:16]
    with file_lock(claims_folder(uri) / f".sweep-{lock}.lock"):
        runs = _find_sweep_runs(experiment, name)
        if runs:
            recorder = experiment.start(recorder_id=runs[0].id, resume=True)
        else:
            with with_run_tags({SWEEP_TAG: name}):
                recorder = experiment.create_recorder(f"sweep {name}").start_run()
            recorder = _keep_oldest_run(experiment, name, recorder)
        # Keys of the stored format: `told` are the overrides that define the jobs.
        entry = {"words": list(command), "told": list(overrides)}
        _save_plan(recorder, entry, {**settings, "experiment": experiment.name})
    recorder.set_tags(**{COMMAND_TAG: " ".join(overrides)})
    if count is not None:
        recorder.set_tags(**{COUNT_TAG: count})
    _register_sweep(name, recorder)
    return recorder


def _keep_oldest_run(experiment: Experiment, name: str, new_run: Recorder) -> Recorder:
    """Use the oldest run of the sweep, and delete `new_run` if that is another one.

    File locks do not work between machines without a shared folder, so each of them may have
    created a run.
    """
    oldest = _find_sweep_runs(experiment, name)[0]
    if oldest.id == new_run.id:
        return new_run
    new_run.end_run(Recorder.STATUS_K)
    experiment.delete_recorder(recorder_id=new_run.id)
    return experiment.start(recorder_id=oldest.id, resume=True)


def _find_sweep_runs(experiment: Experiment, name: str) -> list[RunRow]:
    """The runs of the sweeps of that name, the oldest first."""
    # The name is compared here, because a filter string of MLflow cannot escape a quotation mark.
    sweeps = _find_runs(f"tags.`{SWEEP_TAG}` != ''", [experiment.id])
    return [run for run in sweeps if run.tags[SWEEP_TAG] == name]


def _save_plan(recorder: Recorder, command: Any, settings: dict[str, Any]) -> None:
    """Add a command to the sweep's plan, in place of an earlier one with the same overrides."""
    commands: list[Any] = []
    if PLAN in recorder.list_artifacts():
        earlier_plan = recorder.load_object(PLAN)
        commands = list(earlier_plan["commands"])
        if "workflows" in earlier_plan:  # each command may have its own
            workflows = {**earlier_plan["workflows"], **settings.get("workflows", {})}
            settings = {**settings, "workflows": workflows}
        _warn_of_other_data(recorder, earlier_plan.get("data"), settings.get("data"))
    if command not in commands:
        other_commands = [c for c in commands if c["told"] != command["told"]]
        plan = {"format": PLAN_FORMAT, "tracking_uri": redact_urls(recorder.uri), **settings}
        artifacts: dict[str, Any] = {PLAN: {**plan, "commands": [*other_commands, command]}}
        recorder.save_objects(**artifacts)


def _warn_of_other_data(
    recorder: Recorder, earlier: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> None:
    """Warn that a sweep is continued with other data than those of its last command."""
    if earlier is None or now is None or earlier == now:
        return
    before, after = flatten_dict(earlier), flatten_dict(now)
    names = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    if "_target_" in names:
        names = ["_target_"]  # another class has other settings
    changes = ", ".join(f"data.{n}: {before.get(n)} before, {after.get(n)} now" for n in names[:3])
    log.warning(
        "the %s has been started with other data (%s): its table and its best job will mix the "
        "jobs of both. For a separate sweep choose another sweep.name.",
        recorder.name,
        changes,
    )


def end_sweep(recorder: Recorder, *, is_interrupted: bool = False, is_queued: bool = False) -> None:
    """End the sweep's run as FINISHED, FAILED if a job failed, or KILLED if it was interrupted.

    A sweep with jobs that another process still works on stays RUNNING. A sweep whose jobs wait in
    a task pool (`is_queued`) becomes SCHEDULED.
    """
    jobs = sweep_jobs(str(recorder.id))
    statuses = {job.status for job in jobs}
    if is_interrupted or statuses & {Recorder.STATUS_K, Recorder.STATUS_S}:
        final = Recorder.STATUS_K
    elif Recorder.STATUS_FA in statuses:
        final = Recorder.STATUS_FA
    elif is_queued:
        final = Recorder.STATUS_S
    elif len(add_repeats(jobs)) < int(recorder.list_tags().get(COUNT_TAG, 0)):
        final = Recorder.STATUS_FA  # some jobs failed before their run was created
    else:
        final = Recorder.STATUS_FI
    recorder.end_run(final)
    if Recorder.STATUS_R in statuses and not is_interrupted:
        from qtorch.tracking.mlflow_store import open_store

        open_store(recorder.uri).set_status(str(recorder.id), Recorder.STATUS_R)


# -- reading sweeps --------------------------------------------------------------------------------


def sweep_jobs(sweep_id: str) -> list[JobResult]:
    """The jobs of a sweep that have a run, by number; for each job its newest run."""
    key = JOB_TAG + sweep_id
    jobs: dict[str, JobResult] = {}
    for row in _find_runs(f"tags.`{key}` != ''"):
        details = json.loads(row.tags[key])
        jobs[row.tags.get(TASK_TAG, row.id)] = _parse_job(row, details)
    return sorted(jobs.values(), key=lambda j: (j.number, j.run_id))


def add_repeats(jobs: Sequence[JobResult]) -> list[JobResult]:
    """Add the jobs that are the same task as one of `jobs`, with its result; by number."""
    repeats = [
        replace(job, **repeat, same_as=job.number, repeats=[])
        for job in jobs
        for repeat in job.repeats
    ]
    return sorted([*jobs, *repeats], key=lambda j: j.number)


def list_finished_runs(jobs: Sequence[JobResult]) -> list[Recorder]:
    """The runs of the jobs that have finished; jobs that repeat the same run count once."""
    ids = dict.fromkeys(j.run_id for j in jobs if j.status == Recorder.STATUS_FI and j.run_id)
    return [R.get_recorder(recorder_id=run) for run in ids]


def count_tried_jobs(recorders: Sequence[Recorder]) -> int:
    """Count the different jobs of all sweeps and searches that the runs belong to, and other runs.

    Jobs that were stopped early or failed count: they were tried.
    """
    tasks: set[str] = set()
    sweeps: set[str] = set()
    for recorder in recorders:
        tags = recorder.list_tags()
        sweeps |= {t.removeprefix(JOB_TAG) for t in tags if t.startswith(JOB_TAG)}
        tasks.add(tags.get(TASK_TAG, str(recorder.id)))
    for sweep_id in sweeps:
        rows = _find_runs(f"tags.`{JOB_TAG}{sweep_id}` != ''")
        tasks |= {row.tags.get(TASK_TAG, row.id) for row in rows}
    return len(tasks)


def overrides_in_sweep(recorders: Sequence[Recorder]) -> dict[str, list[str]]:
    """The overrides of runs as jobs of a sweep, by run ID; empty if no sweep has all the runs."""
    tags = {str(r.id): r.list_tags() for r in recorders}
    sweep_tags = [{t for t in names if t.startswith(JOB_TAG)} for names in tags.values()]
    shared_tags = set.intersection(*sweep_tags) if sweep_tags else set()
    if not shared_tags:
        return {}
    key = min(shared_tags)
    return {run: list(json.loads(values[key])["overrides"]) for run, values in tags.items()}


def _parse_job(row: RunRow, details: Mapping[str, Any]) -> JobResult:
    status, note = row.status, None
    if status == Recorder.STATUS_R and not is_run_held(row.id, R.get_uri()):
        status, note = Recorder.STATUS_K, PROCESS_GONE
    seconds = float(row.tags.get(SECONDS_TAG, "nan"))
    if math.isnan(seconds) and row.start_time and row.end_time:
        seconds = (row.end_time - row.start_time) / 1000
    return JobResult(
        number=int(details["number"]),
        overrides=list(details["overrides"]),
        status=status,
        run_id=row.id,
        metrics=row.metrics,
        seconds=seconds,
        setting=row.tags.get(SETTING_TAG, row.id),
        error=row.tags.get(ERROR_TAG) if status == Recorder.STATUS_FA else None,
        note=note,
        repeats=details.get("repeats", []),
    )


def adopt_run(run_id: str, sweep_id: str, number: int, overrides: Sequence[str]) -> None:
    """Make a run that was started elsewhere (by a pool's worker) a job of the sweep."""
    recorder: Recorder = R.get_recorder(recorder_id=run_id)
    details = {"number": number, "overrides": list(overrides)}
    tags = {JOB_TAG + sweep_id: json.dumps(details)}
    if PARENT_TAG not in recorder.list_tags():
        tags[PARENT_TAG] = sweep_id
    recorder.set_tags(**tags)


def claim_path(experiment_id: str, tags: Mapping[str, str]) -> Any:
    """The path of the claim on the task that is identified by a run's tags."""
    task = tags.get(TASK_TAG, "none")
    return claims_folder(R.get_uri()) / f"{experiment_id}-{task}.json"


def list_sweeps() -> list[RunRow]:
    """The runs of all sweeps in the store, the newest first."""
    return _find_runs(f"tags.`{SWEEP_TAG}` != ''")[::-1]


def get_job_count(sweep: RunRow) -> int | None:
    """The number of jobs of the sweep's last command; None if unknown."""
    count = sweep.tags.get(COUNT_TAG)
    return None if count is None else int(count)


def find_sweep(name_or_id: str) -> RunRow:
    """Find a sweep by its name or run ID; ConfigError with the nearest name if there is none."""
    sweeps = list_sweeps()
    matches = [s for s in sweeps if name_or_id in (s.id, s.tags[SWEEP_TAG])]
    if not matches:
        raise ConfigError(
            f"{unknown_name_message('sweep', name_or_id, {s.tags[SWEEP_TAG] for s in sweeps})} "
            f"Searched in {redact_urls(R.get_uri())}; for another store set tracking.uri=..."
        )
    if len(matches) > 1:
        ids = ", ".join(s.id for s in matches)
        raise ConfigError(
            f"{len(matches)} experiments have a sweep {name_or_id!r}; give its run ID: {ids}."
        )
    return matches[0]


def load_plan(sweep_id: str) -> dict[str, Any]:
    """Load the commands and settings that `resume` needs; ConfigError for another format."""
    plan: dict[str, Any] = R.get_recorder(recorder_id=sweep_id).load_object(PLAN)
    if plan.get("format") != PLAN_FORMAT:
        raise ConfigError(
            f"the sweep {sweep_id} is stored in format {plan.get('format')}, but this version of "
            f"qtorch reads format {PLAN_FORMAT}; resume it with the version that started it."
        )
    return plan


def _find_runs(condition: str, experiment_ids: Sequence[str] | None = None) -> list[RunRow]:
    """The runs that meet a condition, the oldest first."""
    from qtorch.tracking.mlflow_store import open_store

    store = open_store(R.get_uri())
    ids = experiment_ids or [e.id for e in store.experiments()]
    rows = store.runs(ids, filter_string=condition)
    return sorted(rows, key=lambda r: (r.start_time or 0, r.id))


# -- the user's registry of sweeps -----------------------------------------------------------------


def _register_sweep(name: str, recorder: Recorder) -> None:
    """Note the store of a sweep in the user's cache, for commands that run in other folders."""
    entry = {"name": name, "id": recorder.id, "tracking_uri": redact_urls(recorder.uri)}
    try:
        with atomic_write(cache_folder() / REGISTRY_FOLDER / f"{recorder.id}.json") as path:
            path.write_text(json.dumps(entry))
    except OSError as error:
        log.debug("cannot register the sweep: %s", error)


def find_sweep_uri(name_or_id: str) -> str | None:
    """The tracking URI of a sweep that this user started in any folder; None unless unique."""
    uris = set()
    for path in (cache_folder() / REGISTRY_FOLDER).glob("*.json"):
        try:
            entry = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if name_or_id in (entry["name"], entry["id"]) and _exists(entry):
            uris.add(entry["tracking_uri"])
    return uris.pop() if len(uris) == 1 else None


def _exists(entry: Mapping[str, Any]) -> bool:
    uri = str(entry["tracking_uri"])
    if uri.startswith("sqlite:///") and not os.path.exists(uri.removeprefix("sqlite:///")):
        return False
    try:
        with R.uri_context(uri):
            return not R.get_recorder(recorder_id=entry["id"]).is_deleted
    except NotInStoreError:
        return False
    except QtorchError as error:
        log.debug("%s: %s", uri, error)
        return False


# -- the best job and the groups of seeds ----------------------------------------------------------


@dataclass(frozen=True)
class SeedGroup:
    """Finished jobs whose tasks are equal except for the seed."""

    name: str
    jobs: tuple[JobResult, ...]

    def metric_statistics(self, metric: str) -> tuple[float, float, int]:
        """Mean, standard deviation (ddof 1; NaN for one value) and count of a metric's values."""
        values = [j.metrics[metric] for j in self.jobs if metric in j.metrics]
        values = [v for v in values if math.isfinite(v)]
        if not values:
            return math.nan, math.nan, 0
        return fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values)


def common_overrides(jobs: Sequence[JobResult], command: str = "") -> set[str]:
    """The overrides that all planned jobs share.

    What the command varies is not shared, even if the jobs that have started agree on it. For a
    single job only overrides are shared that the command has verbatim.
    """
    common = common_words([j.overrides for j in jobs])
    words = command.split()
    if len(jobs) == 1:
        return common & set(words)
    varied_keys = {w.partition("=")[0] for w in words if re.search(r"=.*[,(]", w)}
    return {
        o for o in common if f" {o} " in f" {command} " or o.partition("=")[0] not in varied_keys
    }


def common_words(overrides: Sequence[Sequence[str]]) -> set[str]:
    """The overrides that stand in each of several lists of overrides."""
    return set.intersection(*map(set, overrides)) if overrides else set()


def seed_groups(jobs: Sequence[JobResult], command: str = "") -> list[SeedGroup]:
    """Group the finished jobs, in the order of their first ones; named by what they vary.

    `command` are the overrides of the sweep's command, see `common_overrides`.
    """
    common = common_overrides(jobs, command if len(jobs) > 1 else "")
    members: dict[str, list[JobResult]] = {}
    for job in jobs:
        if job.status == Recorder.STATUS_FI:
            members.setdefault(job.setting, []).append(job)
    return [
        SeedGroup(setting_text(group[0].overrides, common), tuple(group))
        for group in members.values()
    ]


def choose_metric(jobs: Sequence[JobResult], metric: str | None = None) -> str:
    """The metric to rank jobs by: the given one (ConfigError if no job has it), else a Rank IC."""
    logged_metrics = sorted({key for job in jobs for key in job.metrics})
    if metric is not None:
        if metric not in logged_metrics:
            raise ConfigError(unknown_name_message("metric", metric, logged_metrics, limit=30))
        return metric
    default = next((name for name in DEFAULT_METRICS if name in logged_metrics), None)
    if default is None:
        raise ConfigError(
            f"no job has a Rank IC; set metric=... to one of {', '.join(logged_metrics)}."
        )
    return default


def resolve_mode(metric: str, mode: str | None = None) -> str:
    """The mode "max" or "min": the given one, else "min" for losses and errors."""
    if mode is not None:
        if mode not in MODES:
            raise ConfigError(unknown_name_message("mode", mode, MODES))
        return mode
    last = metric.lower().replace("/", ".").rpartition(".")[2]
    return "min" if any(word in last.split("_") for word in MINIMIZED_METRICS) else "max"


def best_job(jobs: Sequence[JobResult], metric: str, mode: str = "max") -> JobResult | None:
    """The finished job with the best value; None if no job has the metric."""
    candidates = [
        j
        for j in jobs
        if j.status == Recorder.STATUS_FI and math.isfinite(j.metrics.get(metric, math.nan))
    ]
    pick = max if mode == "max" else min
    return pick(candidates, key=lambda j: j.metrics[metric], default=None)


def best_group(groups: Sequence[SeedGroup], metric: str, mode: str = "max") -> SeedGroup | None:
    """The group with the best mean over its seeds; None if no group has the metric."""
    candidates = [g for g in groups if g.metric_statistics(metric)[2]]
    pick = max if mode == "max" else min
    return pick(candidates, key=lambda g: g.metric_statistics(metric)[0], default=None)


def setting_text(overrides: Sequence[str], common: Collection[str]) -> str:
    """Describe the setting of a job by its overrides but for the seed and those in `common`."""
    varying = [o for o in overrides if o not in common and not _is_seed(o)]
    return " ".join(varying) or "one setting"


def _is_seed(override: str) -> bool:
    return override.lstrip("+").partition("=")[0] in ("seed", "model.seed", "model.kwargs.seed")
