"""The task of a workflow in our names, with the data and the region of its settings."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtorch.cli.workflow.file import INIT, SYSTEM, read_workflow
from qtorch.core.errors import ConfigError, QtorchError
from qtorch.core.qlib.notes import Notes
from qtorch.core.qlib.translation import translate_config, translate_task
from qtorch.core.session import set_defaults
from qtorch.core.trust import StoredText, as_stored_text

SOURCE = "qtorch.data.QlibSource"
RECORDS = "qlib.workflow.record_temp"  # the module of a record that is named alone
OWN_CLASSES = "qtorch."
REGION_RECORDS = ("SigAnaRecord", "PortAnaRecord", "MultiPassPortAnaRecord")
_LOCATION = re.compile(r"^((?:task|qlib_init)[\w.\[\]]*): ")


def translate_workflow(
    settings: Mapping[str, Any], task: Mapping[str, Any], notes: Notes | None = None
) -> dict[str, Any]:
    """Return the task of a job of `qtorch run`; the session gets its data folder and its region.

    `settings` are those of the job (conf/run.yaml and the workflow); `task` is their task, of which
    all text is stored text in a resumed sweep. A handler of ours without a source reads the folder
    of qlib_init. Raises ConfigError with the line of the workflow file that is wrong.
    """
    own_notes = Notes() if notes is None else notes
    is_stored = bool(settings["sweep"]["stored"])
    if not is_stored:
        add_folders(settings.get(SYSTEM))
    options = init_options(settings, own_notes)
    if task.get("record"):
        task = {**task, "record": _add_module(task["record"])}
    try:
        translated = translate_task(task, own_notes, "task")
    except QtorchError as error:
        raise _add_place(error, settings) from error
    session = set_defaults(
        provider_uri=options["provider_uri"],
        region=options["region"],
        task_url=options.get("task_url"),
    )
    source = {"_target_": SOURCE, "provider_uri": session.provider_uri}
    translated["dataset"] = _add_source(translated.get("dataset"), source)
    records = translated.get("record") or []
    records = records if isinstance(records, list) else [records]
    translated["record"] = [_complete_record(r, settings, session.region) for r in records]
    if translated.get("seed") is None:
        translated["seed"] = settings["seed"]
    return as_stored_text(translated) if is_stored else translated


def report_notes(settings: Mapping[str, Any]) -> None:
    """Log what is different here from the workflow in Qlib."""
    notes = Notes()
    translate_workflow(settings, settings["task"], notes)
    notes.log_all()


def init_options(settings: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
    """Return what the section qlib_init sets here: provider_uri, region, tracking_uri, task_url."""
    config = {"_target_": "qlib.init", **(settings.get(INIT) or {})}
    try:
        options: dict[str, Any] = translate_config(config, notes, INIT)
    except QtorchError as error:
        raise _add_place(error, settings) from error
    return options


def add_folders(section: Any) -> None:
    """Add the folders of the section `sys` to those in which Python looks for modules."""
    for folder in (section or {}).get("path", ()):
        if isinstance(folder, StoredText):
            raise ConfigError(f"sys: the folder {folder!r} of a stored workflow is not used.")
        if folder not in sys.path:
            sys.path.append(str(folder))


def _add_module(record: Any) -> Any:
    """Add Qlib's module of records to those that are named without a module, as Qlib does."""
    if isinstance(record, list):
        return [_add_module(part) for part in record]
    if isinstance(record, str):
        return record if "." in record else f"{RECORDS}.{record}"
    has_bare_name = isinstance(record, Mapping) and "." not in str(record.get("class", "."))
    if has_bare_name and not record.get("module_path"):
        return {**record, "module_path": RECORDS}
    return record


def _add_source(dataset: Any, source: Mapping[str, Any]) -> Any:
    """Add the data source to a dataset's handler of ours, unless it has one."""
    if not isinstance(dataset, Mapping):
        return dataset
    handler = dataset.get("handler")
    if not isinstance(handler, Mapping) or handler.get("source") is not None:
        return dataset
    if not str(handler.get("_target_", "")).startswith(OWN_CLASSES):
        return dataset
    return {**dataset, "handler": {**handler, "source": dict(source)}}


def _complete_record(record: Any, settings: Mapping[str, Any], region: str) -> Any:
    """Write the region into a record of ours, and Qlib's figures of money if they are wanted."""
    if not isinstance(record, Mapping):
        return record
    name = str(record.get("_target_", "")).rpartition(".")[2]
    if name not in REGION_RECORDS:
        return record
    record = {**record, "region": record.get("region", region)}
    if settings["as_qlib"] and "config" in record:
        config = record["config"]
        backtest = {"as_qlib": True, **config.get("backtest", {})}
        record["config"] = {**config, "backtest": backtest}
    return record


def _add_place(error: QtorchError, settings: Mapping[str, Any]) -> QtorchError:
    """Return the error with the file and line of the workflow that it is about."""
    match, file = _LOCATION.match(str(error)), settings["workflow"]["file"]
    if match is None or file is None or not Path(file).is_file():
        return error
    keys = tuple(int(key) if key.isdigit() else key for key in re.findall(r"[^.\[\]]+", match[1]))
    place = read_workflow(file).find_place(keys)
    return type(error)(f"{place}: {error}")
