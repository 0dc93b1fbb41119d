"""The small part of MongoDB's query language that pools understand, on every store alike.

A query is a mapping. Keys: `_id`, `status`, `def` (the whole definition), or a dotted path of the
definition, bare or after `def.` or `filter.` (Qlib's name for it). Values: one that must be equal,
or `{"$in": [...]}`. Several keys must all hold. Paths look into both spellings of a configuration:
`model.class` and `model.kwargs.lr` as it was written, `model._target_` and `model.lr` too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.task.definition import hash_of, token

WAITING, RUNNING, PART_DONE, DONE, FAILED = "waiting", "running", "part_done", "done", "failed"
STATUSES = (WAITING, RUNNING, PART_DONE, DONE, FAILED)
PREFIXES = ("def.", "filter.")
WHOLE = ("def", "filter")


@dataclass(frozen=True)
class Condition:
    """A query as the stores read it. None is no restriction; an empty tuple matches nothing.

    `tokens` holds groups: of each group a definition must have at least one.
    """

    ids: tuple[str, ...] | None = None
    statuses: tuple[str, ...] | None = None
    hashes: tuple[str, ...] | None = None
    tokens: tuple[tuple[str, ...], ...] = ()


def parse_query(query: Mapping[str, Any] | None, status: str | None = None) -> Condition:
    """The condition of a query; `status` replaces what the query says of it.

    Raises ConfigError for an operator that there is not.
    """
    ids = statuses = hashes = None
    groups = []
    for key, value in (query or {}).items():
        values = _values(key, value)
        if key == "_id":
            ids = tuple(str(v) for v in values)
        elif key == "status":
            statuses = tuple(check_status(v) for v in values)
        elif key in WHOLE:
            hashes = tuple(hash_of(v) for v in values)
        else:
            path = next((key[len(p) :] for p in PREFIXES if key.startswith(p)), key)
            groups.append(tuple(token(path, v) for v in values))
    if status is not None:
        statuses = (check_status(status),)
    return Condition(ids, statuses, hashes, tuple(groups))


def check_status(status: Any) -> str:
    """ConfigError, with the nearest name, for a status that there is not."""
    if status not in STATUSES:
        raise ConfigError(unknown_name("status of a task", str(status), STATUSES))
    return str(status)


def _values(key: str, value: Any) -> list[Any]:
    if not isinstance(value, Mapping):
        return [value]
    operators = [k for k in value if str(k).startswith("$")]
    if not operators:
        return [value]
    if operators != ["$in"] or len(value) > 1:
        raise ConfigError(
            f"the query of {key!r} uses {', '.join(sorted(map(str, value)))}; pools know equality "
            'and {"$in": [...]} only.'
        )
    listed = value["$in"]
    if isinstance(listed, str) or not isinstance(listed, Iterable):
        raise ConfigError(f"$in of {key!r} takes a list; got {listed!r}.")
    return list(listed)
