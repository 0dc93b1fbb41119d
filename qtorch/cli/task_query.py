"""The words of a query on the command line: `status=failed model=lstm seed=3`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qtorch.cli.task_text import model_of
from qtorch.core.errors import ConfigError
from qtorch.task.definition import Task
from qtorch.task.manager import TaskManager

OWN = ("id", "_id", "status", "model")


def chosen_tasks(manager: TaskManager, words: Sequence[str]) -> list[Task]:
    """The tasks that a query's words name, oldest first; results as they are stored."""
    query, models = _parsed(words)
    tasks = manager.query(query, decode=False)
    return [t for t in tasks if not models or model_of(t["def"]).lower() in models]


def store_query(words: Sequence[str]) -> dict[str, Any] | None:
    """The words as a query of the store; None where that alone cannot tell (model=...)."""
    query, models = _parsed(words)
    return None if models else query


def _parsed(words: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """The store's query, and the models that are asked for (in lower case)."""
    query: dict[str, Any] = {}
    models: set[str] = set()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"{word!r} is no part of a query; expected KEY=VALUE such as status=failed, "
                "id=3,5, model=lstm or seed=3."
            )
        if key == "model":
            models |= {m.strip().lower() for m in text.split(",")}
        elif key in OWN:
            values = [v.strip() for v in text.split(",")]
            query["_id" if key in ("id", "_id") else key] = {"$in": values}
        else:
            query[key] = {"$in": _meanings(text)}
    return query, models


def _meanings(text: str) -> list[Any]:
    """What a value can mean: text, or the number, list, ... that it reads as; `a,b` is either."""
    meanings: list[Any] = []
    for part in [text, *(text.split(",") if text[:1] not in ("[", "{", '"') else [])]:
        for value in (part, _read(part)):
            if not any(type(value) is type(m) and value == m for m in meanings):
                meanings.append(value)
    return meanings


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
