"""The worker process: runs tasks in child processes and renews their leases.

The worker itself imports no torch and stays small. Each slot (`Slot`) is a thread with
a child process. The main thread handles signals and displays the slots.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtorch.core.errors import LeaseLost, TaskError, TaskResultError
from qtorch.process.child import Child
from qtorch.process.fork_server import ForkError, ForkServer
from qtorch.process.stops import StopSignals
from qtorch.task.definition import RECORDER, Task
from qtorch.task.devices import CPU, device_environment
from qtorch.task.manager import LeaseRenewer, TaskManager
from qtorch.task.stores.base import StoreFileLost, StoreTimeout
from qtorch.task.worker_process import (
    SIGNAL_SECONDS,
    OutcomeWaiter,
    may_reuse_child,
    start_task_child,
    task_fork_server,
)

log = logging.getLogger(__name__)

IDLE_SECONDS = (0.3, 2.0)  # first and longest pause between polls of an empty pool
TICK_SECONDS = 0.25  # between two displays of the slots
HURRY_SECONDS = 3.0  # to end after a second Ctrl-C
RETRY_SECONDS = 1.0  # between two tries to commit, each of which has waited for the store
THREADS, TRACKING = "OMP_NUM_THREADS", "MLFLOW_TRACKING_URI"


@dataclass(frozen=True)
class WorkerOptions:
    """The options of a worker.

    functions: for each task status to claim, in order of preference, the import path of the
        function that runs such tasks.
    experiment, tracking_uri: override the experiment and tracking store that a task names in its
        `tracking` (see `qtorch.trainer.run`). The default experiment is named like the pool.
    lease: duration of a lease in seconds.
    max_tasks: maximum number of tasks of all slots together.
    idle_timeout: seconds after which the worker ends if no slot has a task (None: never).
    force_release: run each task in its own process.
    hang_after: seconds without a sign of life after which a task counts as hung.
    grace: seconds that an interrupted training gets to write a checkpoint.
    """

    pool: str
    url: str | None = None
    functions: Mapping[str, str] = field(
        default_factory=lambda: {
            TaskManager.STATUS_PART_DONE: "qtorch.trainer.run.end_task_train",
            TaskManager.STATUS_WAITING: "qtorch.trainer.run.task_train",
        }
    )
    experiment: str | None = None
    tracking_uri: str | None = None
    query: Mapping[str, Any] | None = None
    lease: float = 60.0
    max_tasks: int | None = None
    idle_timeout: float | None = None
    force_release: bool = False
    hang_after: float = 600.0
    grace: float = 30.0


class WorkerControl:
    """State that the slots of a worker share: how many tasks may be claimed, whether to stop."""

    def __init__(self, max_tasks: int | None) -> None:
        self.is_draining = False  # claim no further task
        self.stop = threading.Event()  # write checkpoints and return the tasks to the pool
        self.hurry = threading.Event()  # ... without waiting for checkpoints
        self._max_tasks = math.inf if max_tasks is None else max_tasks
        self._num_claimed = 0  # tasks that were claimed
        self._num_reserved = 0  # tasks that slots may claim right now
        self._num_running = 0
        self._idle_since = time.monotonic()
        self._lock = threading.Lock()

    @property
    def is_exhausted(self) -> bool:
        """Whether `max_tasks` tasks were claimed."""
        return self._num_claimed >= self._max_tasks

    @property
    def idle_seconds(self) -> float:
        """The time since any slot had a task."""
        with self._lock:
            return 0.0 if self._num_running else time.monotonic() - self._idle_since

    def reserve_task(self) -> bool:
        """Reserve the claim of a task, so that all slots together claim at most `max_tasks`."""
        with self._lock:
            is_allowed = self._num_claimed + self._num_reserved < self._max_tasks
            self._num_reserved += is_allowed
            return is_allowed

    def end_reservation(self, *, is_claimed: bool) -> None:
        """End a reservation: the slot has claimed a task, or the pool had none."""
        with self._lock:
            self._num_reserved -= 1
            self._num_claimed += is_claimed
            self._num_running += is_claimed

    def end_task(self) -> None:
        """Count a claimed task as no longer running."""
        with self._lock:
            self._num_running -= 1
            self._idle_since = time.monotonic()


@dataclass
class SlotStatus:
    """What a slot is doing, for display."""

    name: str
    device: str
    task: Task | None = None
    since: float = 0.0
    progress: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] | None = None
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("done", "failed", "returned", "lost"), 0)
    )


Show = Callable[[Sequence[SlotStatus]], None]


class Slot(threading.Thread):
    """Claims tasks, runs them in a child process, and renews their leases meanwhile.

    `server` starts the child; `environment` selects its device; `output` is a file for its output.
    """

    def __init__(
        self,
        options: WorkerOptions,
        control: WorkerControl,
        display: SlotStatus,
        *,
        worker: str,
        server: ForkServer,
        environment: Mapping[str, str],
        output: Path | None = None,
    ) -> None:
        super().__init__(name=display.name, daemon=True)
        self.options, self.control, self.display = options, control, display
        self.server = server
        self.worker, self.environment, self.output = worker, environment, output
        self.child: Child | None = None
        self.error: BaseException | None = None
        self._fetch_error: str | None = None  # of the last poll

    def run(self) -> None:
        """Run until there is no more work or the worker stops."""
        try:
            self._work()
        except TaskError as error:
            self.error = error
            log.error("%s failed: %s", self.name, error)
        except BaseException as error:
            self.error = error
            log.exception("%s failed", self.name)
        finally:
            self._drop_child()

    def _work(self) -> None:
        manager = TaskManager(self.options.pool, self.options.url, lease=self.options.lease)
        pause = IDLE_SECONDS[0]
        # A slot without a reservation waits too: the others may find no task and end theirs.
        while not (self.control.is_draining or self.control.is_exhausted):
            claim = self._claim(manager)
            if claim is None:
                if self._is_idle_too_long():
                    return
                self.control.stop.wait(pause)
                pause = min(pause * 1.5, IDLE_SECONDS[1])
                continue
            pause = IDLE_SECONDS[0]
            try:
                outcome = self._execute(manager, *claim)
            finally:
                self.control.end_task()
            if outcome.get("interrupted"):  # this process may be about to get the same stop signal
                self.control.stop.wait(SIGNAL_SECONDS)

    def _is_idle_too_long(self) -> bool:
        limit = self.options.idle_timeout
        return limit is not None and self.control.idle_seconds >= limit

    def _claim(self, manager: TaskManager) -> tuple[Task, str] | None:
        """Fetch a task, unless `max_tasks` forbids it."""
        if not self.control.reserve_task():
            return None
        claim = None
        try:
            claim = self._fetch(manager)
        finally:
            self.control.end_reservation(is_claimed=claim is not None)
        return claim

    def _fetch(self, manager: TaskManager) -> tuple[Task, str] | None:
        """Claim a task; return it with the status that it had before."""
        for status in self.options.functions:
            try:
                task = manager.fetch_task(
                    self.options.query, status, worker=self.worker, decode=False
                )
            except StoreFileLost:
                raise
            except TaskError as error:
                if str(error) != self._fetch_error:
                    log.error("%s: %s", self.name, error)
                self._fetch_error = str(error)
                return None
            self._fetch_error = None
            if task is not None:
                return task, status
        return None

    # -- one task ------------------------------------------------------------------------------

    def _execute(self, manager: TaskManager, task: Task, status_before: str) -> dict[str, Any]:
        self.display.task, self.display.since = task, time.monotonic()
        self.display.progress, self.display.run = {"stage": "starting"}, task.get("run")
        log.info("%s: running task %s (attempt %s)", self.name, task["_id"], task["attempt"])
        try:
            request = self._build_request(task, status_before)
            with LeaseRenewer(manager, task) as lease:
                outcome = self._run_on_child(request, lease)
                self._report_outcome(manager, task, status_before, outcome, lease)
                if not may_reuse_child(outcome, request):
                    self._drop_child()
                return outcome
        finally:
            self.display.task = None

    def _run_on_child(self, request: Mapping[str, Any], lease: LeaseRenewer) -> dict[str, Any]:
        """Run the task on a child, and once more if the first child could not be started."""
        outcome = self._wait_for_outcome(request, lease)
        # A child that ended before its task began may have got a stop signal that this process has
        # not received yet.
        if {"not_started", "unusable"} & outcome.keys() and self.control.stop.wait(SIGNAL_SECONDS):
            return {"interrupted": True}
        if "not_started" in outcome:
            log.warning("%s: %s; trying again", self.name, outcome["not_started"])
            if self.child is not None:
                self.server.close(self.child.server_pid)
            outcome = self._wait_for_outcome(request, lease)
        return {"unusable": outcome["not_started"]} if "not_started" in outcome else outcome

    def _wait_for_outcome(self, request: Mapping[str, Any], lease: LeaseRenewer) -> dict[str, Any]:
        """Send the request to the child and return the outcome, see `OutcomeWaiter`."""
        waiter = OutcomeWaiter(
            lease,
            lambda message: self._report_progress(message, lease),
            self.control.stop.is_set,
            self.control.hurry.is_set,
            self.options.grace,
            self.options.hang_after,
        )
        try:
            child = self._get_child()
        except ForkError as error:
            return {"not_started": str(error)}
        child.ping()  # its last one may be old
        child.send(request)
        return waiter.wait(child)

    def _build_request(self, task: Task, status_before: str) -> dict[str, Any]:
        options, definition, run = self.options, task["def"], task.get("run")
        tracking = definition.get("tracking")
        tracking = dict(tracking) if isinstance(tracking, Mapping) else {}
        experiment_name = options.experiment or tracking.get("experiment_name") or options.pool
        result = task["res"] if status_before == TaskManager.STATUS_PART_DONE else None
        if options.tracking_uri:
            if tracking:
                definition = {**definition, "tracking": {**tracking, "uri": options.tracking_uri}}
            run = run and {**run, "tracking_uri": options.tracking_uri}
            if isinstance(result, Mapping) and isinstance(result.get(RECORDER), Mapping):
                result = {RECORDER: {**result[RECORDER], "tracking_uri": options.tracking_uri}}
        return {
            "func": options.functions[status_before],
            "definition": definition,
            "res": result,
            "options": {"experiment_name": experiment_name, "run": run},
            "last": options.force_release,
        }

    def _report_progress(self, message: Mapping[str, Any], lease: LeaseRenewer) -> None:
        if "run" in message:
            self.display.run = dict(message["run"])
            lease.report_run(self.display.run)
        elif "beat" in message:
            # A new stage keeps what earlier beats have reported, such as epoch and metrics.
            self.display.progress = {**self.display.progress, **message["beat"]}
            lease.report_progress(self.display.progress)

    def _report_outcome(
        self,
        manager: TaskManager,
        task: Task,
        status_before: str,
        outcome: Mapping[str, Any],
        lease: LeaseRenewer,
    ) -> None:
        """Report the outcome to the pool: commit, return or fail the task."""
        display, name = self.display, f"task {task['_id']}"
        try:
            if outcome.get("lost"):
                raise LeaseLost("the lease expired")
            outcome = self._commit_result(manager, task, outcome, lease)
            if "result" in outcome:
                display.counts["done"] += 1
                log.info("%s: %s is done", self.name, name)
            elif outcome.get("interrupted"):
                _require_lease(manager.return_task(task, status_before, is_preempted=True))
                display.counts["returned"] += 1
                log.info("%s: returned %s to the pool", self.name, name)
            elif "unusable" in outcome:
                manager.return_task(task, status_before)
                raise TaskError(f"this worker cannot run tasks: {outcome['unusable']}")
            else:
                self._retry_while_unavailable(
                    lambda: self._report_failure(manager, task, status_before, outcome), lease
                )
                display.counts["failed"] += 1
        except LeaseLost as error:
            display.counts["lost"] += 1
            log.warning(
                "%s: lost the lease of %s, nothing is committed: %s", self.name, name, error
            )

    def _commit_result(
        self, manager: TaskManager, task: Task, outcome: Mapping[str, Any], lease: LeaseRenewer
    ) -> Mapping[str, Any]:
        """Commit the result, if any; return the outcome, which is an error if that is refused."""
        if "result" not in outcome:
            return outcome
        try:
            self._retry_while_unavailable(
                lambda: manager.commit_task_res(task, outcome["result"]), lease
            )
        except TaskResultError as error:
            return {"error": str(error)}
        return outcome

    def _report_failure(
        self, manager: TaskManager, task: Task, status_before: str, outcome: Mapping[str, Any]
    ) -> None:
        if "refused" in outcome:  # further attempts would fail too
            text = outcome["refused"]
            _require_lease(manager.fail_task(task, text))
        else:
            hang_text = f"no sign of life for {self.options.hang_after:g} s (hang_after)"
            text = outcome.get("error") or outcome.get("died") or hang_text
            traceback_text = outcome.get("traceback")
            _require_lease(
                manager.return_task(task, status_before, error=text, traceback=traceback_text)
            )
        log.error("%s: task %s failed: %s", self.name, task["_id"], text)

    def _retry_while_unavailable(self, call: Callable[[], Any], lease: LeaseRenewer) -> None:
        """Repeat the call while the store is unavailable, so that a finished result is not lost."""
        while True:
            try:
                call()
                return
            except StoreTimeout as error:
                log.error("%s: %s", self.name, error)
                if lease.lease_lost.is_set() or self.control.stop.wait(RETRY_SECONDS):
                    raise

    # -- the child -----------------------------------------------------------------------------

    def _get_child(self) -> Child:
        if self.child is not None:
            self.child.receive(0.0)
        if self.child is None or self.child.exit_status is not None:
            self._drop_child()
            self.child = start_task_child(
                self.server, self.environment, self.options.lease, self.output
            )
        return self.child

    def _drop_child(self) -> None:
        child, self.child = self.child, None
        if child is not None:
            child.wait_or_kill()


def _require_lease(is_accepted: bool) -> None:
    """Raise LeaseLost if the pool did not accept a change, because the lease is lost."""
    if not is_accepted:
        raise LeaseLost("the lease expired")


class Supervisor:
    """Runs the tasks of a pool with one child process for each of `devices`.

    `show` is called four times per second with the status of each slot. `logs` is a folder for the
    output of the children, which else goes to the output of this process.
    """

    def __init__(
        self,
        options: WorkerOptions,
        devices: Sequence[str] = (CPU,),
        *,
        show: Show | None = None,
        logs: Path | None = None,
    ) -> None:
        self.options, self.show = options, show
        self.control = WorkerControl(options.max_tasks)
        self._signals = StopSignals(self._stop, self._hurry)
        self._stop_signal: int | None = None
        self._hurry_time: float | None = None
        host = socket.gethostname()
        server = task_fork_server(options.functions.values())
        self.slots = []
        for k, device in enumerate(devices):
            slot = Slot(
                options,
                self.control,
                SlotStatus(f"slot {k}", device),
                worker=f"{host}:{os.getpid()}:{k}",
                server=server,
                environment={
                    **device_environment(device, list(devices).count(device)),
                    **_thread_environment(devices),
                    **({TRACKING: options.tracking_uri} if options.tracking_uri else {}),
                },
                output=None if logs is None else logs / f"slot{k}.log",
            )
            self.slots.append(slot)

    def run(self) -> int:
        """Run until there is no more work; return the exit code.

        The code is 0 at the end of the work, 128 + the signal that stopped it, or 1 if a slot
        failed. After a stop signal the trainings write a checkpoint and their tasks are returned
        to the pool; a second Ctrl-C ends the process immediately. A task that finishes meanwhile
        is committed.
        """
        with self._signals:
            for slot in self.slots:
                slot.start()
            while any(slot.is_alive() for slot in self.slots):
                if self._stop_signal is not None and not self.control.stop.is_set():
                    name = signal.Signals(self._stop_signal).name
                    log.warning(
                        "%s: returning tasks to the pool; press Ctrl-C again to exit immediately",
                        name,
                    )
                    self.control.stop.set()
                if self._hurry_time is not None:
                    self.control.hurry.set()
                    if time.monotonic() > self._hurry_time:
                        self._exit_now()
                if self.show is not None:
                    self.show([slot.display for slot in self.slots])
                time.sleep(TICK_SECONDS)
        if self._stop_signal is not None:
            return 128 + self._stop_signal
        return int(any(slot.error is not None for slot in self.slots))

    # Signal handlers only set attributes, and `run` sets the events: a handler that interrupts
    # `Event.set` in this thread would wait forever for the event's lock.

    def _stop(self, number: int) -> None:
        self._stop_signal = number
        self.control.is_draining = True

    def _hurry(self) -> None:
        self._hurry_time = self._hurry_time or time.monotonic() + HURRY_SECONDS

    def _exit_now(self) -> None:
        """Exit although a slot still waits for the pool's store; its lease will expire."""
        try:
            for slot in self.slots:
                child = slot.child
                if child is not None:
                    child.kill()
        finally:
            os._exit(128 + (self._stop_signal or signal.SIGINT))


def _thread_environment(devices: Sequence[str]) -> dict[str, str]:
    """Divide the CPU cores among several children, unless OMP_NUM_THREADS is set."""
    if THREADS in os.environ or len(devices) == 1:
        return {}
    return {THREADS: str(max(1, len(os.sched_getaffinity(0)) // len(devices)))}
