"""What a translation of Qlib's names has left out, changed or moved to another part of the task."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("qtorch.qlib")

Part = dict[str, Any]


@dataclass(frozen=True)
class Move:
    """An argument of one part of a task that belongs to another part here.

    `is_needed`: a part that is translated alone lacks it.
    """

    part: str
    path: str
    value: Any
    origin: str
    apply: Callable[[Mapping[str, Any], Mapping[str, Any]], Part]
    is_needed: bool = True

    @property
    def warning(self) -> str:
        """What the user should do where the move is not possible."""
        return f"{self.origin} belongs to the {self.part} here: set {self.path} there"


@dataclass
class Notes:
    """Collects the notes of a translation.

    `ignored`: arguments without a meaning here, and why: `{"n_jobs (LSTM)": reason}`. `changes`:
    sentences about what differs. `warnings`: sentences about what the user should set.
    """

    ignored: dict[str, str] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _moves: list[Move] = field(default_factory=list)

    def ignore(self, argument: str, title: str, reason: str) -> None:
        """Note an argument without a meaning here."""
        self.ignored[f"{argument} ({title})"] = reason

    def change(self, text: str) -> None:
        """Note what differs from Qlib."""
        if text not in self.changes:
            self.changes.append(text)

    def warn(self, text: str) -> None:
        """Note what the user should set."""
        if text not in self.warnings:
            self.warnings.append(text)

    def move(
        self,
        part: str,
        path: str,
        value: Any,
        origin: str,
        apply: Callable[[Mapping[str, Any], Mapping[str, Any]], Part] | None = None,
        is_needed: bool = True,
    ) -> None:
        """Note an argument that belongs to another part of the task.

        `apply(part, task)` returns the part with it; by default it sets `path`.
        """

        def set_value(config: Mapping[str, Any], task: Mapping[str, Any]) -> Part:
            return set_path(config, path, value)

        self._moves.append(Move(part, path, value, origin, apply or set_value, is_needed))

    def take_moves(self) -> list[Move]:
        """Return the moves and forget them."""
        moves, self._moves = self._moves, []
        return moves

    def log_all(self) -> None:
        """Log the notes: what is ignored in one line."""
        for move in self.take_moves():
            if move.is_needed:
                self.warn(move.warning)
        if self.ignored:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.ignored.items())
            log.info("arguments of Qlib's without a meaning here: %s.", reasons)
        for text in self.changes:
            log.info("%s.", text)
        for text in self.warnings:
            log.warning("%s.", text)


def set_path(config: Mapping[str, Any], path: str, value: Any) -> Part:
    """Return a copy of nested mappings in which the value at a dotted path is set.

    A mapping is merged into one that is there already.
    """
    key, _, rest = path.partition(".")
    old = config.get(key)
    if rest:
        value = set_path(old if isinstance(old, Mapping) else {}, rest, value)
    elif isinstance(old, Mapping) and isinstance(value, Mapping) and "_target_" not in value:
        for name, part in value.items():
            old = set_path(old, name, part)
        value = old
    return {**config, key: value}
