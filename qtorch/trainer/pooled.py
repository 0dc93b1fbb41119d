"""Trainers that put their tasks into a task pool, which any number of processes can work on."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from qtorch.core.errors import ConfigError, TaskError, TaskTimeout, join_names
from qtorch.core.secrets import redact_tree
from qtorch.core.session import session
from qtorch.task.definition import Task as PoolTask
from qtorch.task.definition import encode_definition
from qtorch.task.manager import LEASE_SECONDS, TaskManager
from qtorch.task.run import HANG_SECONDS, run_task
from qtorch.tracking.claims import is_run_held
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.failure import record_failure
from qtorch.trainer.run import (
    INPUTS_FIELD,
    TRACKING_KEY,
    begin_task_train,
    collect_task_inputs,
    complete_task,
    end_task_train,
    split_tracking,
    task_train,
)
from qtorch.trainer.trainers import (
    Task,
    TrainerR,
    TrainFunction,
    as_list,
    create_failed_run,
    log_failures,
)

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # how often to look for tasks released by dead workers


class TrainerRM(TrainerR):
    """Trains tasks through a task pool, in this process and in all workers of the pool.

    `task_pool` is the pool's name (default: `experiment_name`), `url` its store; `lease` is passed
    to TaskManager and `hang_after` to run_task. With `skip_run_task` this process trains nothing:
    it submits the tasks and waits for workers (`qtorch worker pool=NAME`, or `worker()` in another
    process). `force_release` runs each of this process's tasks in a separate process.

    A task that is already in the pool (with an equal definition) is not trained again, unless its
    data, the code of the user's modules or qtorch has changed since, or it is done and nobody can
    tell (a dataset without `fingerprint()`, a class without a source file). A task without a seed
    gets one derived from its definition. Failed tasks are retried by the pool's rules; recorders
    are returned in the order of the tasks, as by TrainerR. Corresponds to qlib/model/trainer.py.
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
        super().__init__(experiment_name, train_func, default_rec_name=default_rec_name)
        self.task_pool, self.url, self.lease = task_pool, url, lease
        self.hang_after = hang_after
        self.skip_run_task, self.force_release = skip_run_task, force_release

    def has_worker(self) -> bool:
        """Whether other processes can share the work by calling `worker`."""
        return True

    def train(
        self,
        tasks: Task | Sequence[Task],
        train_func: TrainFunction | None = None,
        experiment_name: str | None = None,
    ) -> list[Recorder]:
        """Submit all tasks, wait until they are done, and return the recorders in task order.

        A delayed trainer only prepares the runs, in this process.
        """
        name = experiment_name or self.experiment_name
        task_list = as_list(tasks, Mapping)
        if not task_list:
            return []
        manager = self.manager(name)
        ids_or_runs = self._submit_tasks(manager, task_list, name)
        ids = [i for i in ids_or_runs if isinstance(i, str)]
        self._complete_tasks(
            manager,
            ids,
            train_func or self.train_func,
            name,
            before=manager.STATUS_WAITING,
            after=manager.STATUS_PART_DONE if self.delay else manager.STATUS_DONE,
            skip_run_task=self.skip_run_task and not self.delay,
        )
        recorders_by_id = self._load_recorders(manager, ids, name)
        recorders = [recorders_by_id[i] if isinstance(i, str) else i for i in ids_or_runs]
        for id, recorder in zip(ids_or_runs, recorders, strict=True):
            # The runs of invalid tasks, which have no ID, are failed.
            if recorder.status != Recorder.STATUS_FA:
                recorder.set_tags(**{self.STATUS_KEY: self.STATUS_BEGIN, self.TM_ID: id})
        log_failures(recorders)
        return recorders

    def worker(
        self, train_func: TrainFunction | None = None, experiment_name: str | None = None
    ) -> bool:
        """Work on the pool in this process until no task is waiting.

        Returns whether there was any task to work on.
        """
        name = experiment_name or self.experiment_name
        return self._run_tasks(train_func or self.train_func, name, TaskManager.STATUS_WAITING)

    # -- steps ---------------------------------------------------------------------------------

    def manager(self, experiment_name: str | None = None) -> TaskManager:
        """Return a manager of the trainer's pool."""
        return TaskManager(self._pool_name(experiment_name), self.url, lease=self.lease)

    def _pool_name(self, experiment_name: str | None) -> str:
        """Return the pool's name; ConfigError if neither the pool nor the experiment is named."""
        pool = self.task_pool or experiment_name or self.experiment_name
        if not pool:
            raise ConfigError(f"{type(self).__name__} needs a task_pool or an experiment_name.")
        return pool

    def _submit_tasks(
        self, manager: TaskManager, tasks: Sequence[Task], name: str | None
    ) -> list[str | Recorder]:
        """Submit the tasks; return the task ID of each, or a failed run for an invalid task."""
        definitions: list[dict[str, Any] | ConfigError] = []
        for task in tasks:
            try:
                definitions.append(pool_definition(task, name, self.default_rec_name))
            except ConfigError as error:
                definitions.append(error)
        valid_definitions = [d for d in definitions if not isinstance(d, ConfigError)]
        for definition in valid_definitions:
            encode_definition(definition)  # raises for live objects before any task is submitted
        ids = iter(_create_tasks(manager, valid_definitions))
        return [
            create_failed_run(name, d, self.default_rec_name)
            if isinstance(d, ConfigError)
            else next(ids)
            for d in definitions
        ]

    def _complete_tasks(
        self,
        manager: TaskManager,
        ids: Sequence[str],
        function: TrainFunction,
        name: str | None,
        *,
        before: str,
        after: str,
        skip_run_task: bool,
    ) -> None:
        """Work on the tasks, or wait for other workers, until each is `after`, done or failed.

        Unless `skip_run_task` is set, this process takes over the tasks of workers that died.
        """
        if not ids:
            return
        query = {"_id": {"$in": list(ids)}}
        # A prepared task (part_done) may be done already: other workers fit it at once.
        final_statuses = {after, manager.STATUS_DONE, manager.STATUS_FAILED}
        while True:
            if not skip_run_task:
                self._run_tasks(function, name, before, after, query)
            try:
                manager.wait(
                    query,
                    timeout=None if skip_run_task else POLL_SECONDS,
                    final_statuses=list(final_statuses),
                )
                return
            except TaskTimeout:
                log.debug("waiting for other workers to finish the remaining tasks")

    def _run_tasks(
        self,
        function: TrainFunction,
        name: str | None,
        before: str,
        after: str = TaskManager.STATUS_DONE,
        query: Mapping[str, Any] | None = None,
    ) -> bool:
        """Run tasks of the status `before` until none is left; return whether there was any."""
        options: dict[str, Any] = {"experiment_name": name, "recorder_name": self.default_rec_name}
        if before == TaskManager.STATUS_PART_DONE:
            del options["recorder_name"]  # the run exists and has a name already
        return run_task(
            function,
            self._pool_name(name),
            query,
            self.force_release,
            before,
            after,
            url=self.url,
            lease=self.lease,
            hang_after=self.hang_after,
            **options,
        )

    def _load_recorders(
        self, manager: TaskManager, ids: Sequence[str], name: str | None
    ) -> dict[str, Recorder]:
        """Load the run of each task by its ID; TaskError if a task was removed from the pool."""
        stored_tasks = manager.query({"_id": {"$in": list(ids)}}, decode=True)
        recorders = {str(t["_id"]): self._load_recorder(t, name) for t in stored_tasks}
        removed_ids = sorted(set(ids) - recorders.keys())
        if removed_ids:
            raise TaskError(
                f"{len(removed_ids)} of {len(set(ids))} tasks are not in the pool "
                f"{manager.task_pool!r} any more: {join_names(removed_ids)}. They were removed "
                "after this trainer had submitted them."
            )
        return recorders

    def _load_recorder(self, task: PoolTask, name: str | None) -> Recorder:
        """Load the run of a task; a failed task has a failed run with its error."""
        recorder = task["res"] if isinstance(task["res"], Recorder) else _load_run(task)
        if task["status"] != TaskManager.STATUS_FAILED:
            if recorder is None:
                raise TaskError(
                    f"task {task['_id']} is {task['status']}, but its result is "
                    f"{task['res']!r:.80}; a training function must return a Recorder."
                )
            return recorder
        error = TaskError(str(task["error"]))
        if recorder is None:
            return create_failed_run(name, error, self.default_rec_name)
        has_ended = recorder.status in (Recorder.STATUS_FI, Recorder.STATUS_FA)
        if not has_ended and not is_run_held(str(recorder.id), recorder.uri):
            record_failure(recorder, error)  # its last worker was killed before it could do so
            recorder.end_run(Recorder.STATUS_FA)
        return recorder


class DelayTrainerRM(TrainerRM):
    """Prepares the runs in this process in `train`; the pool's workers fit them in `end_train`.

    In between the tasks have the status `part_done`, and workers may already start on them.
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

    def end_train(
        self,
        models: Recorder | Sequence[Recorder],
        end_train_func: TrainFunction | None = None,
        experiment_name: str | None = None,
    ) -> list[Recorder]:
        """Wait until all runs are fitted; return the recorders in the same order.

        Failed runs are returned unchanged.
        """
        name = experiment_name or self.experiment_name
        recorders = as_list(models, Recorder)
        if not recorders:
            return []
        manager = self.manager(name)
        ids = [r.list_tags().get(self.TM_ID) for r in recorders]
        task_ids = [i for i in ids if i is not None]
        self._complete_tasks(
            manager,
            task_ids,
            end_train_func or self.end_train_func,
            name,
            before=manager.STATUS_PART_DONE,
            after=manager.STATUS_DONE,
            skip_run_task=self.skip_run_task,
        )
        recorders_by_id = self._load_recorders(manager, task_ids, name)
        results = [
            r if i is None else recorders_by_id[i] for r, i in zip(recorders, ids, strict=True)
        ]
        super().end_train(results)
        log_failures(results)
        return results

    def worker(
        self, train_func: TrainFunction | None = None, experiment_name: str | None = None
    ) -> bool:
        """Fit prepared tasks in this process until none is left; return whether there was any."""
        name = experiment_name or self.experiment_name
        return self._run_tasks(
            train_func or self.end_train_func, name, TaskManager.STATUS_PART_DONE
        )


def pool_definition(
    task: Mapping[str, Any], experiment_name: str | None, recorder_name: str | None = None
) -> dict[str, Any]:
    """Return the definition to store in a pool: complete, with the location and inputs of the run.

    Raises ConfigError for a task without model or dataset, TaskDefinitionError for live objects.
    """
    bare_task, tracking = split_tracking(task)
    complete = redact_tree(complete_task(bare_task))  # workers complete the URLs
    if bare_task.get("seed") is None and session().seed is None:
        # With a random seed, submitting the task again would create a different task. The seed is
        # therefore derived from the definition.
        encoded_definition = encode_definition({k: v for k, v in complete.items() if k != "seed"})
        complete["seed"] = int(encoded_definition.hash[:7], 16)
    defaults = {
        "experiment_name": experiment_name,
        "recorder_name": recorder_name,
        "uri": R.get_uri(),
        INPUTS_FIELD: _identify_inputs(complete),
    }
    location = {k: v for k, v in {**defaults, **tracking}.items() if v is not None}
    return {**complete, TRACKING_KEY: redact_tree(location)} if location else complete


def _identify_inputs(task: Mapping[str, Any]) -> str | None:
    """Identify the data and code of a task, so that changed data makes it another task.

    None if they are not known here, e.g. because only the workers have the data.
    """
    try:
        return collect_task_inputs(task).identity
    except Exception as error:
        log.debug("cannot identify the data of a task: %s", error)
        return None


def _create_tasks(manager: TaskManager, definitions: Sequence[dict[str, Any]]) -> list[str]:
    """Create the tasks that are not in the pool yet, and return the IDs of all.

    A finished task is used again only if its data and code are known to be those of now; else the
    definition becomes another task.
    """
    ids = list(manager.create_task(definitions))
    unidentified = [
        k for k, d in enumerate(definitions) if INPUTS_FIELD not in d.get(TRACKING_KEY, {})
    ]
    query = {"_id": {"$in": [ids[k] for k in unidentified]}, "status": manager.STATUS_DONE}
    done_ids = {t["_id"] for t in manager.query(query, decode=False)} if unidentified else set()
    repeated = [k for k in unidentified if ids[k] in done_ids]
    if not repeated:
        return ids
    log.warning(
        "%d finished tasks of the pool are trained again, because their data or code cannot be "
        "compared (a dataset without fingerprint(), or a class without a source file)",
        len(done_ids),
    )
    submission = uuid.uuid4().hex
    renewed_definitions = [
        {
            **definitions[k],
            TRACKING_KEY: {**definitions[k].get(TRACKING_KEY, {}), INPUTS_FIELD: submission},
        }
        for k in repeated
    ]
    for k, id in zip(repeated, manager.create_task(renewed_definitions), strict=True):
        ids[k] = id
    return ids


def _load_run(task: PoolTask) -> Recorder | None:
    """Return the run that the task's last attempt reported, or None."""
    run = task.get("run")
    if not run:
        return None
    with R.uri_context(run.get("tracking_uri") or R.get_uri()):
        recorder: Recorder = R.get_recorder(recorder_id=run["recorder_id"])
    return recorder
