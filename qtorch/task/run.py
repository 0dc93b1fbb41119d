"""`run_task`: run the tasks of a pool in this process."""

from __future__ import annotations

import inspect
import logging
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import FrameType
from typing import Any

from qtorch.core.configured import check_arguments
from qtorch.core.errors import (
    ConfigError,
    LeaseLost,
    QtorchError,
    TaskError,
    TaskResultError,
    TrustError,
)
from qtorch.core.names import import_path
from qtorch.core.qlib.translation import check_definition_trust
from qtorch.core.session import TRUSTED_VARIABLE, get_trusted_packages, session
from qtorch.core.trust import locate
from qtorch.process.child import Child, Message
from qtorch.process.fork_server import ForkError
from qtorch.process.heartbeat import RUN, beat, listen
from qtorch.process.stops import SCHEDULER_SIGNALS, StopSignals, received_signals, stop_name
from qtorch.task.definition import Task
from qtorch.task.manager import LEASE_SECONDS, LeaseRenewer, TaskManager
from qtorch.task.stores.base import DONE, FAILED, PART_DONE, RUNNING, WAITING, check_status
from qtorch.task.worker_process import (
    DELIVERY,
    SIGNAL_SECONDS,
    OutcomeWaiter,
    start_task_child,
    task_fork_server,
)
from qtorch.tracking.delivery import wait_for_delivery

log = logging.getLogger(__name__)

Query = Mapping[str, Any]
HANG_SECONDS = 600.0  # without a sign of life; `qtorch worker` has the same default
IDLE_PAUSES = (0.1, 1.0)  # first and longest pause between polls of an empty pool, in seconds

_current: ContextVar[Task | None] = ContextVar("qtorch_task", default=None)


class SubprocessError(TaskError):
    """The task's process failed; `traceback_text` is its traceback, if it sent one."""

    def __init__(self, message: str, traceback_text: str | None = None) -> None:
        super().__init__(message)
        self.traceback_text = traceback_text


def current_task() -> Task | None:
    """Return the task that `run_task` is running in this process, for example to know its attempt.

    None in the child processes of `qtorch worker` and of `run_task(..., force_release=True)`.
    """
    return _current.get()


def run_task(
    task_func: Callable[..., Any] | str,
    task_pool: str,
    query: Query | None = None,
    force_release: bool = False,
    before_status: str = WAITING,
    after_status: str = DONE,
    *,
    url: str | None = None,
    lease: float = LEASE_SECONDS,
    max_tasks: int | None = None,
    idle_timeout: float | None = 0.0,
    hang_after: float | None = HANG_SECONDS,
    **kwargs: Any,
) -> bool:
    """Claim tasks of a pool, call `task_func` for each and commit its result.

    Returns whether there was any task. `task_func` (a callable or its import path) is called as
    `task_func(definition, **kwargs)` for `before_status` waiting, as `task_func(result, **kwargs)`
    for part_done. If it has a parameter `run` and an earlier attempt had a run, it gets that run's
    ids. The loop ends after `max_tasks` tasks, or if no task could be claimed for `idle_timeout`
    seconds (None: if no task is waiting and none that other workers run may be returned).
    `force_release` runs each task in its own process.

    A thread renews the lease while `task_func` gives signs of life
    (`qtorch.process.heartbeat.beat`, as every training does). After `hang_after` seconds without
    one, `task_func` is interrupted, which counts as an error of the task; if it cannot be
    interrupted, it loses its lease. Use None for a `task_func` that gives no signs of life.

    An error of `task_func` is counted for its task and the loop continues with the next one. A
    definition that names something untrusted or nonexistent fails without further attempts.
    SIGTERM, SIGUSR1 and Ctrl-C return the task without counting an error and end the loop; a second
    Ctrl-C ends it immediately. If the lease is lost, `task_func` is interrupted and nothing is
    committed.

    Corresponds to qlib/workflow/task/manage.py.
    """
    manager = TaskManager(task_pool, url, lease=lease)
    runner = _TaskRunner(
        manager, task_func, before_status, after_status, kwargs, force_release, hang_after
    )
    count, idle_since, pause = 0, time.monotonic(), IDLE_PAUSES[0]
    with TaskSignals() as signals:
        try:
            while max_tasks is None or count < max_tasks:
                signals.raise_pending()
                task = manager.fetch_task(query, before_status)
                if task is not None:
                    count += 1
                    runner.attempt(task, signals)
                    idle_since, pause = time.monotonic(), IDLE_PAUSES[0]
                elif runner.is_finished(query, idle_timeout, time.monotonic() - idle_since):
                    break
                else:
                    time.sleep(pause * random.uniform(0.7, 1.0))
                    pause = min(pause * 1.5, IDLE_PAUSES[1])
            signals.raise_pending()  # the last task may have finished in spite of a stop signal
        finally:
            manager.close()
    return count > 0


class TaskSignals(StopSignals):
    """Stop signals that interrupt a task's work, but not the code around it.

    During the work the first stop signal raises KeyboardInterrupt; between two tasks the loop
    checks whether there was one, and ends. A later Ctrl-C raises KeyboardInterrupt anywhere.
    `interrupt`, called from a thread, stops the work like Ctrl-C.
    """

    def __init__(self) -> None:
        super().__init__(self._stop, self._stop_immediately)
        self.is_working = False
        self._own_sigint_pending = False  # `interrupt` has sent a signal that is not handled yet

    def interrupt(self) -> None:
        """Stop the work in the main thread, because its lease is lost or it hangs."""
        main = threading.main_thread().ident
        if self.is_installed and self.is_working and main is not None:
            self._own_sigint_pending = True
            signal.pthread_kill(main, signal.SIGINT)

    def begin_work(self) -> None:
        """Mark the beginning of a task's work; raise if a stop signal came before it."""
        self.is_working, self._own_sigint_pending = True, False
        self.raise_pending()

    def end_work(self) -> None:
        """Mark the end of a task's work, and forget an interruption of it alone."""
        self.is_working = False
        if self._own_sigint_pending and signal.SIGINT in received_signals:
            # The `StopSignals` of a training inside the work has handled and recorded our SIGINT.
            # It must not end the loop as if the user had pressed Ctrl-C.
            received_signals.remove(signal.SIGINT)
            self._own_sigint_pending = False

    @property
    def is_stopped(self) -> bool:
        """Whether a stop signal was received."""
        return self.is_installed and bool(received_signals)

    def raise_pending(self) -> None:
        """Raise KeyboardInterrupt, or SystemExit for a scheduler signal, if one was received."""
        if self.is_stopped:
            number = received_signals[0]
            raise SystemExit(128 + number) if number in SCHEDULER_SIGNALS else KeyboardInterrupt

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Handle one signal, which may come from `interrupt`."""
        if self._own_sigint_pending:
            self._own_sigint_pending = False
            if self.is_working:
                raise KeyboardInterrupt("the lease is lost or the work hangs")
        else:
            super().handle(number, frame)

    def _stop(self, number: int) -> None:
        if self.is_working:
            raise KeyboardInterrupt
        log.warning("received %s: ending after this step", stop_name(number))

    def _stop_immediately(self) -> None:
        raise KeyboardInterrupt


class _TaskRunner:
    """Runs claimed tasks and reports their outcomes to the pool."""

    def __init__(
        self,
        manager: TaskManager,
        task_func: Callable[..., Any] | str,
        before: str,
        after: str,
        arguments: Mapping[str, Any],
        force_release: bool,
        hang_after: float | None,
    ) -> None:
        if before not in (WAITING, PART_DONE):
            raise ConfigError(f"before_status must be waiting or part_done; got {before!r}.")
        if check_status(after) in (RUNNING, FAILED):
            raise ConfigError(f"after_status must be part_done, done or waiting; got {after!r}.")
        if hang_after is not None and hang_after <= 0:
            raise ConfigError(
                f"hang_after must be a number of seconds above 0; got {hang_after!r}."
            )
        self.manager, self.before, self.after = manager, before, after
        self.hang_after = hang_after
        self.function = locate(task_func) if isinstance(task_func, str) else task_func
        self.arguments = dict(arguments)
        signature = inspect.signature(self.function)
        check_arguments(self.function, signature, self.arguments)
        self.takes_run = "run" in signature.parameters and "run" not in self.arguments
        self.subprocess_function = import_path(self.function) if force_release else None

    def is_finished(
        self, query: Query | None, idle_timeout: float | None, idle_seconds: float
    ) -> bool:
        """Whether the loop ends after `idle_seconds` without a task to claim."""
        if idle_timeout is not None:
            return idle_seconds >= idle_timeout
        stat = self.manager.task_stat(query)  # running tasks may be returned to the pool
        return not stat.get(self.before) and not stat.get(RUNNING)

    def attempt(self, task: Task, signals: TaskSignals) -> None:
        """Run one claimed task and report its outcome to the pool."""
        log.info("task %s, attempt %d", task["_id"], task["attempt"])
        try:
            check_definition_trust(task["def"])
        except QtorchError as error:
            self._fail(task, error, final=True)
            return
        with LeaseRenewer(
            self.manager, task, signals.interrupt, hang_after=self.hang_after
        ) as lease:
            try:
                with listen(lease.beat):
                    signals.begin_work()
                    result = self._call(task, lease)
                    signals.end_work()
            except BaseException as error:
                signals.end_work()
                self._handle_error(task, lease, error, signals)
            else:
                self._commit(task, result)

    def _call(self, task: Task, lease: LeaseRenewer) -> Any:
        first = task["def"] if self.before == WAITING else task["res"]
        options = dict(self.arguments)
        if self.takes_run and task["run"]:
            options["run"] = task["run"]
        if self.subprocess_function is None:
            token = _current.set(task)
            try:
                with wait_for_delivery(lambda: beat(DELIVERY)):
                    return self.function(first, **options)
            finally:
                _current.reset(token)
        return run_task_in_child(self.subprocess_function, task, self.before, options, lease)

    def _commit(self, task: Task, result: Any) -> None:
        try:
            self.manager.commit_task_res(task, result, self.after)
        except TaskResultError as error:
            self._fail(task, error, final=False)
        except LeaseLost as error:
            log.warning("%s", error)

    def _handle_error(
        self, task: Task, lease: LeaseRenewer, error: BaseException, signals: TaskSignals
    ) -> None:
        """Report an exception of the task's work; raise it again if it should end the process."""
        is_stopping = not isinstance(error, Exception)
        if isinstance(error, SystemExit) and not signals.is_stopped:
            is_stopping = False  # raised by the task itself, so it must not end the worker
        if lease.lease_lost.is_set():
            log.warning("task %s was stopped: it lost its lease", task["_id"])
            signals.raise_pending()
        elif isinstance(error, ForkError):  # not the task's fault, even if its work counts as hung
            self._return_task(task, signals)
            raise error
        elif lease.work_hung.is_set():
            text = f"no sign of life for {self.hang_after:g} s (hang_after)"
            log.error("task %s was stopped: %s", task["_id"], text)
            traceback_text = "".join(traceback.format_exception(error))
            self.manager.return_task(task, self.before, error=text, traceback=traceback_text)
            signals.raise_pending()
        elif is_stopping:
            self._return_task(task, signals)
            raise error
        else:
            self._fail(task, error, final=isinstance(error, TrustError))

    def _return_task(self, task: Task, signals: TaskSignals) -> None:
        log.warning("returning task %s to the pool", task["_id"])
        self.manager.return_task(task, self.before, is_preempted=True)
        signals.raise_pending()

    def _fail(self, task: Task, error: BaseException, *, final: bool) -> None:
        log.error("task %s failed: %s", task["_id"], error, exc_info=None if final else error)
        if final:
            self.manager.fail_task(task, error)
        else:
            text = getattr(error, "traceback_text", None)
            self.manager.return_task(task, self.before, error=error, traceback=text)


def run_task_in_child(
    name: str,
    task: Task,
    status_before: str,
    options: Mapping[str, Any],
    lease: LeaseRenewer,
) -> Any:
    """Call a function, named by its import path, in a child; return the result as stored.

    The child inherits the environment, the import path, the trusted packages and the tracking
    store. If this process is interrupted, the child gets time to write a checkpoint; if it
    finishes its work instead, the result is returned. A child that hangs, or whose lease is lost
    (another worker may have claimed the task), is killed without delay. Raises ForkError if no
    child can be started or the child was stopped, which is not the task's fault.
    """
    request = {"func": name, "definition": task["def"], "options": dict(options), "last": True}
    request["res"] = task["res"] if status_before == PART_DONE else None
    outcome = _send_to_child(name, request, lease)
    if "not_started" in outcome and not lease.work_hung.is_set():
        time.sleep(SIGNAL_SECONDS)  # this process may be about to get the same stop signal
        outcome = _send_to_child(name, request, lease)
    if "result" in outcome:
        return outcome["result"]
    if "lost" in outcome or "hung" in outcome:  # which of the two, the caller sees at the lease
        raise SubprocessError("the task's process was killed.")
    if "interrupted" in outcome:
        # This process did not stop the child. If a scheduler stops every process, this one gets
        # its signal now, and is interrupted here. If not, somebody has stopped the child alone.
        time.sleep(SIGNAL_SECONDS)
        raise ForkError("the task's process was stopped.")
    if "not_started" in outcome:
        raise ForkError(f"{outcome['not_started']}.")
    if "refused" in outcome:
        raise TrustError(outcome["refused"])
    if "died" in outcome:
        raise SubprocessError(f"{outcome['died']} without a result.")
    raise SubprocessError(outcome.get("error") or outcome["unusable"], outcome.get("traceback"))


def _send_to_child(name: str, request: Mapping[str, Any], lease: LeaseRenewer) -> dict[str, Any]:
    """Send a request to a new child, wait for its end and return the outcome (`OutcomeWaiter`)."""
    server = task_fork_server([name])
    try:
        child = start_task_child(server, _child_environment(), lease.manager.lease)
    except ForkError as error:
        return {"not_started": str(error)}
    outcome: dict[str, Any] = {}
    try:
        child.send(request)
        outcome = _wait_for_outcome(child, lease)
        child.wait_or_kill()  # it may still write output, or end runs that the function left open
    except KeyboardInterrupt as error:
        if child.pid is None and lease.work_hung.is_set():
            raise ForkError("the fork server does not respond.") from error
        if "result" not in outcome:
            raise
    finally:
        if child.pid is None:  # the server may hang
            server.close(child.server_pid)
        child.kill()
    return outcome


def _wait_for_outcome(child: Child, lease: LeaseRenewer) -> dict[str, Any]:
    """Return the outcome; if this process is interrupted, stop the child first.

    An interrupted child may finish nevertheless, and its result is returned. Every other outcome
    may be the effect of the stop, so that the interruption is raised again.
    """

    def report(message: Message) -> None:
        if "run" in message:
            lease.beat(RUN, message["run"])
        elif "beat" in message:
            lease.report_progress(message["beat"])

    try:
        return OutcomeWaiter(lease, report).wait(child)
    except KeyboardInterrupt:
        if lease.lease_lost.is_set() or lease.work_hung.is_set():
            raise
        outcome = OutcomeWaiter(lease, report, is_stopped=lambda: True).wait(child)
        if "result" not in outcome:
            raise
        return outcome


def _child_environment() -> dict[str, str]:
    """Return what the child inherits beside the environment variables and the import path."""
    # The child itself gets `sys.path`; PYTHONPATH is for processes that the function starts.
    variables = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    if get_trusted_packages():
        variables[TRUSTED_VARIABLE] = ",".join(get_trusted_packages())
    if session().tracking_uri:
        variables["MLFLOW_TRACKING_URI"] = str(session().tracking_uri)
    return variables
