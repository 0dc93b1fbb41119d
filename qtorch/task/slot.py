"""One place of a worker: a thread that takes tasks from the pool, a process that does them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtorch.core.errors import LeaseLost, TaskError
from qtorch.task.definition import RECORDER, Task
from qtorch.task.forked import ForkError
from qtorch.task.lease import LeaseKeeper
from qtorch.task.manager import TaskManager
from qtorch.task.process import FENCE, SIGNAL_SECONDS, ChildProcess, Children

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2  # between two looks at the child
IDLE_SECONDS = (0.3, 2.0)  # between two looks into an empty pool: the first, the longest


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker works.

    `functions`: for each status that tasks are taken in, in this order, the dotted name of what
    does them. `experiment` and `tracking_uri` say where runs belong, whatever the tasks say (they
    say it in `tracking`, see `qtorch.trainer.prepare`; the pool's name is the last resort).
    `force_release` gives each task a process of its own. Seconds: `lease`; `hang_after` without a
    sign of life a training is ended; `grace` to a training that was asked to stop; `idle_timeout`
    without work the worker ends (None: never). `max_tasks` for all its places together.
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


class Orders:
    """What the places of a worker share: how many tasks may still be taken, when to stop."""

    def __init__(self, max_tasks: int | None) -> None:
        self.ending = False  # take no further task
        self.stop = threading.Event()  # hand the tasks back, keeping checkpoints
        self.hurry = threading.Event()  # ... without waiting for any
        self._left = max_tasks
        self._lock = threading.Lock()
        self.last_work = time.monotonic()

    def take(self) -> bool:
        """Whether one more task may be taken."""
        with self._lock:
            if self._left is None:
                return True
            self._left -= 1
            return self._left >= 0

    def give_back(self) -> None:
        """There was no task to take."""
        with self._lock:
            if self._left is not None:
                self._left += 1


@dataclass
class View:
    """What a place is doing, for a table."""

    name: str
    device: str
    task: Task | None = None
    since: float = 0.0
    progress: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] | None = None
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("done", "failed", "returned", "lost"), 0)
    )


class Slot(threading.Thread):
    """Takes tasks, has its child do them, renews their leases while the child moves.

    Its child is one of `children`; `environment` tells it the device, `output` where it prints.
    """

    def __init__(
        self,
        options: WorkerOptions,
        orders: Orders,
        view: View,
        *,
        worker: str,
        children: Children,
        environment: Mapping[str, str],
        output: Path | None = None,
    ) -> None:
        super().__init__(name=view.name, daemon=True)
        self.options, self.orders, self.view = options, orders, view
        self.children = children
        self.worker, self.environment, self.output = worker, environment, output
        self.child: ChildProcess | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Until there is nothing more to do, or a stop is ordered."""
        try:
            self._work()
        except TaskError as error:
            self.error = error
            log.error("%s ends: %s", self.name, error)
        except BaseException as error:
            self.error = error
            log.exception("%s ends", self.name)
        finally:
            self._drop_child()

    def ping(self) -> None:
        """Tell the child that its supervisor lives; called by the main thread."""
        child = self.child
        if child is not None:
            child.ping()

    def _work(self) -> None:
        manager = TaskManager(self.options.pool, self.options.url, lease=self.options.lease)
        pause = IDLE_SECONDS[0]
        while not self.orders.ending:
            if not self.orders.take():
                return
            taken = self._fetch(manager)
            if taken is None:
                self.orders.give_back()
                if self._idle_for_long():
                    return
                self.orders.stop.wait(pause)
                pause = min(pause * 1.5, IDLE_SECONDS[1])
                continue
            pause = IDLE_SECONDS[0]
            outcome = self._execute(manager, *taken)
            self.orders.last_work = time.monotonic()
            if outcome.get("interrupted"):  # perhaps by a signal that has yet to come here
                self.orders.stop.wait(SIGNAL_SECONDS)

    def _idle_for_long(self) -> bool:
        limit = self.options.idle_timeout
        return limit is not None and time.monotonic() - self.orders.last_work >= limit

    def _fetch(self, manager: TaskManager) -> tuple[Task, str] | None:
        """A task and the status that it was taken in."""
        for status in self.options.functions:
            try:
                task = manager.fetch_task(
                    self.options.query, status, worker=self.worker, decode=False
                )
            except TaskError as error:
                log.error("%s: %s", self.name, error)
                return None
            if task is not None:
                return task, status
        return None

    # -- one task ------------------------------------------------------------------------------

    def _execute(self, manager: TaskManager, task: Task, status: str) -> dict[str, Any]:
        self.view.task, self.view.since = task, time.monotonic()
        self.view.progress, self.view.run = {"stage": "starting"}, task.get("run")
        log.info("%s takes task %s (attempt %s)", self.name, task["_id"], task["attempt"])
        try:
            with LeaseKeeper(manager, task, hang_after=self.options.hang_after) as lease:
                outcome = self._watched(task, status, lease)
                self._settle(manager, task, status, outcome, lease)
                return outcome
        finally:
            self.view.task = None

    def _watched(self, task: Task, status: str, lease: LeaseKeeper) -> dict[str, Any]:
        """The child's answer; a second child's where the first was not to be had."""
        outcome = self._answer(task, status, lease)
        if "unbegun" in outcome:
            log.warning("%s: %s; once more", self.name, outcome["unbegun"])
            outcome = self._answer(task, status, lease)
        return {"unusable": outcome["unbegun"]} if "unbegun" in outcome else outcome

    def _answer(self, task: Task, status: str, lease: LeaseKeeper) -> dict[str, Any]:
        """The child's answer; or `died`, `hung`, `interrupted`, `lost` where it gives none.

        A child that ends before its work has begun is `unusable`, which is no fault of the task;
        one that was never begun, or lost with what it was forked from, is `unbegun`.
        """
        try:
            child = self._ready_child()
        except ForkError as error:
            return {"unbegun": str(error)}

        def over() -> bool:
            return self.orders.stop.is_set() or lease.lost.is_set()

        child.say(self._request(task, status), self.options.hang_after, over)
        sign, stopped, ready = time.monotonic(), None, False
        while True:
            messages = child.messages(LOOK_SECONDS)
            now = time.monotonic()
            if messages is None:
                told = f"the task's process {child.how_it_ended()}"
                self._drop_child()
                # Before its work began perhaps by a signal that has yet to come here.
                if stopped is not None or (not ready and self.orders.stop.wait(SIGNAL_SECONDS)):
                    return {"interrupted": True}
                if ready:
                    return {"died": told}
                return {"unbegun" if child.without_cause else "unusable": told}
            for message in messages:
                sign, ready = now, ready or "ready" in message
                if not {"beat", "run", "ready"} & message.keys():
                    return message
                self._note(message, lease)
            if lease.lost.is_set():
                self._drop_child(kill=True)
                return {"lost": True}
            if now - sign > self.options.hang_after:
                if not child.begun:
                    child.disown()
                    self._drop_child(kill=True)
                    return {"unbegun": "what starts the tasks' processes does nothing"}
                self._drop_child(kill=True)
                return {"hung": f"no sign of life for {self.options.hang_after:g} s (hang_after)"}
            if stopped is None and self.orders.stop.is_set():
                stopped = now
                child.say({"stop": True})
            late = stopped is not None and now - stopped > self.options.grace
            if late or self.orders.hurry.is_set():
                self._drop_child(kill=True)
                return {"interrupted": True}

    def _request(self, task: Task, status: str) -> dict[str, Any]:
        options, definition, run = self.options, task["def"], task.get("run")
        place = definition.get("tracking")
        place = dict(place) if isinstance(place, Mapping) else {}
        named = options.experiment or place.get("experiment_name") or options.pool
        begun = task["res"] if status == TaskManager.STATUS_PART_DONE else None
        if options.tracking_uri:
            if place:
                definition = {**definition, "tracking": {**place, "uri": options.tracking_uri}}
            run = run and {**run, "tracking_uri": options.tracking_uri}
            if isinstance(begun, Mapping) and RECORDER in begun:
                begun = {RECORDER: {**begun[RECORDER], "tracking_uri": options.tracking_uri}}
        return {
            "func": options.functions[status],
            "definition": definition,
            "res": begun,
            "options": {"experiment_name": named, "run": run},
            "last": options.force_release,
        }

    def _note(self, message: Mapping[str, Any], lease: LeaseKeeper) -> None:
        if "run" in message:
            self.view.run = dict(message["run"])
            lease.note_run(self.view.run)
        elif "beat" in message:
            # A new stage keeps what is known of the training: its epoch, its metrics.
            self.view.progress = {**self.view.progress, **message["beat"]}
            lease.note(self.view.progress)

    def _settle(
        self,
        manager: TaskManager,
        task: Task,
        status: str,
        outcome: Mapping[str, Any],
        lease: LeaseKeeper,
    ) -> None:
        """Tell the pool how it ended; `returned` is what others may take again."""
        view, name = self.view, f"task {task['_id']}"
        try:
            if outcome.get("lost"):
                raise LeaseLost("its lease ran out meanwhile")
            if "result" in outcome:
                self._patiently(lambda: manager.commit_task_res(task, outcome["result"]), lease)
                view.counts["done"] += 1
                log.info("%s: %s is done", self.name, name)
            elif outcome.get("interrupted"):
                _held(manager.return_task(task, status, preempted=True))
                view.counts["returned"] += 1
                log.info("%s: %s goes back to the pool", self.name, name)
            elif "unusable" in outcome:
                manager.return_task(task, status)
                raise TaskError(f"this worker cannot work: {outcome['unusable']}")
            else:
                self._patiently(lambda: self._failed(manager, task, status, outcome), lease)
                view.counts["failed"] += 1
        except LeaseLost as lost:
            view.counts["lost"] += 1
            log.warning("%s: %s is no longer ours, nothing is committed: %s", self.name, name, lost)
        if self.options.force_release or not {"result", "refused"} & outcome.keys():
            self._drop_child()

    def _failed(
        self, manager: TaskManager, task: Task, status: str, outcome: Mapping[str, Any]
    ) -> None:
        if "refused" in outcome:  # no further attempt can mend that
            text = outcome["refused"]
            _held(manager.fail_task(task, text))
        else:
            text = outcome.get("error") or outcome.get("died") or outcome.get("hung")
            trace = outcome.get("traceback")
            _held(manager.return_task(task, status, error=text, traceback=trace))
        log.error("%s: task %s failed: %s", self.name, task["_id"], text)

    def _patiently(self, call: Callable[[], Any], lease: LeaseKeeper) -> None:
        """The call, again while the pool's store is away: what is done must not get lost."""
        while True:
            try:
                call()
                return
            except LeaseLost:
                raise
            except TaskError as error:
                if self.orders.stop.is_set() or lease.lost.is_set():
                    raise
                log.error("%s: %s", self.name, error)

    # -- the child -----------------------------------------------------------------------------

    def _ready_child(self) -> ChildProcess:
        if self.child is None or self.child.messages(0.0) is None:
            self._drop_child()
            silence = FENCE * self.options.lease
            self.child = self.children.start(self.environment, silence, self.output)
        return self.child

    def _drop_child(self, *, kill: bool = False) -> None:
        child, self.child = self.child, None
        if child is not None:
            child.kill() if kill else child.finish()


def _held(told: bool) -> None:
    """LeaseLost where the pool took no word of this worker's on the task."""
    if not told:
        raise LeaseLost("its lease ran out meanwhile")
