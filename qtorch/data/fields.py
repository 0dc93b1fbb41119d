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
    """`{group: {column: expression}}` of a loader's config; without groups the group is ""."""
    if isinstance(config, Mapping):
        if not config:
            raise ConfigError("the loader's config names no group of fields.")
        return {str(g): _parse_group(part, f"group {g!r}") for g, part in config.items()}
    return {FLAT: _parse_group(config, "the config")}


def _parse_group(part: Any, where: str) -> dict[str, str]:
    wanted = f"{where}: expected a list of expressions, or (expressions, names); got {part!r:.80}."
    if isinstance(part, str):
        part = [part]
    if not isinstance(part, Sequence) or not len(part):
        raise ConfigError(wanted)
    if isinstance(part[0], str):
        expressions, names = part, part
    elif len(part) == 2:
        expressions, names = part
    else:
        raise ConfigError(wanted)
    if len(expressions) != len(names):
        raise ConfigError(f"{where}: {len(expressions)} expressions have {len(names)} names.")
    for expression in expressions:
        if POINT_IN_TIME.search(str(expression)):
            raise DataError(
                f"{expression!r} is a point-in-time field, which qtorch does not support. Give "
                "such data by date as a column of a DataFrame (StaticDataLoader)."
            )
    fields = dict(zip(map(str, names), map(str, expressions), strict=True))
    if len(fields) < len(names):
        twice = pd.Index(names)[pd.Index(names).duplicated()].tolist()[:5]
        raise ConfigError(f"{where}: each column may stand once; given twice: {twice}.")
    return fields


def narrowed(
    fields: Mapping[str, Mapping[str, str]], columns: Names | None
) -> dict[str, dict[str, str]]:
    """The fields that are wanted; groups of which no column is wanted fall away."""
    if columns is None:
        return {g: dict(f) for g, f in fields.items()}
    wanted = {g: {n: f[n] for n in columns[g]} for g, f in fields.items() if g in columns}
    return {g: f for g, f in wanted.items() if f}


def reach_of(expressions: Iterable[str]) -> tuple[int | None, int]:
    """The largest reach of several expressions."""
    reaches = [reach(e) for e in expressions]
    before = (
        None if any(b is None for b, _ in reaches) else max((b or 0 for b, _ in reaches), default=0)
    )
    return before, max((a for _, a in reaches), default=0)
