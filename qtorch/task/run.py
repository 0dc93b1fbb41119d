"""Working off a pool in this process."""

from __future__ import annotations

import inspect
import logging
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import FrameType
from typing import Any

from qtorch.core.configured import check_arguments
from qtorch.core.errors import ConfigError, LeaseLost, QtorchError, TaskResultError, TrustError
from qtorch.core.heartbeat import listening
from qtorch.core.names import dotted_name, locate
from qtorch.core.stops import NOTICES, STOPS, noted
from qtorch.core.trust import check_config
from qtorch.task.definition import Task
from qtorch.task.forked import ForkError
from qtorch.task.lease import LeaseKeeper
from qtorch.task.manager import LEASE_SECONDS, TaskManager
from qtorch.task.process import Children
from qtorch.task.query import DONE, FAILED, PART_DONE, RUNNING, WAITING, check_status
from qtorch.task.released import call_released

log = logging.getLogger(__name__)

Query = Mapping[str, Any]
HANG_SECONDS = 600.0  # without a sign of life, as of `qtorch worker`
IDLE_PAUSES = (0.1, 1.0)  # seconds between two looks into an empty pool: the first, the longest


_current: ContextVar[Task | None] = ContextVar("qtorch_task", default=None)


def current_task() -> Task | None:
    """The task that `run_task` is running here, for a function that wants to know its attempt."""
    return _current.get()


def run_task(
    func: Callable[..., Any] | str,
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
    """Take tasks of a pool, call `func`, commit what it returns; whether there was any.

    `func(definition, **kwargs)` for `before_status` waiting, `func(result, **kwargs)` for
    part_done; a dotted name will do. If it has a parameter `run` and an earlier attempt had a run,
    it gets that run's ids. Ends when nothing could be taken for `idle_timeout` seconds (None: when
    nothing is left to take, and others run nothing that may come back), or after `max_tasks`.
    `force_release` gives each task a process of its own.

    A thread renews the lease while `func` gives signs of life (`qtorch.core.heartbeat.beat`, as
    every training does): after `hang_after` seconds without one it is interrupted, which counts as
    its error; what cannot be interrupted loses its lease. None: for a `func` that gives no signs.
    An error of `func` counts for its task and the next one is taken; a definition that names what
    is not trusted, or what there is not, fails at once. SIGTERM, SIGUSR1 and Ctrl-C give the task
    back uncounted and end the loop; a second Ctrl-C ends at once. Where the lease was lost, `func`
    is interrupted and nothing is committed.

    Answers to qlib/workflow/task/manage.py.
    """
    manager = TaskManager(task_pool, url, lease=lease)
    work = _Work(manager, func, before_status, after_status, kwargs, force_release, hang_after)
    count, idle_since, pause = 0, time.monotonic(), IDLE_PAUSES[0]
    with Signals() as signals:
        try:
            while max_tasks is None or count < max_tasks:
                signals.raise_if_received()
                task = manager.fetch_task(query, before_status)
                if task is not None:
                    count += 1
                    work.attempt(task, signals)
                    idle_since, pause = time.monotonic(), IDLE_PAUSES[0]
                elif work.is_over(query, idle_timeout, time.monotonic() - idle_since):
                    break
                else:
                    time.sleep(pause * random.uniform(0.7, 1.0))
                    pause = min(pause * 1.5, IDLE_PAUSES[1])
        finally:
            work.close()
            manager.close()
    return count > 0


class Signals:
    """Inside the block SIGINT and a scheduler's notice interrupt the work on a task, and only that.

    The first is noted: in the work it raises KeyboardInterrupt, between two tasks the loop ends by
    itself. A Ctrl-C after it raises KeyboardInterrupt wherever it comes. `interrupt` (from a
    thread) stops the work as Ctrl-C would. In another thread than the main one nothing is changed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.working = False
        self._lost = False
        self._before: dict[int, Any] = {}
        self._installed = False

    def __enter__(self) -> Signals:
        noted.clear()
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            for number in STOPS:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def interrupt(self) -> None:
        """Stop the work in the main thread, for its result is not wanted any more."""
        main = threading.main_thread().ident
        if self._installed and self.working and main is not None:
            self._lost = True
            signal.pthread_kill(main, signal.SIGINT)

    def settled(self) -> None:
        """The work has ended, or was stopped."""
        self.working = self._lost = False

    def raise_if_received(self) -> None:
        """End the loop by what was received: KeyboardInterrupt, or SystemExit for a notice."""
        if self.received in NOTICES:
            raise SystemExit(128 + self.received)
        if self.received is not None:
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._lost:
            self._lost = False
            if self.working:
                raise KeyboardInterrupt("the lease is lost")
            return
        again = self.received is not None
        if again and number in NOTICES:
            return
        self.received = noted.asked = number
        if again or self.working:
            raise KeyboardInterrupt
        log.warning("%s: ending after this step", signal.Signals(number).name)


class _Work:
    """What is done with each task."""

    def __init__(
        self,
        manager: TaskManager,
        func: Callable[..., Any] | str,
        before: str,
        after: str,
        arguments: Mapping[str, Any],
        force_release: bool,
        hang_after: float | None,
    ) -> None:
        if before not in (WAITING, PART_DONE):
            raise ConfigError(
                f"run_task takes tasks that are waiting or part_done; got {before!r}."
            )
        if check_status(after) in (RUNNING, FAILED):
            raise ConfigError(f"a task that was run becomes part_done or done; got {after!r}.")
        if hang_after is not None and hang_after <= 0:
            raise ConfigError(f"hang_after is a number of seconds above 0; got {hang_after!r}.")
        self.manager, self.before, self.after = manager, before, after
        self.hang_after = hang_after
        self.function = locate(func) if isinstance(func, str) else func
        self.arguments = dict(arguments)
        signature = inspect.signature(self.function)
        check_arguments(self.function, signature, self.arguments)
        self.takes_run = "run" in signature.parameters and "run" not in self.arguments
        self.released_name = dotted_name(self.function) if force_release else None
        self.children = Children([self.released_name] if self.released_name else [])

    def is_over(self, query: Query | None, idle_timeout: float | None, idle: float) -> bool:
        """Whether a worker that found nothing to take for `idle` seconds ends."""
        if idle_timeout is not None:
            return idle >= idle_timeout
        stat = self.manager.task_stat(query)  # what runs elsewhere may come back
        return not stat.get(self.before) and not stat.get(RUNNING)

    def close(self) -> None:
        """End the processes of `force_release`."""
        self.children.close()

    def attempt(self, task: Task, signals: Signals) -> None:
        """Run one task and tell the pool how it ended."""
        log.info("task %s, attempt %d", task["_id"], task["attempt"])
        try:
            check_config(task["def"])
        except QtorchError as error:
            self._failed(task, error, final=True)
            return
        with LeaseKeeper(
            self.manager, task, signals.interrupt, hang_after=self.hang_after
        ) as keeper:
            try:
                with listening(keeper.beat):
                    signals.working = True
                    result = self._called(task, keeper)
                    signals.working = False
            except BaseException as error:
                signals.working = False
                self._ended(task, keeper, error, signals)
            else:
                self._commit(task, result)
        signals.settled()

    def _called(self, task: Task, keeper: LeaseKeeper) -> Any:
        first = task["def"] if self.before == WAITING else task["res"]
        options = dict(self.arguments)
        if self.takes_run and task["run"]:
            options["run"] = task["run"]
        if self.released_name is None:
            mark = _current.set(task)
            try:
                return self.function(first, **options)
            finally:
                _current.reset(mark)
        return call_released(self.children, self.released_name, task, self.before, options, keeper)

    def _commit(self, task: Task, result: Any) -> None:
        try:
            self.manager.commit_task_res(task, result, self.after)
        except TaskResultError as error:
            self._failed(task, error, final=False)
        except LeaseLost as error:
            log.warning("%s", error)

    def _ended(
        self, task: Task, keeper: LeaseKeeper, error: BaseException, signals: Signals
    ) -> None:
        """The work raised. What ends the process is raised again."""
        stopping = not isinstance(error, Exception)
        if isinstance(error, SystemExit) and signals.received is None:
            stopping = False  # the task's own, not somebody's wish that the worker ends
        if keeper.lost.is_set():
            log.warning("task %s was stopped: its lease is lost", task["_id"])
            signals.raise_if_received()
        elif keeper.hung.is_set():
            text = f"no sign of life for {self.hang_after:g} s (hang_after)"
            log.error("task %s was stopped: %s", task["_id"], text)
            where = "".join(traceback.format_exception(error))
            self.manager.return_task(task, self.before, error=text, traceback=where)
            signals.raise_if_received()
        elif stopping or isinstance(error, ForkError):  # the latter no fault of the task
            log.warning("task %s goes back to the pool", task["_id"])
            self.manager.return_task(task, self.before, preempted=True)
            signals.raise_if_received()
            raise error
        else:
            self._failed(task, error, final=isinstance(error, TrustError))

    def _failed(self, task: Task, error: BaseException, *, final: bool) -> None:
        log.error("task %s failed: %s", task["_id"], error, exc_info=None if final else error)
        if final:
            self.manager.fail_task(task, error)
        else:
            text = getattr(error, "traceback_text", None)
            self.manager.return_task(task, self.before, error=error, traceback=text)
