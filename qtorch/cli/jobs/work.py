"""Execute one job, in whichever process it runs: train, store the result, print a summary."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qtorch.cli.compose import POOL, job_task, task_definition
from qtorch.cli.guard import configure_process, error_line, is_debug_enabled
from qtorch.cli.jobs.results import FAILED, FINISHED, KILLED, RUNNING, SENT, command_results
from qtorch.cli.launchers.kinds import (
    OwnProcessLauncher,
    SharedProcessLauncher,
    launcher_class,
)
from qtorch.cli.launchers.slurm import JOB_TAG, find_earlier_attempt, scheduler_job_name
from qtorch.cli.tables.jobs import print_summary
from qtorch.cli.workflow.task import report_notes
from qtorch.core.errors import ConfigError, QtorchError, printable_text
from qtorch.core.lazy import quick_imports
from qtorch.core.session import LOCK_VARIABLE, TRUSTED_VARIABLE
from qtorch.core.trust import find_untrusted_packages
from qtorch.process.child import ExitStatus, Parent
from qtorch.process.fork_server import TRAINING_PRELOAD, ForkServer, fork_server
from qtorch.process.heartbeat import RUN
from qtorch.process.stops import is_command_stopped
from qtorch.study.sweep import JobResult
from qtorch.study.sweep_job import (
    ELSEWHERE,
    FAILED_BEFORE,
    SKIPPED,
    TRAINED,
    JobOutcome,
    SweepMember,
    add_work_seconds,
    identify_task,
    run_sweep_job,
    tag_fit,
)
from qtorch.tracking.lookup import select_run
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import Recorder, with_run_tags
from qtorch.trainer.checks import check_task
from qtorch.trainer.failure import collect_started_runs
from qtorch.trainer.run import end_task_train, task_train
from qtorch.trainer.subprocess_tasks import fail_run, report_started_runs

log = logging.getLogger(__name__)

MODES = ("auto", "true", "false")
UNDELIVERED = (
    "the tracking server has not received all of run {run}; it is complete in the outbox, and "
    "`qtorch tracking send` sends the rest."
)


def execute_job(request: Mapping[str, Any]) -> None:
    """Execute a job in the current process and store its result in the job's folder."""
    start = time.perf_counter()
    settings, folder = request["settings"], Path(request["folder"])
    result = JobResult(request["number"], list(request["overrides"]), FAILED)
    with collect_started_runs() as runs:
        try:
            configure_process(settings["log_level"], (settings["tracking"] or {}).get("uri"))
            # The command has logged those of a sweep; a resumed run has its own task.
            if "workflow" in settings and request["sweep"] is None and request["resume"] is None:
                report_notes(settings)
            if settings["runner"] != POOL:
                outcome = _train_job(request)
                apply_outcome(result, outcome)
                if result.status == FINISHED:
                    result.metrics = outcome.recorder.list_metrics()
            else:
                # The pool's modules take time to import, which other jobs should not wait for.
                from qtorch.cli.jobs.pool_jobs import submit_to_pool

                result.pool_task = submit_to_pool(request)
                result.status = SENT
        except (KeyboardInterrupt, SystemExit) as stop:
            result.status = KILLED
            result.error = _resume_hint(runs, stop)
            raise KeyboardInterrupt(result.error) from stop
        except Exception as error:
            record_failure(result, error)
        finally:
            result.seconds = time.perf_counter() - start
            if runs:
                run = runs[-1]
                result.run_id = run.id
                result.experiment = getattr(run, "experiment_name", None)
                _log_seconds(request, result, run)
            command_results.store(result, folder)
    if result.status == FINISHED and result.note == SKIPPED:
        print_skipped_job(result, outcome)
    elif result.status == FINISHED:
        print_summary(result, outcome.recorder, show_command=request["sweep"] is None)
        print_trust_hint(request)
    elif result.status == FAILED and request["sweep"] is not None:
        print_failure(result)


def record_failure(result: JobResult, error: Exception) -> None:
    """Set the job's result to failed with this error."""
    if is_debug_enabled():
        log.error("the job failed", exc_info=error)
    result.status, result.error = FAILED, error_line(error)


def _log_seconds(request: Mapping[str, Any], result: JobResult, run: Recorder) -> None:
    """Add the time of this job to its run, unless the job did no work."""
    if request["sweep"] is None or result.note in (SKIPPED, ELSEWHERE, FAILED_BEFORE):
        return
    try:
        add_work_seconds(run, result.seconds)
    except QtorchError as error:
        log.warning("cannot log the duration of run %s: %s", run.id, error)


def print_failure(result: JobResult) -> None:
    """Report immediately that a job failed; the command repeats it at its end."""
    print(f"job {result.number} failed: {printable_text(str(result.error))}", file=sys.stderr)


def print_trust_hint(request: Mapping[str, Any]) -> None:
    """Say which packages other commands, which load the run, must be told to trust."""
    packages = find_untrusted_packages(task_definition(request["settings"]))
    if packages and request["sweep"] is None:
        words = f"export {TRUSTED_VARIABLE}={','.join(packages)}"
        print(f"for commands that load this run (predict, finetune, ...): {words}")


def print_skipped_job(result: JobResult, outcome: JobOutcome) -> None:
    """Report that a job was already finished, and by what its run was found."""
    text = f"job {result.number}: already finished in run {result.run_id} ({outcome.reason})"
    print(text, file=sys.stderr)


def _train_job(request: Mapping[str, Any]) -> JobOutcome:
    """Train or resume the run of a job."""
    settings, resume_id = request["settings"], request["resume"]
    if resume_id is not None:
        recorder = select_run(resume_id)
        if recorder.status == FINISHED:
            raise ConfigError(f"run {resume_id} is {FINISHED}: there is nothing to resume.")
        return JobOutcome(end_task_train(recorder), TRAINED)
    if request["sweep"] is None:
        with quick_imports(freeze=True):  # the modules of the task's classes
            check_task(task_definition(settings))  # before the data's calendar is read
    task, experiment = job_task(settings), settings["experiment_name"]
    name = request["run_name"]
    if request["sweep"] is None:
        # A sweep that only changes the records reuses the training of this run.
        complete, tags = (task, {}) if task.get("seed") is None else identify_task(task)
        on_fitted = partial(tag_fit, complete) if tags else None
        job = scheduler_job_name()
        if job is not None and tags:
            tags[JOB_TAG] = job
        with with_run_tags(tags):
            earlier_run = find_earlier_attempt(experiment, tags)
            recorder = task_train(task, experiment, name, run=earlier_run, on_fitted=on_fitted)
        return JobOutcome(recorder, TRAINED)
    member = sweep_member(settings, request["sweep"], request["number"], request["overrides"])
    return run_sweep_job(task, member, experiment, name)


def sweep_member(
    settings: Mapping[str, Any], sweep_id: str, number: int, overrides: Sequence[str]
) -> SweepMember:
    """Describe a job's place in its sweep, and how the sweep treats earlier runs."""
    sweep_settings = settings["sweep"]
    return SweepMember(
        sweep_id,
        number,
        tuple(overrides),
        retry=bool(sweep_settings["retry"]),
        reuse=bool(sweep_settings["reuse"]),
    )


def apply_outcome(result: JobResult, outcome: JobOutcome) -> None:
    """Copy the outcome of a job to its result."""
    result.status = FINISHED
    result.note = None if outcome.action == TRAINED else outcome.action
    if outcome.action == FAILED_BEFORE:
        result.status, result.error = FAILED, outcome.error
    elif outcome.action == ELSEWHERE:
        result.status, result.error = RUNNING, outcome.error
    elif outcome.recorder.status == RUNNING:  # see `Recorder.end_run`
        result.status, result.error = FAILED, UNDELIVERED.format(run=outcome.recorder.id)


def _resume_hint(runs: list[Recorder], stop: BaseException) -> str:
    """Name the interrupted run, its checkpoint and the command that resumes it."""
    if not runs:
        return "Nothing was started."
    run = runs[-1]
    checkpoint = getattr(stop, "checkpoint", None) or _find_checkpoint(run)
    checkpoint_text = (
        f"its checkpoint is {checkpoint}" if checkpoint else "it has no checkpoint yet"
    )
    hint = "Resume it with" if checkpoint else "Restart it in the same run with"
    return f"Run {run.id} is {KILLED}; {checkpoint_text}. {hint}: qtorch train resume={run.id}"


def _find_checkpoint(run: Recorder) -> str | None:
    # This imports Lightning, which the job may not have needed yet.
    from qtorch.model.loop.checkpoint import LAST

    path = run.checkpoint_dir() / LAST
    return str(path) if path.is_file() else None


def is_isolated(mode: Any, launcher: str, *, sweep: bool) -> bool:
    """Whether a job runs in its own process; `mode` is auto, true or false."""
    mode_name = str(mode).lower()
    if mode_name not in MODES:
        raise ConfigError(f"sweep.isolate={mode}: expected auto, true or false.")
    if issubclass(launcher_class(launcher), SharedProcessLauncher):
        if mode_name == "true":
            raise ConfigError("runner=fleet trains all jobs in one process: remove sweep.isolate.")
        return False
    # A Ray worker runs only one job. A child of it would survive the worker for up to
    # `orphan_seconds` if that is killed, and hold the GPU that Ray gives to the next job.
    has_own_process = issubclass(launcher_class(launcher), OwnProcessLauncher)
    return mode_name == "true" or (mode_name == "auto" and sweep and not has_own_process)


def job_fork_server() -> ForkServer:
    """Return the fork server of this process's jobs."""
    return fork_server(TRAINING_PRELOAD, __name__)


def execute_job_in_child(
    request: Mapping[str, Any], *, in_launcher: bool
) -> tuple[ExitStatus, dict[str, Any] | None]:
    """Execute a job in a child process; return its exit status and the run that it started.

    The child is stopped if its sweep is. `in_launcher`: this is a launcher's process, and another
    process, which has started the sweep, handles Ctrl-C.
    """
    lock = os.environ.get(LOCK_VARIABLE)
    if in_launcher and lock is not None and os.path.exists(lock):
        # For good: the launcher's process works for this sweep alone, and its signals stay ignored
        # between two jobs too, until the sweep's process stops it.
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    runs: list[dict[str, Any]] = []
    exit_status = job_fork_server().call(
        f"{__name__}.serve_job",
        request,
        lambda message: runs.append(message[RUN]),
        is_stopped=lambda: is_command_stopped(lock),
    )
    if is_command_stopped(lock):
        job_fork_server().close()  # a launcher may keep its processes for minutes
    return exit_status, runs[-1] if runs else None


def serve_job(request: Mapping[str, Any], parent: Parent) -> int:
    """Execute the job in the child and report its run as soon as it is created."""
    try:
        with report_started_runs(parent):
            execute_job(request)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def fail_lost_run(run: Mapping[str, Any], message: str) -> None:
    """Mark the run of a dead process FAILED, because the process cannot do so itself."""
    try:
        with R.uri_context(run["tracking_uri"]):
            fail_run(R.get_recorder(recorder_id=run["recorder_id"]), message)
    except QtorchError as error:
        text = error_line(error)
        print(f"cannot mark run {run['recorder_id']} as failed: {text}", file=sys.stderr)


def failure_hint(exit_status: ExitStatus) -> str:
    """Return a likely reason for this exit status of a job's process."""
    is_killed = exit_status.code == -signal.SIGKILL
    return " (out of memory? the kernel kills the largest process)" if is_killed else ""
