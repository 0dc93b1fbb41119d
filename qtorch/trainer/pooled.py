"""Trainers whose tasks go through a pool, where any number of processes may work on them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from qtorch.core.errors import ConfigError, TaskError, TaskTimeout
from qtorch.core.session import session
from qtorch.task.definition import Task as PoolTask
from qtorch.task.definition import encode_definition
from qtorch.task.manager import LEASE_SECONDS, TaskManager
from qtorch.task.run import HANG_SECONDS, run_task
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.base import Task, as_list
from qtorch.trainer.failure import record_failure
from qtorch.trainer.prepare import PLACE, complete_task, split_place
from qtorch.trainer.recorded import TrainerR, TrainFunction, failed_run, warn_of_failures
from qtorch.trainer.run import begin_task_train, end_task_train, task_train

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # until tasks that a dead worker held are looked for again


class TrainerRM(TrainerR):
    """Trains tasks through a pool: here, and by every worker that takes part.

    `task_pool` is the pool's name (by default `experiment_name`), `url` its store, `lease` as of
    TaskManager, `hang_after` as of run_task. With `skip_run_task` this process does none of the
    work: it sends the tasks and waits for workers (`qtorch worker pool=NAME`, or `worker()` in
    another process). `force_release` gives each task done here a process of its own.

    A task that is in the pool already (an equal definition) is not trained again; one without a
    seed gets one that depends on its definition. Tasks that fail are tried again as the pool
    says; the recorders come back in the tasks' order, as of TrainerR. Answers to
    qlib/model/trainer.py.
    """

    TM_ID = "_id in TaskManager"

    def __init__(
        self,
        experiment_name: str | None = None,
        task_pool: str | None = None,
        train_func: TrainFunction = task_train,
        skip_run_task: bool = False,
        default_rec_name: str | None = None,
        *,
        url: str | None = None,
        lease: float = LEASE_SECONDS,
        hang_after: float | None = HANG_SECONDS,
        force_release: bool = False,
    ) -> None:
        super().__init__(experiment_name, train_func, False, default_rec_name)
        self.task_pool, self.url, self.lease = task_pool, url, lease
        self.hang_after = hang_after
        self.skip_run_task, self.force_release = skip_run_task, force_release

    def has_worker(self) -> bool:
        """Whether other processes may take part through `worker`."""
        return True

    def train(
        self,
        tasks: Task | Sequence[Task],
        train_func: TrainFunction | None = None,
        experiment_name: str | None = None,
    ) -> list[Recorder]:
        """Send every task and see it done; the recorders in the tasks' order."""
        name = experiment_name or self.experiment_name
        function = train_func or self.train_func
        return self._train(tasks, function, name, TaskManager.STATUS_DONE)

    def worker(
        self, train_func: TrainFunction | None = None, experiment_name: str | None = None
    ) -> bool:
        """Work on the pool in this process until no task waits; whether there was any."""
        name = experiment_name or self.experiment_name
        return self._run_here(train_func or self.train_func, name, TaskManager.STATUS_WAITING)

    # -- steps ---------------------------------------------------------------------------------

    def manager(self, experiment_name: str | None = None) -> TaskManager:
        """The pool; ConfigError where neither it nor the experiment has a name."""
        pool = self.task_pool or experiment_name or self.experiment_name
        if not pool:
            raise ConfigError(f"{type(self).__name__} needs a task_pool or an experiment_name.")
        return TaskManager(pool, self.url, lease=self.lease)

    def _train(
        self,
        tasks: Task | Sequence[Task],
        function: TrainFunction,
        name: str | None,
        after: str,
        *,
        skip_run_task: bool | None = None,
    ) -> list[Recorder]:
        listed = as_list(tasks, Mapping)
        if not listed:
            return []
        manager = self.manager(name)
        sent = self._sent(manager, listed, name)
        ids = [s for s in sent if isinstance(s, str)]
        before = manager.STATUS_WAITING
        self._see_done(manager, ids, function, name, before, after, skip_run_task=skip_run_task)
        found = self._found(manager, ids, name)
        recorders = [found[s] if isinstance(s, str) else s for s in sent]
        for item, recorder in zip(sent, recorders, strict=True):
            if recorder.status != Recorder.STATUS_FA:
                recorder.set_tags(**{self.STATUS_KEY: self.STATUS_BEGIN, self.TM_ID: item})
        warn_of_failures(recorders)
        return recorders

    def _sent(
        self, manager: TaskManager, tasks: Sequence[Task], name: str | None
    ) -> list[str | Recorder]:
        """The pool's id of each task; for one that is none, a failed run in its place."""
        prepared: list[dict[str, Any] | ConfigError] = []
        for task in tasks:
            try:
                prepared.append(pool_definition(task, name, self.default_rec_name))
            except ConfigError as error:
                prepared.append(error)
        for definition in prepared:
            if not isinstance(definition, ConfigError):
                encode_definition(definition)  # a live object is told before anything is sent
        ids = iter(manager.create_task([d for d in prepared if not isinstance(d, ConfigError)]))
        return [
            failed_run(name, d, self.default_rec_name) if isinstance(d, ConfigError) else next(ids)
            for d in prepared
        ]

    def _see_done(
        self,
        manager: TaskManager,
        ids: Sequence[str],
        function: TrainFunction,
        name: str | None,
        before: str,
        after: str,
        *,
        skip_run_task: bool | None = None,
    ) -> None:
        """Work on the tasks until each has the status `after`; or wait until others did.

        What a worker that dies elsewhere leaves behind is taken over here.
        """
        if not ids:
            return
        query = {"_id": {"$in": list(ids)}}
        finished = {after, manager.STATUS_DONE, manager.STATUS_FAILED}
        skip = self.skip_run_task if skip_run_task is None else skip_run_task
        while True:
            if not skip:
                self._run_here(function, name, before, after, query)
            try:
                manager.wait(query, timeout=None if skip else LOOK_SECONDS, finished=list(finished))
                return
            except TaskTimeout:
                log.debug("others work on what is left")

    def _run_here(
        self,
        function: TrainFunction,
        name: str | None,
        before: str,
        after: str = TaskManager.STATUS_DONE,
        query: Mapping[str, Any] | None = None,
    ) -> bool:
        options: dict[str, Any] = {"experiment_name": name, "recorder_name": self.default_rec_name}
        if before == TaskManager.STATUS_PART_DONE:
            del options["recorder_name"]  # the run has its name
        return run_task(
            function,
            self.manager(name).task_pool,
            query,
            self.force_release,
            before,
            after,
            url=self.url,
            lease=self.lease,
            hang_after=self.hang_after,
            **options,
        )

    def _found(
        self, manager: TaskManager, ids: Sequence[str], name: str | None
    ) -> dict[str, Recorder]:
        """The run of each task; of a failed one the run with its error."""
        listed = manager.query({"_id": {"$in": list(ids)}}, decode=True)
        return {str(t["_id"]): self._recorder(t, name) for t in listed}

    def _recorder(self, task: PoolTask, name: str | None) -> Recorder:
        recorder = task["res"] if isinstance(task["res"], Recorder) else _run_of(task)
        if task["status"] != TaskManager.STATUS_FAILED:
            if recorder is None:
                raise TaskError(
                    f"task {task['_id']} is {task['status']} with {task['res']!r:.80} as its "
                    "result; a trainer's function returns the recorder of its run."
                )
            return recorder
        error = TaskError(str(task["error"]))
        if recorder is None:
            return failed_run(name, error, self.default_rec_name)
        if recorder.status not in (Recorder.STATUS_FI, Recorder.STATUS_FA):
            record_failure(recorder, error)  # its last worker was killed and could not
            recorder.end_run(Recorder.STATUS_FA)
        return recorder


class DelayTrainerRM(TrainerRM):
    """Prepares the runs here in `train`, and has the pool fit them in `end_train`.

    Between the two the tasks are `part_done`, and workers may begin with them at once.
    """

    delay = True

    def __init__(
        self,
        experiment_name: str | None = None,
        task_pool: str | None = None,
        train_func: TrainFunction = begin_task_train,
        end_train_func: TrainFunction = end_task_train,
        skip_run_task: bool = False,
        default_rec_name: str | None = None,
        *,
        url: str | None = None,
        lease: float = LEASE_SECONDS,
        hang_after: float | None = HANG_SECONDS,
        force_release: bool = False,
    ) -> None:
        super().__init__(
            experiment_name,
            task_pool,
            train_func,
            skip_run_task,
            default_rec_name,
            url=url,
            lease=lease,
            hang_after=hang_after,
            force_release=force_release,
        )
        self.end_train_func = end_train_func

    def train(
        self,
        tasks: Task | Sequence[Task],
        train_func: TrainFunction | None = None,
        experiment_name: str | None = None,
    ) -> list[Recorder]:
        """Send every task and prepare its run, in this process."""
        name = experiment_name or self.experiment_name
        function, after = train_func or self.train_func, TaskManager.STATUS_PART_DONE
        return self._train(tasks, function, name, after, skip_run_task=False)

    def end_train(
        self,
        models: Recorder | Sequence[Recorder],
        end_train_func: TrainFunction | None = None,
        experiment_name: str | None = None,
    ) -> list[Recorder]:
        """See every run fitted; the recorders in the order given, failed ones as they are."""
        name = experiment_name or self.experiment_name
        recorders = as_list(models, Recorder)
        if not recorders:
            return []
        manager = self.manager(name)
        ids = [r.list_tags().get(self.TM_ID) for r in recorders]
        known = [i for i in ids if i is not None]
        function, begun = end_train_func or self.end_train_func, manager.STATUS_PART_DONE
        self._see_done(manager, known, function, name, begun, manager.STATUS_DONE)
        found = self._found(manager, known, name)
        ended = [r if i is None else found[i] for r, i in zip(recorders, ids, strict=True)]
        super().end_train(ended)
        warn_of_failures(ended)
        return ended

    def worker(
        self, train_func: TrainFunction | None = None, experiment_name: str | None = None
    ) -> bool:
        """Fit what is prepared, in this process, until nothing is; whether there was anything."""
        name = experiment_name or self.experiment_name
        return self._run_here(train_func or self.end_train_func, name, TaskManager.STATUS_PART_DONE)


def pool_definition(
    task: Mapping[str, Any], experiment_name: str | None, recorder_name: str | None = None
) -> dict[str, Any]:
    """A task as a pool holds it: complete, with where its run belongs.

    Raises ConfigError for a task without model or dataset, TaskDefinitionError for live objects.
    """
    own, place = split_place(task)
    complete = complete_task(own)
    if own.get("seed") is None and session().seed is None:
        # A drawn seed would make each sending another task, and each attempt another training.
        bare = encode_definition({k: v for k, v in complete.items() if k != "seed"})
        complete["seed"] = int(bare.hash[:7], 16)
    uri = R.get_uri()
    defaults = {
        "experiment_name": experiment_name,
        "recorder_name": recorder_name,
        "uri": None if "@" in uri else uri,  # no passwords in a pool
    }
    where = {k: v for k, v in {**defaults, **place}.items() if v is not None}
    return {**complete, PLACE: where} if where else complete


def _run_of(task: PoolTask) -> Recorder | None:
    """The recorder of the run that a task's last attempt has told of."""
    run = task.get("run")
    if not run:
        return None
    with R.uri_context(run.get("tracking_uri") or R.get_uri()):
        recorder: Recorder = R.get_recorder(recorder_id=run["recorder_id"])
    return recorder
