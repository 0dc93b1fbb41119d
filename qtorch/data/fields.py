"""A loader's fields: expressions by group and column."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.expression import reach
from qtorch.data.processor.base import FLAT, Names

POINT_IN_TIME = re.compile(r"\$\$|\bP(Ref)?\s*\(")


def parse_fields(config: Any) -> dict[str, dict[str, str]]:
    """Parse a config into `{group: {column: expression}}`; without groups, the group is ""."""
    if isinstance(config, Mapping):
        if not config:
            raise ConfigError(
                "the loader's config is empty; expected {group: fields} or a list of expressions."
            )
        return {str(g): _parse_group(part, f"group {g!r}") for g, part in config.items()}
    return {FLAT: _parse_group(config, "the config")}


def _parse_group(part: Any, location: str) -> dict[str, str]:
    error_text = (
        f"{location}: expected a list of expressions, or (expressions, names); got {part!r:.80}."
    )
    if isinstance(part, str):
        part = [part]
    if not isinstance(part, Sequence) or not len(part):
        raise ConfigError(error_text)
    if isinstance(part[0], str):
        expressions, names = part, part
    elif len(part) == 2:
        expressions, names = part
    else:
        raise ConfigError(error_text)
    if len(expressions) != len(names):
        raise ConfigError(f"{location}: got {len(expressions)} expressions but {len(names)} names.")
    for expression in expressions:
        if POINT_IN_TIME.search(str(expression)):
            raise DataError(
                f"{expression!r} is a point-in-time field, which qtorch does not support. Pass "
                "such data by date as a column of a DataFrame (StaticDataLoader)."
            )
    fields = dict(zip(map(str, names), map(str, expressions), strict=True))
    if len(fields) < len(names):
        duplicates = pd.Index(names)[pd.Index(names).duplicated()].tolist()[:5]
        raise ConfigError(f"{location}: column names must be unique, got duplicates: {duplicates}.")
    return fields


def select_fields(
    fields: Mapping[str, Mapping[str, str]], columns: Names | None
) -> dict[str, dict[str, str]]:
    """Keep the requested columns, and drop groups without any requested column."""
    if columns is None:
        return {g: dict(f) for g, f in fields.items()}
    selection = {g: {n: f[n] for n in columns[g]} for g, f in fields.items() if g in columns}
    return {g: f for g, f in selection.items() if f}


def max_reach(expressions: Iterable[str]) -> tuple[int | None, int]:
    """Return the largest reach of several expressions, in rows before and after a date.

    None before means the whole history.
    """
    reaches = [reach(e) for e in expressions]
    before = (
        None if any(b is None for b, _ in reaches) else max((b or 0 for b, _ in reaches), default=0)
    )
    return before, max((a for _, a in reaches), default=0)
