"""TaskManager: a pool of tasks that any number of processes on any machines share."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from qtorch.core.errors import (
    ConfigError,
    LeaseLost,
    TaskDefinitionError,
    TaskError,
    TaskResultError,
    TaskStoreError,
    TaskTimeout,
    check_name,
    format_count,
)
from qtorch.core.plain import resolve_config
from qtorch.core.secrets import check_complete
from qtorch.process.heartbeat import RUN
from qtorch.process.lease import RenewalThread
from qtorch.task.definition import Definition, Task, encode_definition, encode_result
from qtorch.task.pool import URL_VARIABLE, Pool, default_url, error_columns
from qtorch.task.rows import row_to_task
from qtorch.task.stores.base import (
    DONE,
    FAILED,
    PART_DONE,
    RUNNING,
    WAITING,
    Change,
    Condition,
    StoreFileLost,
    ValueTooLarge,
    check_status,
    open_store,
    parse_query,
    retry_while_unavailable,
)
from qtorch.tracking.store_types import NotInStoreError

log = logging.getLogger(__name__)

Ids = list[str]  # inside TaskManager, `list` is a method
Query = Mapping[str, Any]

LEASE_SECONDS = 60.0
PATIENCE_SECONDS = 600.0
RESET_VALUES = {"errors": 0, "lost": 0, "error": None, "traceback": None}
RECLAIM_SECONDS = 0.5  # between two searches for expired leases while other tasks are waiting
MAX_LISTED = 10  # tasks named in a timeout error


class WaitResult(dict[str, int]):
    """The number of tasks per status; `failed_tasks` contains the failed tasks."""

    def __init__(self, stat: Mapping[str, int], failed_tasks: Sequence[Task] = ()) -> None:
        super().__init__(stat)
        self.failed_tasks = list(failed_tasks)


class TaskManager:
    """A pool of tasks in a store that many processes share.

    `url` is one of `qtorch.task.stores.base.URL_FORMS`; None is `default_url()`.
    Fetching a task claims it with a lease of `lease` seconds (by the store's clock), which the
    worker renews every `renew_every` seconds (`renew`). If the lease expires, the next worker that
    fetches can claim the task, and a commit of the former worker is rejected (LeaseLost). A task
    gets the status failed after `max_errors` errors or `max_lost` lost leases. While the store is
    unavailable, each call is retried for `patience` seconds, then raises TaskStoreError.

    Several threads may share a manager. Corresponds to qlib/workflow/task/manage.py.
    """

    STATUS_WAITING = WAITING
    STATUS_RUNNING = RUNNING
    STATUS_PART_DONE = PART_DONE
    STATUS_DONE = DONE
    STATUS_FAILED = FAILED

    def __init__(
        self,
        task_pool: str,
        url: str | None = None,
        *,
        lease: float = LEASE_SECONDS,
        renew_every: float | None = None,
        max_errors: int = 3,
        max_lost: int = 20,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        if not task_pool or not isinstance(task_pool, str):
            raise ConfigError(
                f"the name of a task pool must be a string that is not empty; got {task_pool!r}."
            )
        if lease <= 0:
            raise ConfigError(f"lease must be a number of seconds above 0; got {lease!r}.")
        self.task_pool = task_pool
        self.url = check_complete(
            url or default_url(), f"{URL_VARIABLE} or url", error=TaskStoreError
        )
        self.lease = float(lease)
        self.renew_every = self.lease / 12 if renew_every is None else float(renew_every)
        self.max_errors = max_errors
        self._pool = Pool(
            task_pool, self.url, lease=self.lease, max_lost=max_lost, patience=patience
        )

    def __repr__(self) -> str:
        return f"TaskManager({self.task_pool!r})"

    def close(self) -> None:
        """Close the connections to the store; the next call opens it again."""
        self._pool.close()

    # -- definitions and queries ---------------------------------------------------------------

    @staticmethod
    def list(url: str | None = None) -> list[str]:
        """Return the names of the pools in a store."""
        store = retry_while_unavailable(
            lambda: open_store(url or default_url()), patience=10, action="list pools"
        )
        try:
            return retry_while_unavailable(store.pools, patience=10, action="list pools")
        finally:
            store.close()

    def create_task(
        self, task_def_l: Sequence[Mapping[str, Any]], dry_run: bool = False, print_nt: bool = False
    ) -> Ids:
        """Create tasks for new definitions; return the ids of all `task_def_l`, in their order.

        Equal definitions share one task, even if several processes create them concurrently. With
        `dry_run` nothing is created and, as in Qlib, `[]` is returned; `print_nt` logs the new
        definitions.
        """
        definitions = [encode_definition(d) for d in resolve_config(task_def_l)]
        ids = self._find_ids(definitions)
        new = {d.hash: d for d in definitions if d.hash not in ids}
        log.info("%d task definitions, %d new", len(definitions), len(new))
        if ids:
            self._warn_about_failed_tasks(tuple(ids))
        if print_nt:
            for definition in new.values():
                log.info("new task: %s", definition.text)
        if dry_run:
            return []
        if new:
            with _translate_too_large(TaskDefinitionError):
                self._pool.call(
                    "create tasks", lambda s: s.insert(self.task_pool, list(new.values()))
                )
            ids = self._find_ids(definitions)
        return [ids[d.hash] for d in definitions]

    def insert_task_def(self, task_def: Mapping[str, Any]) -> str:
        """Create one task; return its id (that of an existing task with an equal definition)."""
        return self.create_task([task_def])[0]

    def insert_task(self, task: Mapping[str, Any]) -> str:
        """Create one task from Qlib's form `{"def": definition, ...}`; return its id.

        Beside `def` it may have `status`, which must be waiting, `priority`, and `filter`, Qlib's
        copy of the definition, which is not used. Raises TaskDefinitionError for anything else.
        """
        columns = ("def", "filter", "status", "priority")
        for name in task:
            check_name("column of a new task", name, columns, error=TaskDefinitionError)
        if "def" not in task or task.get("status", WAITING) != WAITING:
            raise TaskDefinitionError(
                f"a new task needs its definition as 'def' and is {WAITING}; got "
                f"{sorted(map(str, task))} and status {task.get('status')!r}. A worker commits its "
                "result; reset_status sets another status."
            )
        task_id = self.insert_task_def(task["def"])
        if "priority" in task:
            self.prioritize({"_id": task_id}, task["priority"])
        return task_id

    def replace_task(self, task: Mapping[str, Any], new_task: Mapping[str, Any]) -> None:
        """Replace the definition of a task and reset the task to waiting.

        A worker that runs the task loses its lease. Raises TaskError if the pool already contains
        `new_task`.
        """
        definition = encode_definition(new_task)
        values = {**RESET_VALUES, "status": WAITING, "res": None, "committed": None, "run": None}
        change = Change({**values, "progress": None})
        try:
            with _translate_too_large(TaskDefinitionError):
                is_replaced = self._pool.call(
                    "replace a task", lambda s: s.redefine(task["_id"], definition, change)
                )
        except ValueError as error:
            if isinstance(error, TaskError):
                raise
            raise TaskError(
                f"cannot replace the definition of task {task['_id']}: {error}, as task "
                f"{self._find_ids([definition]).get(definition.hash)}."
            ) from error
        if not is_replaced:
            raise TaskError(f"pool {self.task_pool!r} has no task {task['_id']}.")

    def query(self, query: Query | None = None, decode: bool = True) -> Iterator[Task]:
        """Return the matching tasks, oldest first.

        With `decode` a run in a result is returned as a Recorder, else as `{"$recorder": ids}`,
        which needs no access to the tracking store. In a task that another program has damaged,
        an invalid definition or result is returned as text, and `error` says what is wrong.
        """
        condition = parse_query(query)
        rows = self._pool.call("query", lambda s: s.find(self.task_pool, condition))
        return (row_to_task(row, load_recorders=decode, strict=False) for row in rows)

    def re_query(self, _id: str, decode: bool = True) -> Task:
        """Return the current state of a task; raise TaskError if there is none with this id."""
        tasks = list(self.query({"_id": _id}, decode=decode))
        if not tasks:
            raise TaskError(f"pool {self.task_pool!r} has no task {_id!r}.")
        return tasks[0]

    def task_stat(self, query: Query | None = None) -> dict[str, int]:
        """Count the matching tasks by status."""
        condition = parse_query(query)
        return self._pool.call("count tasks", lambda s: s.count(self.task_pool, condition))

    def remove(self, query: Query | None = None) -> int:
        """Remove the matching tasks (without a query, all tasks); return their number."""
        condition = parse_query(query)
        return self._pool.call("remove tasks", lambda s: s.delete(self.task_pool, condition))

    def reset_waiting(self, query: Query | None = None) -> int:
        """Reset matching tasks (by default the running ones) to waiting; return their number."""
        query = dict(query or {})
        query.setdefault("status", RUNNING)
        return self.reset_status(query, WAITING)

    def reset_status(self, query: Query | None, status: str) -> int:
        """Set the status of the matching tasks and clear their errors; return their number.

        Workers that run these tasks lose their leases. A task that has a run resumes it.
        """
        condition = parse_query(query)
        change = Change(
            {**RESET_VALUES, "status": _check_new_status(status), "origin": None, "claim": None}
        )
        return self._pool.call(
            "reset tasks", lambda s: s.change_all(self.task_pool, condition, change)
        )

    def prioritize(self, task: Mapping[str, Any], priority: int) -> None:
        """Set the priority of a task; higher priorities are fetched first, the default is 0."""
        condition, change = parse_query({"_id": task["_id"]}), Change({"priority": int(priority)})
        self._pool.call("prioritize", lambda s: s.change_all(self.task_pool, condition, change))

    # -- claims, leases and commits ------------------------------------------------------------

    def fetch_task(
        self,
        query: Query | None = None,
        status: str = WAITING,
        *,
        worker: str | None = None,
        decode: bool = True,
    ) -> Task | None:
        """Claim the matching task with the highest priority, then the oldest; None if none matches.

        A task with an expired lease counts as having its status before the claim. A task with an
        invalid definition or another invalid column, or whose run is gone, is marked as failed, and
        the next one is claimed. `worker` is the name of
        the claiming worker; `decode` as in `query`.
        """
        condition = parse_query(query, status)
        self._pool.reclaim_expired_leases(at_most_every=RECLAIM_SECONDS)
        while True:
            row = self._pool.claim(condition, status, worker)
            if row is None:
                if self._pool.reclaim_expired_leases():
                    continue
                return None
            try:
                return row_to_task(row, load_recorders=decode)
            except (TaskDefinitionError, NotInStoreError) as error:
                self._pool.fail_row(row, error)

    @contextmanager
    def safe_fetch_task(
        self,
        query: Query | None = None,
        status: str = WAITING,
        task_pool: str | None = None,
    ) -> Iterator[Task | None]:
        """Claim a task for a `with` block, in which a thread renews its lease; yield it or None.

        If the block raises, the task is returned to the pool: an exception counts as an error of
        the task, Ctrl-C as a preemption. If the block ends without a commit, the lease expires.
        """
        manager = self if task_pool in (None, self.task_pool) else self._for_pool(str(task_pool))
        task = manager.fetch_task(query, status)
        if task is None:
            yield None
            return
        with LeaseRenewer(manager, task):
            try:
                yield task
            except Exception as error:
                manager.return_task(task, status, error=error)
                raise
            except BaseException:
                manager.return_task(task, status, is_preempted=True)
                raise
            if task["status"] == RUNNING:
                log.warning(
                    "task %s was neither committed nor returned; its lease will expire", task["_id"]
                )

    def task_fetcher_iter(self, query: Query | None = None) -> Iterator[Task]:
        """Yield tasks until none is waiting; each is handled as by `safe_fetch_task`."""
        while True:
            with self.safe_fetch_task(query) as task:
                if task is None:
                    return
                yield task

    def renew(
        self,
        task: Task,
        *,
        progress: Mapping[str, Any] | None = None,
        run: Mapping[str, Any] | None = None,
    ) -> None:
        """Renew the lease of a claimed task; store its progress and its run.

        A later attempt resumes `run` (experiment_id, recorder_id, tracking_uri). Raises LeaseLost
        if the caller no longer holds the lease.
        """
        values: dict[str, Any] = {}
        if progress is not None:
            values["progress"] = encode_result(dict(progress))
        if run is not None:
            task["run"] = dict(run)
            values["run"] = encode_result(dict(run))
        change = Change(values, lease=self.lease)
        with _translate_too_large(TaskResultError):
            self._pool.change_claimed_task(task, change, "renew the lease")

    def commit_task_res(self, task: Task, res: Any, status: str | None = DONE) -> None:
        """Store the result of a claimed task: plain data, or a Recorder (stored as its ids).

        Tuples are read back as lists. Raises LeaseLost, and stores nothing, if the caller no
        longer holds the lease; TaskResultError if the result is not plain data. Committing is
        idempotent.
        """
        new_status = _check_new_status(status or DONE)
        values = {"status": new_status, "res": encode_result(res), "committed": task["attempt"]}
        change = Change({**values, "error": None, "traceback": None})
        with _translate_too_large(TaskResultError):
            self._pool.change_claimed_task(task, change, "commit the result")
        task.update(status=new_status, res=res, error=None, traceback=None, deadline=None)

    def return_task(
        self,
        task: Task,
        status: str | None = WAITING,
        *,
        error: BaseException | str | None = None,
        traceback: str | None = None,
        is_preempted: bool = False,
    ) -> bool:
        """Return a claimed task to the pool; return False if its lease was lost before.

        With `error` it counts as an error of the task; after `max_errors` of them the task is
        failed. `is_preempted` counts as a preemption, which is neither an error nor a lost lease.
        Without both nothing is counted.
        """
        values: dict[str, Any] = {"status": _check_new_status(status or WAITING)}
        steps = {"preemptions": 1} if is_preempted else {}
        if error is not None and not is_preempted:
            values.update(error_columns(error, traceback))
            steps = {"errors": 1}
            if task["errors"] + 1 >= self.max_errors:
                values["status"] = FAILED
        return self._pool.release_task(task, Change(values, steps), "return the task")

    def fail_task(
        self, task: Task, error: BaseException | str, traceback: str | None = None
    ) -> bool:
        """Mark a claimed task as failed, for an error that further attempts cannot fix."""
        values = {"status": FAILED, **error_columns(error, traceback)}
        return self._pool.release_task(task, Change(values, {"errors": 1}), "fail the task")

    def wait(
        self,
        query: Query | None = None,
        *,
        timeout: float | None = None,
        poll: float = 0.25,
        on_progress: Callable[[dict[str, int]], None] | None = None,
        final_statuses: Sequence[str] = (DONE, FAILED),
    ) -> WaitResult:
        """Wait until all matching tasks are done or failed; return the number per status.

        Waiting runs no tasks: other processes must do that. It returns the tasks of dead workers
        to the pool. `on_progress` is called with the counts whenever they change. Failed tasks are
        logged and returned in `.failed_tasks` of the result. Raises TaskTimeout after `timeout`
        seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        previous_stat: dict[str, int] | None = None
        while True:
            self.reclaim_expired_leases()
            stat = self.task_stat(query)
            num_unfinished = sum(n for status, n in stat.items() if status not in final_statuses)
            if previous_stat is None and num_unfinished:
                log.info("waiting for tasks of pool %r: %s", self.task_pool, stat)
            if stat != previous_stat and on_progress is not None:
                on_progress(dict(stat))
            previous_stat = stat
            if not num_unfinished:
                return self._build_wait_result(stat, query)
            if end is not None and time.monotonic() >= end:
                raise self._build_timeout_error(float(timeout or 0), query, final_statuses)
            time.sleep(poll if end is None else max(0.0, min(poll, end - time.monotonic())))

    def _build_wait_result(self, stat: Mapping[str, int], query: Query | None) -> WaitResult:
        if not stat.get(FAILED):
            return WaitResult(stat)
        failed_tasks = [t for t in self.query(query, decode=False) if t["status"] == FAILED]
        lines = "".join(f"\n  task {t['_id']}: {t['error']}" for t in failed_tasks)
        log.warning("%d of %d tasks failed:%s", len(failed_tasks), sum(stat.values()), lines)
        return WaitResult(stat, failed_tasks)

    def _build_timeout_error(
        self, timeout: float, query: Query | None, final_statuses: Sequence[str]
    ) -> TaskTimeout:
        tasks = [t for t in self.query(query, decode=False) if t["status"] not in final_statuses]
        descriptions = [
            f"{t['_id']} ({t['status']}{_host_text(t['worker'])})" for t in tasks[:MAX_LISTED]
        ]
        if len(tasks) > MAX_LISTED:
            descriptions.append(f"and {len(tasks) - MAX_LISTED} more")
        return TaskTimeout(
            f"timeout after {timeout:g} s: {format_count(len(tasks), 'unfinished task')} of pool "
            f"{self.task_pool!r}: {', '.join(descriptions)}. Start workers, or wait longer.",
            [t["_id"] for t in tasks],
        )

    def reclaim_expired_leases(self) -> int:
        """Return tasks with an expired lease to the pool (or fail them); return their number."""
        return self._pool.reclaim_expired_leases()

    # -- internals -----------------------------------------------------------------------------

    def _warn_about_failed_tasks(self, hashes: tuple[str, ...]) -> None:
        condition = Condition(hashes=hashes, statuses=(FAILED,))
        stat = self._pool.call("count tasks", lambda s: s.count(self.task_pool, condition))
        if stat:
            log.warning(
                "pool %r already contains %s of these with status failed; to run them again, use "
                "`reset_status(query, 'waiting')` or `qtorch tasks retry`",
                self.task_pool,
                format_count(stat[FAILED], "task"),
            )

    def _find_ids(self, definitions: Sequence[Definition]) -> dict[str, str]:
        hashes = [d.hash for d in definitions]
        return self._pool.call("find tasks", lambda s: s.find_ids(self.task_pool, hashes))

    def _for_pool(self, task_pool: str) -> TaskManager:
        return TaskManager(
            task_pool,
            self.url,
            lease=self.lease,
            renew_every=self.renew_every,
            max_errors=self.max_errors,
            max_lost=self._pool.max_lost,
            patience=self._pool.patience,
        )


@contextmanager
def _translate_too_large(error_class: type[TaskError]) -> Iterator[None]:
    """Raise an error of this class if the store cannot hold the value that the block stores."""
    try:
        yield
    except ValueTooLarge as error:
        raise error_class(
            f"{error} Store large values in a run (recorder.save_objects) or a file, and refer to "
            "them."
        ) from error


def _host_text(worker: Mapping[str, Any] | None) -> str:
    return f" on {worker.get('host')}" if worker else ""


def _check_new_status(status: str) -> str:
    """Return a status that can be set; raise ConfigError for running, which needs a lease."""
    if check_status(status) == RUNNING:
        raise ConfigError(
            "the status cannot be set to running: a task is running only after a worker fetches it."
        )
    return status


class LeaseRenewer(RenewalThread):
    """Context manager in which a thread renews the task's lease; sets `lease_lost` if that fails.

    `report_progress` is sent with the next renewal, `report_run` immediately; both are signs of
    life. With `hang_after`, work without a sign of life for that many seconds counts as hung:
    `work_hung` is set and the lease is no longer renewed, so that it expires even if nothing can
    interrupt the work. `on_end` is called (in the thread) if the lease is lost or the work hangs.
    """

    join_seconds = 1.0  # do not wait for a thread that waits for the store

    def __init__(
        self,
        manager: TaskManager,
        task: Task,
        on_end: Callable[[], None] | None = None,
        *,
        hang_after: float | None = None,
    ) -> None:
        super().__init__(self._renew_task, manager.renew_every, f"lease of task {task['_id']}")
        self.manager, self.task, self.on_end, self.hang_after = manager, task, on_end, hang_after
        self.lease_lost, self.work_hung = threading.Event(), threading.Event()
        self._last_sign = time.monotonic()
        self._lock = threading.Lock()
        self._progress: dict[str, Any] | None = None
        self._run: dict[str, Any] | None = None

    def report_progress(self, progress: Mapping[str, Any]) -> None:
        """Store progress with the next renewal."""
        with self._lock:
            self._progress, self._last_sign = dict(progress), time.monotonic()

    def report_run(self, run: Mapping[str, Any]) -> None:
        """Store the task's run immediately; a later attempt resumes it."""
        with self._lock:
            self._run, self._last_sign = dict(run), time.monotonic()
        self.wake()

    def beat(self, stage: str, details: Mapping[str, Any]) -> None:
        """Report a heartbeat (a listener of `qtorch.process.heartbeat`)."""
        if stage == RUN:
            self.report_run({"tracking_uri": None, **details})
        else:
            self.report_progress({"stage": stage, **details})

    def _pause_seconds(self) -> float:
        return max(0.0, min(super()._pause_seconds(), self._seconds_until_hung()))

    def _seconds_until_hung(self) -> float:
        """Return the seconds until work without a further sign of life counts as hung."""
        if self.hang_after is None:
            return math.inf
        with self._lock:
            return self._last_sign + self.hang_after - time.monotonic()

    def _renew_task(self) -> bool:
        """Renew the lease with what was reported; return False if it must not be renewed again."""
        if self._seconds_until_hung() <= 0:
            self._end_work(self.work_hung)
            return False
        with self._lock:
            progress, run = self._progress, self._run
            self._progress = self._run = None
        try:
            try:
                self.manager.renew(self.task, progress=progress, run=run)
            except TaskResultError as error:
                log.warning("task %s: cannot store its progress: %s", self.task["_id"], error)
                self.manager.renew(self.task, run=run)
        except LeaseLost as error:
            # After a commit or return of the task the lease is gone, but not lost.
            if not self.is_stopping and not self.task.is_settling:
                log.warning("%s", error)
                self._end_work(self.lease_lost)
            return False
        except StoreFileLost as error:
            log.error("%s", error)
            self._end_work(self.lease_lost)
            return False
        return True

    def _end_work(self, reason: threading.Event) -> None:
        reason.set()
        if self.on_end is not None:
            self.on_end()
