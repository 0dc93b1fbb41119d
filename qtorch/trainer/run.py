"""One task, one run: log it, fit, save, make its records."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from qtorch.core.errors import ConfigError, DataError
from qtorch.core.heartbeat import beat
from qtorch.core.instantiate import (
    auto_filter_kwargs,
    fill_placeholder,
    flatten_dict,
    get_callable_kwargs,
    init_instance_by_config,
)
from qtorch.core.runtime import seed_everything
from qtorch.core.session import session_context
from qtorch.core.trust import check_config
from qtorch.tracking.errors import NotInStoreError
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.failure import ERROR_TAG, note_started, record_failure
from qtorch.trainer.prepare import complete_task, shown_task, split_place
from qtorch.trainer.provenance import save_environment, sources_of

log = logging.getLogger(__name__)

RECORD_MODULE = "qtorch.record"
TASK = "task"
TRAIN, TEST = "train", "test"
FIT_REPORT = "fit_report"  # epochs, seconds, samples a second: no metrics, for they never repeat


def task_train(
    task: Mapping[str, Any],
    experiment_name: str | None = None,
    recorder_name: str | None = None,
    *,
    run: Mapping[str, Any] | None = None,
    on_fitted: Callable[[Recorder, Any], None] | None = None,
) -> Recorder:
    """Train one task in a run of its own and return the run.

    The run holds the flattened task as params, `task`, the tag `hostname`, the fitted model as
    `params.pkl`, the dataset's configuration as `dataset` (no data), `environment` (what it was
    made with), and what the task's records write. An error marks it FAILED, is stored in it (tag
    `error`, `error.txt`) and raised again; Ctrl-C marks it KILLED. Answers to
    qlib/model/trainer.py.

    `run` (`experiment_id`, `recorder_id`) is the run of an earlier attempt at the same task: the
    training goes on in it, from its last checkpoint; one that is FINISHED is returned as it is.
    A task may say where its run belongs (`tracking`, see `qtorch.trainer.prepare`); arguments win.
    `on_fitted(recorder, dataset)` is called after the training, before the records.
    """
    own, place = split_place(task)
    complete = complete_task(own)
    name = experiment_name or place.get("experiment_name")
    with _store_of(run, place):
        earlier = _earlier_run(run)
        if earlier is not None and earlier.status == Recorder.STATUS_FI:
            note_started(earlier)
            return earlier
        if earlier is not None and own.get("seed") is None:
            complete["seed"] = _drawn_seed(earlier, complete["seed"])
        with R.start(**_begun(earlier, name, recorder_name or place.get("recorder_name"))):
            recorder = R.get_recorder()
            note_started(recorder)
            try:
                if earlier is not None:
                    _forget_failure(recorder)
                _log_task(recorder, complete)
                _execute(recorder, complete, on_fitted=on_fitted)
            except Exception as error:
                record_failure(recorder, error)
                raise
    return recorder


def begin_task_train(
    task: Mapping[str, Any], experiment_name: str | None = None, recorder_name: str | None = None
) -> Recorder:
    """The first step alone: a run that holds the task and waits, SCHEDULED, for the rest."""
    complete, place = split_place(task)
    complete = complete_task(complete)
    with _store_of(None, place):
        R.start_exp(
            experiment_name=experiment_name or place.get("experiment_name"),
            recorder_name=recorder_name or place.get("recorder_name"),
        )
        recorder = R.get_recorder()
        status = Recorder.STATUS_FA
        try:
            note_started(recorder)
            _log_task(recorder, complete)
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
    """Take up the run that `begin_task_train` left (or a killed one) and do the rest in it.

    The run knows its experiment; `experiment_name` is there for Qlib's calls. `run` says that an
    earlier attempt was made: one that is FINISHED is then returned as it is.
    """
    with _store_of({"tracking_uri": getattr(rec, "uri", None)}, {}):
        if run is not None:
            earlier = R.get_recorder(recorder_id=rec.id)
            if earlier.status == Recorder.STATUS_FI:
                note_started(earlier)
                return earlier
        with R.start(experiment_id=rec.experiment_id, recorder_id=rec.id, resume=True):
            recorder = R.get_recorder()
            note_started(recorder)
            try:
                _forget_failure(recorder)
                _execute(recorder, complete_task(recorder.load_object(TASK)), stored=True)
            except Exception as error:
                record_failure(recorder, error)
                raise
    return recorder


def _store_of(
    run: Mapping[str, Any] | None, place: Mapping[str, Any]
) -> AbstractContextManager[None]:
    """The tracking store of an earlier run, else of the task, else the one in force."""
    uri = (run or {}).get("tracking_uri") or place.get("uri")
    return nullcontext() if uri is None else R.uri_context(str(uri))


def _earlier_run(run: Mapping[str, Any] | None) -> Recorder | None:
    """The run of an earlier attempt; None where there was none, or where it is gone."""
    if run is None:
        return None
    try:
        recorder: Recorder = R.get_recorder(recorder_id=str(run["recorder_id"]))
    except NotInStoreError as error:
        log.warning("the run of an earlier attempt is gone, a new one is started: %s", error)
        return None
    if getattr(recorder, "deleted", False):
        log.warning("the run %s of an earlier attempt is deleted: a new one begins", recorder.id)
        return None
    return recorder


def _begun(
    earlier: Recorder | None, experiment_name: str | None, recorder_name: str | None
) -> dict[str, Any]:
    """The arguments of `R.start`: in the run of an earlier attempt, or in a new one."""
    if earlier is None:
        return {"experiment_name": experiment_name, "recorder_name": recorder_name}
    return {
        "experiment_id": earlier.experiment_id,
        "recorder_id": earlier.id,
        "recorder_name": recorder_name,
        "resume": True,
    }


def _drawn_seed(recorder: Recorder, fresh: int) -> int:
    """The seed that an earlier attempt drew: with another one nothing could go on."""
    if TASK not in recorder.list_artifacts():
        return fresh
    return int(recorder.load_object(TASK)["seed"])


def _forget_failure(recorder: Recorder) -> None:
    """The error of the attempt before is no longer this run's."""
    if ERROR_TAG in recorder.list_tags():
        recorder.delete_tags(ERROR_TAG)


def _log_task(recorder: Recorder, task: dict[str, Any]) -> None:
    recorder.log_params(**flatten_dict(shown_task(task)))
    recorder.save_objects(task=task)
    recorder.set_tags(hostname=socket.gethostname())
    recorder.flush()  # a run says what it is, however soon its process is killed


def record_train(
    task: Mapping[str, Any],
    fitted: Recorder,
    experiment_name: str | None = None,
    recorder_name: str | None = None,
    *,
    run: Mapping[str, Any] | None = None,
) -> Recorder:
    """A run of its own for a task that another run has trained already: only the records are made.

    The model, the dataset's learnt state and the history of the training are those of `fitted`,
    which is only read. The caller knows that the two tasks train the same (`core.identity.fit_id`).
    `run`: that of an attempt that was interrupted, which is done again in it.
    """
    complete = complete_task(task)
    model, dataset = (fitted.load_object(n) for n in ("params.pkl", "dataset"))
    earlier = _earlier_run(run)
    with R.start(**_begun(earlier, experiment_name, recorder_name)):
        recorder = R.get_recorder()
        note_started(recorder)
        try:
            if earlier is not None:
                _forget_failure(recorder)
            _log_task(recorder, complete)
            with session_context(seed=complete["seed"]):
                seed_everything(complete["seed"])
                for key in fitted.list_metrics():
                    if "/" in key:  # of the training's epochs; a record's figures have none
                        for step, value in fitted.logged(key).items():
                            recorder.log_batch({key: value}, step=step)
                recorder.save_objects(**{"params.pkl": model})
                if FIT_REPORT in fitted.list_artifacts():
                    recorder.save_objects(**{FIT_REPORT: fitted.load_object(FIT_REPORT)})
                _save_dataset(recorder, dataset)
                make_records(recorder, complete.get("record"), model, dataset)
        except Exception as error:
            record_failure(recorder, error)
            raise
    return recorder


def _execute(
    recorder: Recorder,
    task: dict[str, Any],
    *,
    stored: bool = False,
    on_fitted: Callable[[Recorder, Any], None] | None = None,
) -> None:
    """Fit, save, make the records; the names in a `stored` task pass the trust rule."""
    with session_context(seed=task["seed"]):
        seed_everything(task["seed"])
        if stored:
            check_config(task)
        beat("data")
        sources = sources_of(task)
        model = _built(task["model"])
        dataset = _built(task["dataset"])
        options: dict[str, Any] = {"recorder": recorder}
        if task.get("reweighter") is not None:
            options["reweighter"] = _built(task["reweighter"])
        _check_segments(dataset, task.get("record"))
        auto_filter_kwargs(model.fit)(dataset, **options)
        beat("saving")
        recorder.save_objects(**{"params.pkl": model})
        if getattr(model, "fit_report_", None):
            recorder.save_objects(**{FIT_REPORT: model.fit_report_})
        _save_dataset(recorder, dataset)
        save_environment(recorder, model, dataset, sources)
        if on_fitted is not None:
            on_fitted(recorder, dataset)
        make_records(recorder, task.get("record"), model, dataset)


def _check_segments(dataset: Any, records: Any) -> None:
    """DataError now, and not after the training, for a segment that holds nothing, and for one
    instrument a day where a record compares the scores of a day with each other."""
    samples = getattr(dataset, "samples", None)
    if not callable(samples):
        return
    # The training itself begins with the segment train.
    for name in (n for n in getattr(dataset, "segments", {}) if n != TRAIN):
        alone = samples(name, data_key="infer").most_a_day == 1
        comparing = _comparing(records) if alone and name == TEST else []
        if comparing:
            raise DataError(
                f"every day of the segment {name!r} has one instrument alone, and {comparing[0]} "
                "compares the instruments of a day: judge a universe of several, or train without "
                "this record (record=none)."
            )


def _comparing(records: Any) -> list[str]:
    """The names of the records that compare the scores of a day with each other."""
    listed = [records] if isinstance(records, Mapping | str) else list(records or [])
    named = [r for r in listed if not (isinstance(r, str) and r.startswith("file:"))]
    classes = [
        get_callable_kwargs(r, RECORD_MODULE)[0] if isinstance(r, Mapping | str) else type(r)
        for r in named
    ]
    return [c.__name__ for c in classes if getattr(c, "needs_cross_section", False)]


def _built(config: Any) -> Any:
    """The object of a configuration; a live object of any class is taken as it is."""
    if isinstance(config, Mapping | str) or hasattr(config, "__fspath__"):
        return init_instance_by_config(config)
    return config


def _save_dataset(recorder: Recorder, dataset: Any) -> None:
    """What rebuilds the dataset, without its data: predictions from this run begin with it."""
    if callable(getattr(dataset, "config", None)):
        dataset.config(dump_all=False, recursive=True)
    try:
        recorder.save_objects(dataset=dataset)
    except ConfigError as error:
        log.warning("the dataset is not stored with the run: %s", error)


def make_records(recorder: Recorder, records: Any, model: Any, dataset: Any) -> None:
    """Make a task's `record` of a model and a dataset, in order, in a run."""
    listed = [records] if isinstance(records, Mapping | str) else list(records or [])
    values = {"<MODEL>": model, "<DATASET>": dataset, "<PRED>": "<PRED>"}  # a record's own
    for config in fill_placeholder(listed, values):
        record = init_instance_by_config(
            config,
            default_module=RECORD_MODULE,
            try_kwargs={"model": model, "dataset": dataset, "recorder": recorder},
        )
        log.info("record %s", type(record).__name__)
        beat("record", record=type(record).__name__)
        record.generate()
