"""The data that an expression needs: fields, and numbers of rows before and after a date."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from qtorch.data.expression.operators import get_operators
from qtorch.data.expression.parser import (
    Call,
    Field,
    Node,
    Number,
    Text,
    field_name,
    fold,
    is_cross_section,
    parse,
    walk,
)


def expression_fields(expressions: str | Iterable[str] | Mapping[str, str]) -> tuple[str, ...]:
    """Return the stored fields that the expressions read, without "$", in order of appearance.

    If a mapping is passed, its values are the expressions.
    """
    return tuple(
        dict.fromkeys(n.name for n in _walk_expressions(expressions) if isinstance(n, Field))
    )


def mask_instruments(expressions: str | Iterable[str] | Mapping[str, str]) -> tuple[str, ...]:
    """Return the instruments named by `Mask` in the expressions, as written there."""
    calls = (
        n for n in _walk_expressions(expressions) if isinstance(n, Call) and n.operator == "Mask"
    )
    return tuple(dict.fromkeys(a.value for c in calls for a in c.arguments if isinstance(a, Text)))


def _walk_expressions(expressions: str | Iterable[str] | Mapping[str, str]) -> Iterator[Node]:
    if isinstance(expressions, str):
        expressions = [expressions]
    elif isinstance(expressions, Mapping):
        expressions = expressions.values()
    for expression in expressions:
        yield from walk(parse(expression))


def check_fields(expressions: Iterable[str], stored_names: Sequence[str]) -> None:
    """Raise ExpressionError for a field that is not stored, with the nearest name."""
    for expression in expressions:
        for node in walk(parse(expression)):
            if isinstance(node, Field):
                field_name(node, stored_names)


def reach(expression: str) -> tuple[int | None, int]:
    """Return the numbers of rows `(before, after)` a date that its value depends on.

    None before means all history (EMA, windows of 0). The label `Ref($close,-2)/Ref($close,-1)-1`
    has a reach of (0, 2): its value at t is known only after the close of t + 2.
    """
    before, after = _reach(parse(expression))
    return (None if before is None else max(before, 0)), max(after, 0)


def max_reach(expressions: Iterable[str]) -> tuple[int | None, int]:
    """Return the largest reach of several expressions; (0, 0) without any."""
    return join_reaches(reach(expression) for expression in expressions)


def join_reaches(reaches: Iterable[tuple[int | None, int]]) -> tuple[int | None, int]:
    """Return the largest `(before, after)` of several reaches; None before is the largest."""
    before: int | None = 0
    after = 0
    for back, ahead in reaches:
        before = None if before is None or back is None else max(before, back)
        after = max(after, ahead)
    return before, after


def is_cross_sectional(expressions: Iterable[str]) -> bool:
    """Whether any of the expressions compares the instruments of a day."""
    return any(is_cross_section(node) for text in expressions for node in walk(parse(text)))


_Reach: TypeAlias = tuple[int | None, int]


def _reach(root: Node) -> _Reach:
    """Return the reach with signs: `Ref($close, 3)` needs only row t - 3, which is (3, -3)."""
    return fold(root, _combine_reaches)


def _combine_reaches(node: Node, argument_reaches: tuple[_Reach, ...]) -> _Reach:
    if not isinstance(node, Call):
        return 0, 0
    series_reaches = [
        r
        for a, r in zip(node.arguments, argument_reaches, strict=True)
        if isinstance(a, Field | Call)
    ]
    before: int | None = None
    if all(b is not None for b, _ in series_reaches):
        before = max(b for b, _ in series_reaches if b is not None)
    after = max(a for _, a in series_reaches)
    operator_reach = get_operators()[node.operator].reach
    if operator_reach is None:
        return before, after
    back, ahead = operator_reach(*(a.value for a in node.arguments if isinstance(a, Number)))
    return (None if before is None or back is None else before + back), after + ahead
