"""What an expression needs: its fields, and how many rows before and after a date."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from qtorch.data.expression.block import field_name
from qtorch.data.expression.node import Call, Field, Node, Number, Text, walk
from qtorch.data.expression.operators import known_operators
from qtorch.data.expression.parser import parse


def fields_of(expressions: str | Iterable[str] | Mapping[str, str]) -> tuple[str, ...]:
    """The stored fields that the expressions read, without "$", in the order of the text.

    A mapping's values are its expressions.
    """
    return tuple(dict.fromkeys(n.name for n in _nodes(expressions) if isinstance(n, Field)))


def masked_of(expressions: str | Iterable[str] | Mapping[str, str]) -> tuple[str, ...]:
    """The other instruments that the expressions look at (`Mask`), as they are written there."""
    calls = (n for n in _nodes(expressions) if isinstance(n, Call) and n.operator == "Mask")
    return tuple(dict.fromkeys(a.value for c in calls for a in c.arguments if isinstance(a, Text)))


def _nodes(expressions: str | Iterable[str] | Mapping[str, str]) -> Iterator[Node]:
    if isinstance(expressions, str):
        expressions = [expressions]
    elif isinstance(expressions, Mapping):
        expressions = expressions.values()
    for expression in expressions:
        yield from walk(parse(expression))


def check_fields(expressions: Iterable[str], known: Sequence[str]) -> None:
    """ExpressionError, at its place and with the nearest name, for a field that is not stored."""
    for expression in expressions:
        for node in walk(parse(expression)):
            if isinstance(node, Field):
                field_name(node, known)


def reach(expression: str) -> tuple[int | None, int]:
    """Rows `(before, after)` a date that the value at that date depends on.

    None before means all history (EMA, windows of 0). The label `Ref($close,-2)/Ref($close,-1)-1`
    reaches (0, 2): its value at t is known only after the close of t + 2.
    """
    before, after = _reach(parse(expression))
    return (None if before is None else max(before, 0)), max(after, 0)


def _reach(node: Node) -> tuple[int | None, int]:
    """Signed rows: `Ref($close, 3)` needs row t - 3 alone, which is (3, -3)."""
    if not isinstance(node, Call):
        return 0, 0
    below = [_reach(a) for a in node.arguments if isinstance(a, Field | Call)]
    before: int | None = None
    if all(b is not None for b, _ in below):
        before = max(b for b, _ in below if b is not None)
    after = max(a for _, a in below)
    own = known_operators()[node.operator].reach
    if own is None:
        return before, after
    back, ahead = own(*(a.value for a in node.arguments if isinstance(a, Number)))
    return (None if before is None or back is None else before + back), after + ahead
