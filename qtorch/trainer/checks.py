"""What a task gets wrong, found before its data are read and before it has a run."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qtorch.core.dates import as_stamp, last_instant
from qtorch.core.errors import ConfigError, DataError, ExpressionError
from qtorch.core.instantiate import (
    check_config,
    fill_placeholder,
    get_callable_kwargs,
    init_instance_by_config,
    resolve_config,
)
from qtorch.core.qlib.notes import Notes
from qtorch.core.qlib.translation import translate_task
from qtorch.core.trust import NAME_KEYS, check_config_trust
from qtorch.data.dataset.reweighter import check_reweighter
from qtorch.data.processor.base import Processor
from qtorch.model.fleet.current import current_fleet
from qtorch.trainer.segments import check_fractions, has_fractions, segment_dates

log = logging.getLogger(__name__)

RECORD_MODULE = "qtorch.record"
OWN_PACKAGE = "qtorch."
PLACEHOLDERS = ("<MODEL>", "<DATASET>", "<PRED>")  # of records, filled in when they run
TRAIN, TEST = "train", "test"
TASK_KEYS = ("model", "dataset", "record", "reweighter", "seed")
SPELLING = 0.8  # difflib's similarity from which another key is taken for a misspelt one
MAX_SEED = 2**63 - 1


def check_task(task: Any, *, check_device: bool = True) -> None:
    """Raise ConfigError (or TrustError) for a task that cannot be trained. Data are not read.

    Checked are the names in the task, the arguments that they take, the settings of the model, the
    dataset and the records (`check_settings`, if they have this method), that each record has the
    record that it needs before it, that the dataset has the segments that model and records need,
    and what the config says of data whose names and dates are known without reading it: the
    instruments, the dates of the segments, the benchmark. `check_device`: this process is the one
    that trains, so that it must have the device and the data. Raises DataError for data that does
    not exist, or that does not have these names and dates.
    """
    task = resolve_config(task)
    if not isinstance(task, Mapping) or any(task.get(k) is None for k in ("model", "dataset")):
        return  # `complete_task` says what is missing
    with _without_warnings():  # they are repeated when the task is carried out
        task = translate_task(fill_paths(task), Notes())  # Qlib's names, by what they are here
        check_config_trust(task)
        _check_keys(task)
        _check_reweighter(task.get("reweighter"))
        _check_seed(task.get("seed"))
        _check_names(task["model"])
        model = build_object(task["model"])
        if not callable(getattr(model, "fit", None)):
            raise ConfigError(f"model is {model!r:.80}; expected a model with a method fit.")
        _check_settings(model, check_device=check_device)
        records = _check_records(task.get("record"))
        _check_segment_names(task["dataset"], [model, *records])
        try:
            _check_data(task["dataset"], task.get("record"), records)
        except DataError as error:
            if check_device or isinstance(error, ExpressionError):
                raise


def fill_paths(task: Any) -> Any:
    """Replace placeholders that are places of the task, `<dataset.kwargs.segments.train.0>`."""
    return fill_placeholder(task, {name: name for name in PLACEHOLDERS})


@contextmanager
def _without_warnings() -> Iterator[None]:
    logger = logging.getLogger("qtorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_settings(part: Any, **options: Any) -> None:
    check_settings = getattr(part, "check_settings", None)
    if callable(check_settings):
        check_settings(**options)


def build_object(config: Any) -> Any:
    """Build the object of a configuration; return a live object unchanged."""
    if isinstance(config, Mapping | str) or hasattr(config, "__fspath__"):
        return init_instance_by_config(config)
    return config


def record_list(records: Any) -> list[Any]:
    """Return a task's records as a list; a single one becomes a list of one."""
    if isinstance(records, bool | int | float):
        raise ConfigError(f"record is {records!r}; expected a list of configurations, or null.")
    return [records] if isinstance(records, Mapping | str) else list(records or [])


def segment_names(dataset: Any) -> Collection[str] | None:
    """Return the names of the segments of a dataset or of its configuration; None if unknown."""
    segments = getattr(dataset, "segments", None)
    if isinstance(dataset, Mapping):
        target, arguments = get_callable_kwargs(dataset)
        is_own = str(getattr(target, "__module__", "")).startswith(OWN_PACKAGE)
        segments = arguments.get("segments") if is_own else None  # a user's class may add some
    return list(map(str, segments)) if isinstance(segments, Mapping) else None


def record_class(record: Any) -> Any:
    """Return the class of a task's record; None for a pickle, which is not loaded to find out."""
    if isinstance(record, Path) or (isinstance(record, str) and record.startswith("file:")):
        return None
    return get_callable_kwargs(record, RECORD_MODULE)[0]


def check_segments(dataset: Any, records: Any) -> None:
    """Raise an error before the training instead of after it, if a segment cannot be used.

    That is an empty segment (DataError), a test segment with one instrument per day although a
    record compares the scores of a day (DataError), or with fewer instruments than a record's
    portfolio is to hold (ConfigError). Names of instruments and fields that a record takes are
    checked too, since those of some sources are only known once the data is read (DataError).
    """
    samples = getattr(dataset, "samples", None)
    if not callable(samples):
        return
    _warn_of_earlier_test(getattr(dataset, "segments", {}))
    # The training itself starts with the segment train and checks it.
    for name in (n for n in getattr(dataset, "segments", {}) if n != TRAIN):
        segment = samples(name, data_key="infer")
        if name != TEST:
            continue
        num_instruments = int(segment.instrument.unique().numel())
        for record in record_list(records):
            cls = record_class(record)
            if getattr(cls, "needs_cross_section", False) and segment.max_samples_per_day == 1:
                raise DataError(
                    f"the segment {name!r} has only one instrument per day, but {cls.__name__} "
                    "compares the instruments of a day: use a universe of several instruments, or "
                    "train without this record (record=none)."
                )
            if hasattr(cls, "check_universe"):
                build_object(_with_module(record)).check_universe(num_instruments)
    built_records = [
        build_object(_with_module(record))
        for record in record_list(records)
        if hasattr(record_class(record), "check_names")
    ]
    _check_record_names(built_records, dataset, is_loaded=True)


def _warn_of_earlier_test(segments: Mapping[str, Any]) -> None:
    (train_start, _), (_, test_end) = (segments.get(name, (None, None)) for name in (TRAIN, TEST))
    if train_start is None or test_end is None:
        return
    if last_instant(test_end) < as_stamp(train_start):
        log.warning(
            "the test segment (to %s) is before the train segment (from %s): the model is tested "
            "on days that came before what it has learned.",
            test_end,
            train_start,
        )


def _check_names(config: Any) -> None:
    """Check the names in a nested configuration and the arguments that they take."""
    if isinstance(config, list | tuple):
        for part in config:
            _check_names(part)
    if not isinstance(config, Mapping):
        return
    name = next((config[key] for key in NAME_KEYS if isinstance(config.get(key), str)), None)
    path = f"{config.get('module_path') or ''}.{name}".lstrip(".")
    # The module of a bare name is known to its constructor only.
    if name is not None and "." in path:
        check_config(config)
    for part in config.values():
        _check_names(part)


def _check_seed(seed: Any) -> None:
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise ConfigError(f"seed is {seed!r}; expected a whole number of at least 0, or null.")
    if seed is not None and seed > MAX_SEED:
        raise ConfigError(f"seed is {seed}; expected at most {MAX_SEED}, which torch can take.")


def _check_keys(task: Mapping[str, Any]) -> None:
    """Raise ConfigError for a misspelt key, which nothing would read; notes of a user stay."""
    for key in task:
        names = difflib.get_close_matches(str(key), TASK_KEYS, n=1, cutoff=SPELLING)
        if names and key not in TASK_KEYS:
            raise ConfigError(f"unknown key of the task {key!r}. Did you mean {names[0]!r}?")


def _check_reweighter(config: Any) -> None:
    _check_names(config)
    if isinstance(config, Mapping | str | Path):
        if _may_read_data(config):
            return
        config = build_object(config)
    check_reweighter(config)


def _check_segment_names(dataset: Any, parts: Sequence[Any]) -> None:
    """Raise ConfigError if the dataset lacks a segment that the model or a record needs."""
    names = segment_names(dataset)
    for part in parts if names is not None else ():
        check_segment_names = getattr(part, "check_segment_names", None)
        if callable(check_segment_names):
            check_segment_names(names)


def _check_data(config: Any, record_config: Any, records: Sequence[Any]) -> None:
    """Check a dataset's configuration and the names that records take of its data.

    The jobs of a fleet share the check of equal configurations.
    """

    def check() -> None:
        dataset = _check_dataset(config)
        if dataset is not None:
            _check_record_names(records, dataset)

    fleet = current_fleet()
    if fleet is None:
        check()
    else:
        fleet.check_once([config, record_config], check)


def _check_record_names(records: Sequence[Any], dataset: Any, **options: Any) -> None:
    """Raise an error for names that a record takes and the data does not have."""
    for record in records:
        check_names = getattr(record, "check_names", None)
        if callable(check_names):
            check_names(dataset, **options)


def _check_dataset(config: Any) -> Any:
    """Build a configured dataset, which reads no data yet, check its settings and return it.

    One with parts of the user's own is not built, because these may read data at once; None is
    returned.
    """
    _check_names(config)
    if isinstance(config, int | float | list | tuple):
        raise ConfigError(f"dataset is {config!r:.80}; expected a dataset or its configuration.")
    if not isinstance(config, Mapping):
        return None if isinstance(config, str | Path) else config
    if _may_read_data(config):
        return None
    target, arguments = get_callable_kwargs(config)
    segments = arguments.get("segments")
    if isinstance(segments, Mapping) and has_fractions(segments):
        check_fractions(segments)
        arguments["segments"] = {}
    dataset = init_instance_by_config({"_target_": target, **arguments})
    if isinstance(segments, Mapping) and has_fractions(segments):
        calendar = dataset.handler.find_calendar()
        if calendar is not None:
            dataset.config(segments=segment_dates(segments, calendar))
    _check_settings(dataset)
    return dataset


def _may_read_data(config: Any) -> bool:
    """Whether the construction of a configured dataset may already read data.

    Sources, loaders and handlers of qtorch read on first use, and processors never.
    """
    if isinstance(config, Path):
        return True  # a pickle
    if isinstance(config, str):
        return config.startswith("file:")
    if isinstance(config, list | tuple):
        return any(map(_may_read_data, config))
    if not isinstance(config, Mapping):
        return False
    if config.get("init_data"):
        return True
    name = next((config[key] for key in NAME_KEYS if key in config), None)
    path = f"{config.get('module_path') or ''}.{name}".lstrip(".")
    if name is not None and "." in path and not path.startswith(OWN_PACKAGE):
        cls = get_callable_kwargs(config)[0]
        if not (isinstance(cls, type) and issubclass(cls, Processor)):
            return True
    return any(map(_may_read_data, config.values()))


def _check_records(records: Any) -> list[Any]:
    """Check the records of a task, and return those of qtorch, built."""
    earlier_classes: list[Any] = []
    built_records = []
    for record in record_list(records):
        cls = record_class(record)
        if cls is not None:
            check_config(record, RECORD_MODULE)
            _check_dependency(cls, earlier_classes)
            if str(cls.__module__).startswith(OWN_PACKAGE):
                built_records.append(build_object(_with_module(record)))
                _check_settings(built_records[-1])
        earlier_classes.append(cls)
    return built_records


def _check_dependency(cls: Any, earlier_classes: list[Any]) -> None:
    """Raise ConfigError unless the record that a record needs is generated before it.

    A record of a user's own before it may write what it needs.
    """
    needed = getattr(cls, "depend_cls", None)
    if needed is None:
        return
    for earlier in earlier_classes:
        is_own = earlier is None or not str(earlier.__module__).startswith("qtorch.")
        if is_own or (isinstance(earlier, type) and issubclass(earlier, needed)):
            return
    raise ConfigError(
        f"the record {cls.__name__} needs the {needed.__name__} before it: put "
        f"{{_target_: {RECORD_MODULE}.{needed.__name__}, model: <MODEL>, dataset: <DATASET>}} "
        "first in the task's record (record=signal and record=full have it)."
    )


def _with_module(record: Any) -> Any:
    """Return a record's configuration with the import path of its class."""
    target, arguments = get_callable_kwargs(record, RECORD_MODULE)
    return {"_target_": target, "_recursive_": False, **arguments}
