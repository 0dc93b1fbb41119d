"""Parse the task query on the command line: `status=failed model=lstm seed=3`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qtorch.cli.task_text import model_name
from qtorch.core.errors import ConfigError
from qtorch.task.definition import Task
from qtorch.task.manager import TaskManager

TASK_COLUMNS = ("id", "_id", "status", "model")


def select_tasks(manager: TaskManager, words: Sequence[str]) -> list[Task]:
    """Return the tasks that match a query, oldest first, with results as they are stored."""
    query, models = _parse_query(words)
    tasks = manager.query(query, decode=False)
    return [t for t in tasks if not models or model_name(t["def"]).lower() in models]


def store_query(words: Sequence[str]) -> dict[str, Any] | None:
    """Translate the words to a store query; None if the store cannot evaluate it (model=...)."""
    query, models = _parse_query(words)
    return None if models else query


def _parse_query(words: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """Return the store's query, and the requested models in lower case."""
    query: dict[str, Any] = {}
    models: set[str] = set()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"invalid query {word!r}; expected KEY=VALUE such as status=failed, "
                "id=3,5, model=lstm or seed=3."
            )
        if key == "model":
            models |= {m.strip().lower() for m in text.split(",")}
        elif key in TASK_COLUMNS:
            values = [v.strip() for v in text.split(",")]
            query["_id" if key in ("id", "_id") else key] = {"$in": values}
        else:
            query[key] = {"$in": _possible_values(text)}
    return query, models


def _possible_values(text: str) -> list[Any]:
    """Return the possible values of a text: itself, its JSON value, and those of a list `a,b`."""
    possible_values: list[Any] = []
    for part in [text, *(text.split(",") if text[:1] not in ("[", "{", '"') else [])]:
        for value in (part, _parse_json(part)):
            if not any(type(value) is type(m) and value == m for m in possible_values):
                possible_values.append(value)
    return possible_values


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
