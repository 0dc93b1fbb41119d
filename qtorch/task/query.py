"""Queries for tasks: the subset of MongoDB's query language that every store supports.

A query is a mapping; all its conditions must hold. A key is `_id`, `status`, `def` (the whole
definition), or a dotted path in the definition, with or without the prefix `def.` or `filter.`
(Qlib's name). A value must be equal, or is `{"$in": [...]}`. Paths match both forms of a
configuration: `model.class` and `model.kwargs.lr` as well as `model._target_` and `model.lr`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.task.definition import definition_hash, query_token

WAITING, RUNNING, PART_DONE, DONE, FAILED = "waiting", "running", "part_done", "done", "failed"
STATUSES = (WAITING, RUNNING, PART_DONE, DONE, FAILED)
PREFIXES = ("def.", "filter.")
WHOLE_DEFINITION = ("def", "filter")


@dataclass(frozen=True)
class Condition:
    """A parsed query. None is no restriction; an empty tuple matches nothing.

    `tokens` consists of groups; a definition must have at least one token of each group.
    """

    ids: tuple[str, ...] | None = None
    statuses: tuple[str, ...] | None = None
    hashes: tuple[str, ...] | None = None
    tokens: tuple[tuple[str, ...], ...] = ()


def parse_query(query: Mapping[str, Any] | None, status: str | None = None) -> Condition:
    """Parse a query; `status` overrides the query's own status.

    Raises ConfigError for an unsupported operator.
    """
    ids = statuses = hashes = None
    groups = []
    for key, value in (query or {}).items():
        values = _values(key, value)
        if key == "_id":
            ids = tuple(str(v) for v in values)
        elif key == "status":
            statuses = tuple(check_status(v) for v in values)
        elif key in WHOLE_DEFINITION:
            hashes = tuple(definition_hash(v) for v in values)
        else:
            path = next((key[len(p) :] for p in PREFIXES if key.startswith(p)), key)
            groups.append(tuple(query_token(path, v) for v in values))
    if status is not None:
        statuses = (check_status(status),)
    return Condition(ids, statuses, hashes, tuple(groups))


def check_status(status: Any) -> str:
    """Return a status; raise ConfigError, with the nearest name, if it does not exist."""
    if status not in STATUSES:
        raise ConfigError(unknown_name("task status", str(status), STATUSES))
    return str(status)


def _values(key: str, value: Any) -> list[Any]:
    if not isinstance(value, Mapping):
        return [value]
    operators = [k for k in value if str(k).startswith("$")]
    if not operators:
        return [value]
    if operators != ["$in"] or len(value) > 1:
        raise ConfigError(
            f"the query of {key!r} uses {', '.join(sorted(map(str, value)))}; pools support only "
            'equality and {"$in": [...]}.'
        )
    values = value["$in"]
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ConfigError(f"$in of {key!r} needs a list; got {values!r}.")
    return list(values)
