"""Convert the rows of a store to tasks; another program may have written anything into them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from qtorch.core.errors import TaskDefinitionError
from qtorch.task.definition import (
    Task,
    decode_definition,
    decode_mapping,
    decode_result,
    restore_recorders,
)
from qtorch.task.stores.base import FAILED, Row, check_status


def row_to_task(row: Row, *, load_recorders: bool, strict: bool = True) -> Task:
    """Convert a row to a Task; with `load_recorders` runs in its result become Recorders.

    An invalid column raises TaskDefinitionError if `strict`. Otherwise its value is replaced by
    its text, by 0 or by None, and the task's error says what is wrong, unless it has an error
    already.
    """
    task, problems = Task(_id=row["id"]), []
    for column, (read, replace) in COLUMNS.items():
        key = "def" if column == "definition" else column
        try:
            task[key] = read(row[column])
        except ValueError as error:
            task[key] = replace(row[column])
            problems.append(f"the stored {column} is invalid: {error}; replace or remove the task.")
    if problems and strict:
        raise TaskDefinitionError(problems[0])
    if problems:
        task["error"] = task["error"] or problems[0]
    if load_recorders:
        task["res"] = restore_recorders(task["res"])
    return task


def _read_count(value: Any) -> int:
    """Return a whole number, also if another program has stored it as a float."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value != int(value):
        raise ValueError(f"it is {_shorten(value)}, not a whole number")
    return int(value)


def _read_time(value: Any) -> float | None:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(f"it is {_shorten(value)}, not a time")
    return float(value)


def _read_text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"it is {_shorten(value)}, not text")
    return value


def _read_optional_mapping(value: Any) -> dict[str, Any] | None:
    return None if value is None else decode_mapping(value)


def _zero(value: Any) -> int:
    return 0


def _none(value: Any) -> None:
    return None


def _unknown_status(value: Any) -> str:
    return FAILED


def _shorten(value: Any) -> str:
    return f"{value!r:.60}"


# How each column is read, and what replaces an invalid value.
COLUMNS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "definition": (decode_definition, str),
    "res": (decode_result, str),
    "status": (check_status, _unknown_status),
    **dict.fromkeys(("priority", "attempt", "errors", "lost", "preemptions"), (_read_count, _zero)),
    **dict.fromkeys(("deadline", "created", "updated"), (_read_time, _none)),
    **dict.fromkeys(("error", "traceback"), (_read_text, str)),
    **dict.fromkeys(("worker", "run", "progress"), (_read_optional_mapping, _none)),
}
