"""The report of a probe: one line and one verdict for each question."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

OK, LEAK, WARNING, UNKNOWN, ACCEPTED = "ok", "LEAK", "warning", "not checked", "accepted"
VERDICTS = (OK, LEAK, WARNING, UNKNOWN, ACCEPTED)


@dataclass(frozen=True)
class Line:
    """The verdict on one question: `name` is the part of the data that it is about."""

    name: str
    verdict: str
    detail: str


@dataclass
class ProbeReport:
    """The verdicts of a probe.

    `dates`: the dates after which the data was changed, `methods`: how, `facts`: what was probed,
    by name.
    """

    lines: list[Line]
    dates: list[pd.Timestamp] = field(default_factory=list)
    methods: tuple[str, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def leaks(self) -> list[Line]:
        """The lines whose verdict is a leak."""
        return [line for line in self.lines if line.verdict == LEAK]

    @property
    def has_leak(self) -> bool:
        """Whether any line found a leak."""
        return bool(self.leaks)

    def line(self, name: str) -> Line:
        """Return the line with this name; raise KeyError if there is none."""
        for line in self.lines:
            if line.name == name:
                return line
        raise KeyError(name)

    def summary(self) -> str:
        """Return the result in one sentence."""
        counts = {v: sum(line.verdict == v for line in self.lines) for v in VERDICTS}
        rest = [f"{counts[v]} {v}" for v in VERDICTS[1:] if counts[v] and v != LEAK]
        if not self.has_leak:
            return ", ".join(["no leak found", f"{counts[OK]} ok", *rest])
        names = ", ".join(line.name for line in self.leaks)
        return ", ".join([f"{len(self.leaks)} of {len(self.lines)} lines leak: {names}", *rest])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return {
            "leak": self.has_leak,
            "summary": self.summary(),
            "dates": [date.isoformat() for date in self.dates],
            "methods": list(self.methods),
            "facts": dict(self.facts),
            "lines": [vars(line) for line in self.lines],
        }

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        width = max((len(line.name) for line in self.lines), default=0)
        rows = [f"{each.name:<{width}}  {each.verdict:<11}  {each.detail}" for each in self.lines]
        return "\n".join([*rows, self.summary()])


def accept_lines(lines: Iterable[Line], names: Collection[str]) -> list[Line]:
    """Return the lines; leaks and warnings of these names become accepted."""
    return [
        replace(line, verdict=ACCEPTED)
        if line.name in names and line.verdict in (LEAK, WARNING)
        else line
        for line in lines
    ]
