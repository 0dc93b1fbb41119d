"""The task pool: hundreds of trainings handed to any number of processes on any machines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from qtorch.core.errors import ConfigError, TaskDefinitionError, TaskError
from qtorch.core.wording import counted
from qtorch.task.definition import Definition, Task, encode_definition, encode_result
from qtorch.task.lease import LeaseKeeper
from qtorch.task.pool import Pool, default_url, open_store, task_of, told
from qtorch.task.query import (
    DONE,
    FAILED,
    PART_DONE,
    RUNNING,
    WAITING,
    Condition,
    check_status,
    parse_query,
)
from qtorch.task.store import Change, retrying
from qtorch.task.waiting import WaitResult, wait_for

log = logging.getLogger(__name__)

Ids = list[str]  # in the class, `list` is a method
Query = Mapping[str, Any]

LEASE_SECONDS = 60.0
PATIENCE_SECONDS = 600.0
FRESH = {"errors": 0, "lost": 0, "error": None, "traceback": None}
SWEEP_SECONDS = 0.5  # between two looks for lost leases while other tasks wait


class TaskManager:
    """One pool of tasks in a store that many processes share.

    `url` is sqlite:///FILE, postgresql+psycopg://... or mongodb://...; None is `default_url()`.
    A fetched task is lent for `lease` seconds of the store's clock, and whoever works on it renews
    (`renew`, every `renew_every` seconds); one whose lease has run out is taken again by whoever
    fetches next, and what its former worker then commits is refused (LeaseLost). A task that
    failed `max_errors` times, or lost `max_lost` leases, is failed. While the store is away, each
    call waits and tries again for `patience` seconds, then raises TaskStoreError.

    One manager may serve several threads. Answers to qlib/workflow/task/manage.py.
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
            raise ConfigError(f"a task pool has a name; got {task_pool!r}.")
        if lease <= 0:
            raise ConfigError(f"a lease is a number of seconds above 0; got {lease!r}.")
        self.task_pool = task_pool
        self.url = url or default_url()
        self.lease = float(lease)
        self.renew_every = self.lease / 12 if renew_every is None else float(renew_every)
        self.max_errors = max_errors
        self._pool = Pool(
            task_pool, self.url, lease=self.lease, max_lost=max_lost, patience=patience
        )

    def __repr__(self) -> str:
        return f"TaskManager({self.task_pool!r})"

    def close(self) -> None:
        """Give the connections to the store back; the next call opens it again."""
        self._pool.close()

    # What the pool holds

    @staticmethod
    def list(url: str | None = None) -> list[str]:
        """The names of the pools behind a URL."""
        store = retrying(lambda: open_store(url or default_url()), patience=10, what="list pools")
        try:
            return retrying(store.pools, patience=10, what="list pools")
        finally:
            store.close()

    def create_task(
        self, defs: Sequence[Mapping[str, Any]], dry_run: bool = False, print_nt: bool = False
    ) -> Ids:
        """The ids of the tasks with these definitions, in their order; the missing ones are made.

        An equal definition is one task, however many processes create it at once. With `dry_run`
        nothing is made and, as in Qlib, `[]` returned; `print_nt` logs the new ones.
        """
        definitions = [encode_definition(d) for d in defs]
        known = self._ids_of(definitions)
        new = {d.hash: d for d in definitions if d.hash not in known}
        log.info("tasks in all: %d, new ones: %d", len(definitions), len(new))
        if known:
            self._warn_of_failed(tuple(known))
        if print_nt:
            for definition in new.values():
                log.info("new task: %s", definition.text)
        if dry_run:
            return []
        if new:
            self._pool.call("create tasks", lambda s: s.insert(self.task_pool, list(new.values())))
            known = self._ids_of(definitions)
        return [known[d.hash] for d in definitions]

    def insert_task_def(self, task_def: Mapping[str, Any]) -> str:
        """Add one definition; its id (of the old task, where the pool holds an equal one)."""
        return self.create_task([task_def])[0]

    def replace_task(self, task: Mapping[str, Any], new_def: Mapping[str, Any]) -> None:
        """Another definition for a task, which waits again as a fresh one.

        Whoever works on it loses its lease. Raises TaskError where the pool holds `new_def`.
        """
        definition = encode_definition(new_def)
        values = {**FRESH, "status": WAITING, "res": None, "committed": None, "run": None}
        change = Change({**values, "progress": None})
        try:
            found = self._pool.call(
                "replace a task", lambda s: s.redefine(task["_id"], definition, change)
            )
        except ValueError as error:
            if isinstance(error, TaskError):
                raise
            raise TaskError(
                f"task {task['_id']} cannot get this definition: {error}, as task "
                f"{self._ids_of([definition]).get(definition.hash)}."
            ) from error
        if not found:
            raise TaskError(f"pool {self.task_pool!r} has no task {task['_id']}.")

    def query(self, query: Query | None = None, decode: bool = True) -> Iterator[Task]:
        """The tasks that match, oldest first.

        With `decode` a run in a result comes back as a Recorder; without, as `{"$recorder": ids}`,
        which asks no tracking store. A definition that is no JSON comes back as its text.
        """
        condition = parse_query(query)
        rows = self._pool.call("query", lambda s: s.find(self.task_pool, condition))
        return (task_of(row, live=decode, strict=False) for row in rows)

    def re_query(self, _id: str, decode: bool = True) -> Task:
        """The task of an id as it is now; TaskError where there is none."""
        found = list(self.query({"_id": _id}, decode=decode))
        if not found:
            raise TaskError(f"pool {self.task_pool!r} has no task {_id!r}.")
        return found[0]

    def task_stat(self, query: Query | None = None) -> dict[str, int]:
        """How many tasks have which status."""
        condition = parse_query(query)
        return self._pool.call("count tasks", lambda s: s.count(self.task_pool, condition))

    def remove(self, query: Query | None = None) -> int:
        """Remove the tasks that match (every task of the pool without a query); how many."""
        condition = parse_query(query)
        return self._pool.call("remove tasks", lambda s: s.delete(self.task_pool, condition))

    def reset_waiting(self, query: Query | None = None) -> int:
        """Let tasks wait again: those that match, else those that are running; how many."""
        query = dict(query or {})
        query.setdefault("status", RUNNING)
        return self.reset_status(query, WAITING)

    def reset_status(self, query: Query | None, status: str) -> int:
        """Set the status of the tasks that match, and forget their errors; how many.

        Whoever works on one of them loses its lease. A task with a run goes on in that run.
        """
        condition = parse_query(query)
        change = Change({**FRESH, "status": _settled(status), "origin": None, "claim": None})
        return self._pool.call(
            "reset tasks", lambda s: s.change_all(self.task_pool, condition, change)
        )

    def prioritize(self, task: Mapping[str, Any], priority: int) -> None:
        """Set the priority of a task: higher ones are fetched first; 0 is the default."""
        condition, change = parse_query({"_id": task["_id"]}), Change({"priority": int(priority)})
        self._pool.call("prioritize", lambda s: s.change_all(self.task_pool, condition, change))

    # Taking and giving back

    def fetch_task(
        self,
        query: Query | None = None,
        status: str = WAITING,
        *,
        worker: str | None = None,
        decode: bool = True,
    ) -> Task | None:
        """Claim a task: the highest priority first, then the oldest; None where none matches.

        Tasks whose lease has run out count as what they were before it. One whose definition
        cannot be read is failed, with the reason, and the next one taken. `worker` names the
        claimant; `decode` as in `query`.
        """
        condition = parse_query(query, status)
        self._pool.take_back_expired(at_most_every=SWEEP_SECONDS)
        while True:
            row = self._pool.claim(condition, status, worker)
            if row is None:
                if self._pool.take_back_expired():
                    continue
                return None
            try:
                return task_of(row, live=decode)
            except TaskDefinitionError as error:
                self.fail_task(task_of(row, live=False, strict=False), error)

    @contextmanager
    def safe_fetch_task(
        self,
        query: Query | None = None,
        status: str = WAITING,
        task_pool: str | None = None,
    ) -> Iterator[Task | None]:
        """A claimed task for a `with` block, whose lease a thread renews.

        If the block raises, the task is returned: an exception counts as an error of the task,
        Ctrl-C as a preemption. If it ends without a commit, the lease runs out.
        """
        manager = self if task_pool in (None, self.task_pool) else self._of_pool(str(task_pool))
        task = manager.fetch_task(query, status)
        if task is None:
            yield None
            return
        with LeaseKeeper(manager, task):
            try:
                yield task
            except Exception as error:
                manager.return_task(task, status, error=error)
                raise
            except BaseException:
                manager.return_task(task, status, preempted=True)
                raise
            if task["status"] == RUNNING:
                log.warning("task %s was neither committed nor returned", task["_id"])

    def task_fetcher_iter(self, query: Query | None = None) -> Iterator[Task]:
        """Fetch tasks until none waits; each is held as by `safe_fetch_task`."""
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
        """Lend a claimed task for another lease, and tell what its worker is at.

        `run` (experiment_id, recorder_id, tracking_uri) is what a later attempt takes up again.
        Raises LeaseLost where the task is no longer the caller's.
        """
        values: dict[str, Any] = {}
        if progress is not None:
            values["progress"] = encode_result(dict(progress))
        if run is not None:
            task["run"] = dict(run)
            values["run"] = encode_result(dict(run))
        self._pool.change_mine(task, Change(values, lease=self.lease), "renew")

    def commit_task_res(self, task: Task, res: Any, status: str | None = DONE) -> None:
        """Store a result: plain data, or a Recorder (kept as experiment and run id).

        Tuples come back as lists. Raises LeaseLost, and stores nothing, where the task is no
        longer the caller's; TaskResultError for what is no plain data. The same commit sent twice
        is one.
        """
        after = _settled(status or DONE)
        values = {"status": after, "res": encode_result(res), "committed": task["attempt"]}
        self._pool.change_mine(task, Change({**values, "error": None, "traceback": None}), "commit")
        task.update(status=after, res=res, error=None, traceback=None, deadline=None)

    def return_task(
        self,
        task: Task,
        status: str | None = WAITING,
        *,
        error: BaseException | str | None = None,
        traceback: str | None = None,
        preempted: bool = False,
    ) -> bool:
        """Give a claimed task back, to be taken by others; False where it was lost before.

        With `error` it counts as an error of the task, and the last of `max_errors` fails it.
        `preempted` counts as neither error nor lost lease; without both nothing is counted.
        """
        values: dict[str, Any] = {"status": _settled(status or WAITING)}
        steps = {"preemptions": 1} if preempted else {}
        if error is not None and not preempted:
            values.update(told(error, traceback))
            steps = {"errors": 1}
            if task["errors"] + 1 >= self.max_errors:
                values["status"] = FAILED
        return self._pool.give_back(task, Change(values, steps))

    def fail_task(
        self, task: Task, error: BaseException | str, traceback: str | None = None
    ) -> bool:
        """Fail a claimed task at once, for what no further attempt can mend."""
        values = {"status": FAILED, **told(error, traceback)}
        return self._pool.give_back(task, Change(values, {"errors": 1}))

    def wait(
        self,
        query: Query | None = None,
        *,
        timeout: float | None = None,
        poll: float = 0.25,
        on_progress: Callable[[dict[str, int]], None] | None = None,
        finished: Sequence[str] = (DONE, FAILED),
    ) -> WaitResult:
        """Wait until the tasks that match are done or failed; how many are what.

        Somebody must work on them: waiting takes back what dead workers hold, and runs nothing.
        `on_progress` gets the counts whenever they change. Raises TaskTimeout after `timeout`
        seconds; failed tasks are in `.failed` of what is returned, and logged.
        """
        return wait_for(
            self, query, timeout=timeout, poll=poll, on_progress=on_progress, finished=finished
        )

    def take_back_expired(self) -> int:
        """Let tasks whose lease has run out wait again (or fail, by `max_lost`); how many."""
        return self._pool.take_back_expired()

    # Steps

    def _warn_of_failed(self, hashes: tuple[str, ...]) -> None:
        condition = Condition(hashes=hashes, statuses=(FAILED,))
        stat = self._pool.call("count tasks", lambda s: s.count(self.task_pool, condition))
        if stat:
            log.warning(
                "pool %r holds %s of these already, as failed until "
                "`reset_status(query, 'waiting')` or `qtorch tasks retry`",
                self.task_pool,
                counted(stat[FAILED], "task"),
            )

    def _ids_of(self, definitions: Sequence[Definition]) -> dict[str, str]:
        hashes = [d.hash for d in definitions]
        return self._pool.call("look for tasks", lambda s: s.ids(self.task_pool, hashes))

    def _of_pool(self, task_pool: str) -> TaskManager:
        return TaskManager(
            task_pool,
            self.url,
            lease=self.lease,
            renew_every=self.renew_every,
            max_errors=self.max_errors,
            max_lost=self._pool.max_lost,
            patience=self._pool.patience,
        )


def _settled(status: str) -> str:
    """A status that a task may be given; ConfigError for running, which needs a lease."""
    if check_status(status) == RUNNING:
        raise ConfigError("a task is running when a worker fetches it; nothing else makes it so.")
    return status
