"""Train one task in one run: log the task, fit the model, save it, and generate the records."""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from qtorch.core.configured import describe_value
from qtorch.core.errors import ConfigError, DataError, TrackingError, unknown_name_message
from qtorch.core.instantiate import (
    auto_filter_kwargs,
    fill_placeholder,
    flatten_dict,
    init_instance_by_config,
    resolve_config,
)
from qtorch.core.plain import convert_tree
from qtorch.core.qlib.translation import keep_class_form, translate_task
from qtorch.core.runtime import seed_everything
from qtorch.core.secrets import complete_tree, has_mask, redact_tree
from qtorch.core.session import Session, map_paths, resolve_path, session, session_context
from qtorch.model.fleet.current import current_fleet
from qtorch.process.heartbeat import beat
from qtorch.tracking.claims import hold_run
from qtorch.tracking.delivery import send_outbox
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import HOST_TAG, Recorder
from qtorch.tracking.run_description import log_dataset
from qtorch.tracking.store_types import NotInStoreError
from qtorch.trainer.checks import (
    RECORD_MODULE,
    build_object,
    check_segments,
    check_task,
    fill_paths,
    record_list,
)
from qtorch.trainer.failure import ERROR_TAG, announce_run, record_failure
from qtorch.trainer.provenance import (
    DATA_TAG,
    RunInputs,
    collect_inputs,
    refuse_changed_data,
    save_environment,
)
from qtorch.trainer.segments import resolve_segments

log = logging.getLogger(__name__)

REQUIRED_KEYS = ("model", "dataset")
TRACKING_KEY = "tracking"
INPUTS_FIELD = "inputs"
TRACKING_FIELDS = ("experiment_name", "recorder_name", "uri", INPUTS_FIELD)
QLIB_SOURCE = "qtorch.data.source.qlib.QlibSource"
# Arguments of data sources, loaders and extras that are paths on disk.
PATH_ARGUMENTS = {"provider_uri", "path", "universes", "config", "table"}
REGION_RECORDS = {"SigAnaRecord", "PortAnaRecord", "MultiPassPortAnaRecord"}
TASK = "task"
# Epochs, seconds, samples per second. These are no metrics, because they are not reproducible.
FIT_REPORT = "fit_report"


def task_train(
    task_config: Mapping[str, Any],
    experiment_name: str | None = None,
    recorder_name: str | None = None,
    *,
    run: Mapping[str, Any] | None = None,
    on_fitted: Callable[[Recorder, RunInputs], None] | None = None,
    check_first: bool = True,
) -> Recorder:
    """Train one task in a new run and return the run.

    The run contains the flattened task as params, the artifact `task`, the tag `hostname`, the
    fitted model as `params.pkl`, the dataset's configuration as `dataset` (without data),
    `environment` (code, packages, device), and the output of the task's records. An error marks
    the run FAILED, is stored in it (tag `error`, `error.txt`) and is raised again; Ctrl-C marks the
    run KILLED. What a task gets wrong by itself (`check_task`) is raised before there is a run,
    with `check_first=False` in the run. Data that changes while the model is trained is an error.
    Corresponds to qlib/model/trainer.py.

    `run` (`experiment_id`, `recorder_id`) is the run of an earlier attempt at the same task, which
    is resumed from its last checkpoint; a FINISHED run is returned unchanged. If the data, the code
    of the user's modules or qtorch has changed since that attempt, its run is left as it is and a
    new run is started, with a warning. A task can set where its run is stored (`tracking`, see
    `qtorch.trainer.run`); arguments take precedence. `on_fitted(recorder, inputs)` is called after
    the training and before the records.
    """
    bare_task, tracking = split_tracking(task_config)
    if check_first:
        check_task(bare_task)
    complete = complete_task(bare_task)
    name = experiment_name or tracking.get("experiment_name")
    with _tracking_store(run, tracking):
        earlier_run = _earlier_run(run)
        if earlier_run is not None and bare_task.get("seed") is None:
            complete["seed"] = _load_seed(earlier_run, complete["seed"])
        if earlier_run is not None and (changes := _find_changes(earlier_run, complete)):
            log.warning(
                "not using run %s of an earlier attempt, training in a new run: %s",
                earlier_run.id,
                changes,
            )
            earlier_run = None
        if earlier_run is not None and earlier_run.status == Recorder.STATUS_FI:
            announce_run(earlier_run)
            return earlier_run
        recorder_name = recorder_name or tracking.get("recorder_name")
        with open_run(earlier_run, name, recorder_name) as recorder:
            _log_task(recorder, complete)
            _execute(recorder, complete, on_fitted=on_fitted, is_checked=check_first)
    return recorder


# The tasks that this process has begun, by the ID of their run. They need no trust, unlike what is
# read from a store.
_begun_tasks: dict[str | None, dict[str, Any]] = {}


def begin_task_train(
    task_config: Mapping[str, Any],
    experiment_name: str | None = None,
    recorder_name: str | None = None,
) -> Recorder:
    """First phase of training: create a SCHEDULED run that contains the task."""
    bare_task, tracking = split_tracking(task_config)
    check_task(bare_task, check_device=False)  # the second phase may be on another machine
    complete = complete_task(bare_task)
    with _tracking_store(None, tracking):
        R.start_exp(
            experiment_name=experiment_name or tracking.get("experiment_name"),
            recorder_name=recorder_name or tracking.get("recorder_name"),
        )
        recorder = R.get_recorder()
        status = Recorder.STATUS_FA
        try:
            announce_run(recorder)
            _log_task(recorder, complete)
            _begun_tasks[recorder.id] = complete
            status = Recorder.STATUS_S
        except Exception as error:
            record_failure(recorder, error)
            raise
        finally:
            R.end_exp(recorder_status=status)
    return recorder


def end_task_train(
    rec: Recorder,
    experiment_name: str | None = None,
    *,
    run: Mapping[str, Any] | None = None,
) -> Recorder:
    """Second phase of training: resume a run of `begin_task_train` (or a killed run) and finish it.

    The run knows its experiment; `experiment_name` exists only for compatibility with Qlib. `run`
    tells that there was an earlier attempt: if it is FINISHED it is returned unchanged.

    Raises DataError if the data, the code of the user's modules or qtorch has changed since an
    earlier attempt at this run: its metrics and its checkpoint belong to the former data.
    """
    with _tracking_store({"tracking_uri": getattr(rec, "uri", None)}, {}):
        earlier_run = _find_delivered_run(str(rec.id))
        if changes := _find_changes(earlier_run, _begun_tasks.get(rec.id)):
            raise DataError(
                f"cannot continue run {rec.id}: {changes} since its earlier attempt. Train the "
                "task in a new run, or restore the former data and code."
            )
        if run is not None and earlier_run.status == Recorder.STATUS_FI:
            announce_run(earlier_run)
            return earlier_run
        with open_run(rec) as recorder:
            task = _begun_tasks.pop(rec.id, None) or complete_task(recorder.load_object(TASK))
            _execute(recorder, task)
    return recorder


def collect_task_inputs(task: Mapping[str, Any]) -> RunInputs:
    """Collect what the numbers of a complete task depend on now; the data is not loaded."""
    return collect_inputs(task, build_object(task["dataset"]))


def _find_changes(earlier_run: Recorder, task: Mapping[str, Any] | None = None) -> str:
    """Describe which inputs of a task have changed since an earlier attempt; empty if none has.

    `task`: None is the task that the run contains.
    """
    tags = earlier_run.list_tags()
    if DATA_TAG not in tags and not earlier_run.list_metrics():
        return ""  # the attempt did not begin to train
    try:
        inputs = collect_task_inputs(task or complete_task(earlier_run.load_object(TASK)))
    except Exception as error:  # the new attempt raises it again
        log.debug("cannot compare the inputs of run %s: %s", earlier_run.id, error)
        return ""
    return "; ".join(inputs.find_changes(tags))


def reuse_trained_run(
    task: Mapping[str, Any],
    trained_run: Recorder,
    experiment_name: str | None = None,
    recorder_name: str | None = None,
    *,
    run: Mapping[str, Any] | None = None,
) -> Recorder:
    """Create a run for a task from another run with the same training, and generate its records.

    The model, the fitted state of the dataset and the training history are copied from
    `trained_run`, which is only read. The caller must know that both tasks have the same training
    (`core.identity.fit_id`). `run` is the run of an interrupted attempt, which is resumed.
    """
    complete = complete_task(task)
    model, dataset = (trained_run.load_object(n) for n in ("params.pkl", "dataset"))
    with open_run(_earlier_run(run), experiment_name, recorder_name) as recorder:
        _log_task(recorder, complete)
        with session_context(seed=complete["seed"]):
            seed_everything(complete["seed"])
            inputs = collect_inputs(complete, dataset)
            # Metrics per epoch have a slash in their name, those of records do not.
            for key in (k for k in trained_run.list_metrics() if "/" in k):
                for step, value in trained_run.metric_history(key).items():
                    recorder.log_batch({key: value}, step=step)
            recorder.save_objects(**{"params.pkl": model})
            if FIT_REPORT in trained_run.list_artifacts():
                recorder.save_objects(**{FIT_REPORT: trained_run.load_object(FIT_REPORT)})
            _save_dataset(recorder, dataset)
            make_records(recorder, complete.get("record"), model, dataset)
            refuse_changed_data(dataset, inputs)
    return recorder


@contextmanager
def open_run(
    earlier_run: Recorder | None,
    experiment_name: str | None = None,
    recorder_name: str | None = None,
) -> Iterator[Recorder]:
    """Resume the run of an earlier attempt, or start a new one; store an error of the block in it.

    The error of the earlier attempt is removed from the run. The run is held inside the block:
    RunHeldError, and the run is not changed, if another process works on it.
    """
    with ExitStack() as claim:  # it ends after the run: nobody may resume a run that is still open
        if earlier_run is None:
            start = R.start(experiment_name=experiment_name, recorder_name=recorder_name)
        else:
            claim.enter_context(hold_run(str(earlier_run.id), R.get_uri()))
            _reject_finished_run(earlier_run)
            start = R.start(
                experiment_id=earlier_run.experiment_id,
                recorder_id=earlier_run.id,
                recorder_name=recorder_name,
                resume=True,
            )
        with start:
            recorder: Recorder = R.get_recorder()
            if earlier_run is None:
                claim.enter_context(hold_run(str(recorder.id), R.get_uri()))
            announce_run(recorder)
            try:
                if earlier_run is not None and ERROR_TAG in recorder.list_tags():
                    recorder.delete_tags(ERROR_TAG)
                yield recorder
            except Exception as error:
                record_failure(recorder, error)
                raise


def _reject_finished_run(earlier_run: Recorder) -> None:
    """Raise TrackingError if another process finished the run while this one waited for it."""
    status = R.get_recorder(recorder_id=earlier_run.id).status
    if status == Recorder.STATUS_FI != earlier_run.status:
        raise TrackingError(
            f"another process has finished run {earlier_run.id} in the meantime: there is nothing "
            "to resume."
        )


def _tracking_store(
    run: Mapping[str, Any] | None, tracking: Mapping[str, Any]
) -> AbstractContextManager[None]:
    """Switch to the tracking store of an earlier run, else of the task, else keep the current."""
    uri = (run or {}).get("tracking_uri") or tracking.get("uri")
    return nullcontext() if uri is None else R.uri_context(str(uri))


def _earlier_run(run: Mapping[str, Any] | None) -> Recorder | None:
    """The run of an earlier attempt, or None if there was none or it no longer exists."""
    if run is None:
        return None
    try:
        recorder = _find_delivered_run(str(run["recorder_id"]))
    except NotInStoreError as error:
        log.warning("the run of an earlier attempt no longer exists, starting a new run: %s", error)
        return None
    if recorder.is_deleted:
        log.warning("run %s of an earlier attempt is deleted, starting a new run", recorder.id)
        return None
    return recorder


def _find_delivered_run(run_id: str) -> Recorder:
    """Return a run after sending what it left in this machine's outbox: it may be finished."""
    send_outbox(run_id, tracking_uri=R.get_uri())
    recorder: Recorder = R.get_recorder(recorder_id=run_id)
    return recorder


def _load_seed(recorder: Recorder, default_seed: int) -> int:
    """The random seed of an earlier attempt; its checkpoints cannot be resumed with another."""
    if TASK not in recorder.list_artifacts():
        return default_seed
    return int(recorder.load_object(TASK)["seed"])


def _log_task(recorder: Recorder, task: dict[str, Any]) -> None:
    recorder.log_params(**flatten_dict(loggable_task(task)))
    recorder.save_objects(task=redact_tree(task))
    recorder.set_tags(**{HOST_TAG: socket.gethostname()})
    recorder.flush()  # so that even a run killed at once contains its task


def _execute(
    recorder: Recorder,
    task: dict[str, Any],
    *,
    on_fitted: Callable[[Recorder, RunInputs], None] | None = None,
    is_checked: bool = False,
) -> None:
    """Fit the model, save it and generate the records, after `check_task` unless `is_checked`."""
    with session_context(seed=task["seed"]):
        seed_everything(task["seed"])
        if not is_checked:
            check_task(task)
        beat("data")
        model = build_object(task["model"])
        dataset = _build_dataset(task["dataset"])
        inputs = collect_inputs(task, dataset)
        recorder.set_tags(**inputs.tags)
        if inputs.data is not None:
            log_dataset(recorder, dataset, inputs.data)
        options: dict[str, Any] = {"recorder": recorder}
        if task.get("reweighter") is not None:
            options["reweighter"] = build_object(task["reweighter"])
        check_segments(dataset, task.get("record"))
        auto_filter_kwargs(model.fit)(dataset, **options)
        refuse_changed_data(dataset, inputs)
        beat("saving")
        recorder.save_objects(**{"params.pkl": model})
        if getattr(model, "fit_report_", None):
            recorder.save_objects(**{FIT_REPORT: model.fit_report_})
        _save_dataset(recorder, dataset)
        save_environment(recorder, model, inputs)
        if on_fitted is not None:
            on_fitted(recorder, inputs)
        make_records(recorder, task.get("record"), model, dataset)


def _build_dataset(config: Any) -> Any:
    """Build a task's dataset; the tasks of a fleet share that of equal configurations."""
    fleet = current_fleet()
    build = partial(build_object, config)
    return build() if fleet is None else fleet.share_dataset(config, build)


def _save_dataset(recorder: Recorder, dataset: Any) -> None:
    """Save the dataset without its data; predictions with this run rebuild it from there."""
    if callable(getattr(dataset, "config", None)):
        dataset.config(dump_all=False, recursive=True)
    try:
        recorder.save_objects(dataset=dataset)
    except ConfigError as error:
        log.warning("could not save the dataset in the run: %s", error)


def make_records(recorder: Recorder, records: Any, model: Any, dataset: Any) -> None:
    """Generate a task's records in order, in a run."""
    # Records resolve <PRED> themselves.
    values = {"<MODEL>": model, "<DATASET>": dataset, "<PRED>": "<PRED>"}
    for config in fill_placeholder(record_list(records), values):
        record = init_instance_by_config(
            config,
            default_module=RECORD_MODULE,
            try_kwargs={"model": model, "dataset": dataset, "recorder": recorder},
        )
        log.info("generating record %s", type(record).__name__)
        beat("record", record=type(record).__name__)
        record.generate()


# -- tasks as data ------------------------------------------------------------------------------


def complete_task(task: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a task, in our names, and write the defaults of this process into it.

    Seed: the task's, else the session's, else a random one (so that the run can be repeated).
    Data source: a handler configured without one gets the session's `provider_uri`. Region: records
    that use one get the session's, so that a worker on another machine uses it too. URLs that were
    stored without their secrets are completed. Segments: fractions become dates. Placeholders that
    are paths, such as `<dataset.kwargs.segments.train.0>`, are filled in. Raises ConfigError
    for a task without model or dataset, and for a URL that cannot be completed.
    """
    task = complete_tree(resolve_config(task))
    if not isinstance(task, Mapping):
        raise ConfigError(
            f"a task must be a dict with {', '.join(REQUIRED_KEYS)} and record, got "
            f"{type(task).__name__}."
        )
    for key in REQUIRED_KEYS:
        if task.get(key) is None:
            message = f"the task has no {key!r}; its keys are {sorted(task)}."
            for other in task:
                if other not in (*REQUIRED_KEYS, "record", "reweighter", "seed"):
                    message += f" {unknown_name_message('task key', other, REQUIRED_KEYS)}"
                    break
            raise ConfigError(message)
    task = fill_paths(task)
    complete = translate_task(task)
    for key in REQUIRED_KEYS:
        complete[key] = keep_class_form(task[key], complete[key])
    if complete.get("seed") is None:
        session_seed = session().seed
        complete["seed"] = secrets.randbelow(2**31) if session_seed is None else session_seed
    complete["dataset"] = _resolve_source(complete["dataset"])
    complete["model"] = _resolve_weights(complete["model"])
    complete = resolve_segments(complete)
    if complete.get("record") and session().region != Session.region:
        complete["record"] = _with_region(complete["record"], session().region)
    convert_tree(complete, _check_url, "task")
    return complete


def _check_url(value: Any, location: str) -> Any:
    if isinstance(value, str) and has_mask(value):
        raise ConfigError(
            f"{location} is {value}, stored without its password: set an environment variable (of "
            "any name) to the complete URL."
        )
    return value


def split_tracking(task: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """Split a task into the task without `tracking`, and `tracking`: where its run is stored.

    `tracking` is `{"experiment_name", "recorder_name", "uri", "inputs"}`, each optional. A trainer
    with a task pool writes it, so that a worker in another folder stores the run in the trainer's
    experiment. `inputs` identifies the data and code at the time of submission, so that the task of
    changed data is another one. It does not influence the training, so the run's params and its
    artifact `task` do not contain it.
    """
    if not isinstance(task, Mapping) or TRACKING_KEY not in task:
        return task, {}
    tracking = task[TRACKING_KEY] or {}
    keys = tracking if isinstance(tracking, Mapping) else [TRACKING_KEY]
    for key in keys:
        if key not in TRACKING_FIELDS:
            subject = f"key of a task's {TRACKING_KEY!r}"
            raise ConfigError(unknown_name_message(subject, str(key), TRACKING_FIELDS))
    return {k: v for k, v in task.items() if k != TRACKING_KEY}, tracking


def loggable_task(task: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a task to plain data for the run's params; live objects become configurations."""
    params: dict[str, Any] = describe_value(task)
    return params


def _resolve_source(dataset: Any) -> Any:
    """Make the data in a dataset's configuration independent of the working folder.

    A handler without a source gets the session's; relative paths become absolute.
    """
    if not isinstance(dataset, Mapping):
        return dataset
    if "extras" in _options(dataset):
        dataset = _set_option(dataset, "extras", _resolve_paths(_options(dataset)["extras"]))
    handler = _options(dataset).get("handler")
    if not isinstance(handler, Mapping):
        return dataset
    for key in ("source", "data_loader"):
        if isinstance(_options(handler).get(key), Mapping):
            handler = _set_option(handler, key, _resolve_paths(_options(handler)[key]))
    options = _options(handler)
    if options.get("source") is None and options.get("data_loader") is None:
        provider = session().provider_uri
        if provider:
            provider = map_paths(lambda path: str(resolve_path(path)), provider)
            source = {"_target_": QLIB_SOURCE, "provider_uri": provider}
            handler = _set_option(handler, "source", source)
    return _set_option(dataset, "handler", handler)


def _resolve_weights(model: Any) -> Any:
    """Make the file of a model's initial weights independent of the working folder."""
    if not isinstance(model, Mapping):
        return model
    kind, prefix, path = str(_options(model).get("init_from")).partition("file:")
    if kind or not prefix:
        return model
    return _set_option(model, "init_from", f"{prefix}{resolve_path(path)}")


def _resolve_paths(config: Any, key: str = "") -> Any:
    """Make the paths in a configuration absolute: those of the arguments PATH_ARGUMENTS.

    `config` of a loader may be something else than a path, unless there is such a file.
    """
    if isinstance(config, Mapping):
        return {k: _resolve_paths(v, k if k in PATH_ARGUMENTS else key) for k, v in config.items()}
    if not isinstance(config, str | Path) or key not in PATH_ARGUMENTS:
        return config
    path = resolve_path(config)
    return config if key == "config" and not path.exists() else str(path)


def _with_region(records: Any, region: str) -> Any:
    """Write the region into the configurations of records that have none of their own."""
    if isinstance(records, list | tuple):
        return [_with_region(record, region) for record in records]
    if not isinstance(records, Mapping) or "region" in _options(records):
        return records
    name = str(records.get("_target_", records.get("class", ""))).rpartition(".")[2]
    return _set_option(records, "region", region) if name in REGION_RECORDS else records


def _options(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a configuration in either form (`_target_`, or `class` with `kwargs`)."""
    options = config if "_target_" in config else config.get("kwargs") or {}
    return options if isinstance(options, Mapping) else {}


def _set_option(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    if "_target_" in config:
        return {**config, key: value}
    return {**config, "kwargs": {**(config.get("kwargs") or {}), key: value}}
