"""The syntax tree of an expression: hashable nodes with their position in the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

SYMBOLS = {
    "Add": "+",
    "Sub": "-",
    "Mul": "*",
    "Div": "/",
    "Power": "**",
    "Gt": ">",
    "Ge": ">=",
    "Lt": "<",
    "Le": "<=",
    "Eq": "==",
    "Ne": "!=",
    "And": "&",
    "Or": "|",
}


@dataclass(frozen=True)
class Span:
    """A part of an expression's text, for error messages."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Field:
    """`$close`: a stored field of the bars."""

    name: str
    span: Span = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"${self.name}"


@dataclass(frozen=True)
class Number:
    """A constant. `2` and `2.0` are different nodes because a window must be an integer."""

    value: int | float
    is_integer: bool = field(repr=False)
    span: Span = field(compare=False, repr=False)

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class Text:
    """A quoted name: the instrument of Mask or the field of Feature."""

    value: str
    span: Span = field(compare=False, repr=False)

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class Call:
    """An operator applied to its arguments; `$a + $b` is `Call("Add", ($a, $b))`."""

    operator: str
    arguments: tuple[Node, ...]
    span: Span = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.operator}({','.join(map(str, self.arguments))})"


Node: TypeAlias = Field | Number | Text | Call


def walk(node: Node) -> Iterator[Node]:
    """Yield the node and all its descendants, parents first, in the order of the text."""
    yield node
    if isinstance(node, Call):
        for argument in node.arguments:
            yield from walk(argument)
