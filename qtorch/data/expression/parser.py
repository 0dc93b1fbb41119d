"""From an expression's text to its tree, by precedence climbing; nothing is ever evaluated.

The grammar is the part of Python's that Qlib's expressions use, with Python's precedence:
comparison binds weakest, then `|`, `&`, `+ -`, `* /`, unary `- + ~`, `**`. Qlib hands the text to
`eval`; here an unknown name cannot run anything.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from qtorch.core.errors import ExpressionError, unknown_name
from qtorch.data.expression.node import SYMBOLS, Call, Field, Node, Number, Span, Text
from qtorch.data.expression.operators import NOT_SUPPORTED, Kind, Operator, known_operators
from qtorch.data.expression.tokens import Token, error_at, tokenize

_COMPARISON = 1
_LEVELS = {"|": 2, "&": 3, "+": 4, "-": 4, "*": 5, "/": 5}
_LEVELS |= dict.fromkeys(("<", "<=", ">", ">=", "==", "!="), _COMPARISON)
_UNARY = 6
_NAMES = {symbol: name for name, symbol in SYMBOLS.items()}
_CONSTANT: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": operator.truediv,
    "Power": lambda a, b: a**b if abs(b) <= 64 else float(a) ** b,
}
_WORDS = {"and": "&", "or": "|", "not": "~"}
_DEEPEST = 100


def parse(text: str) -> Node:
    """The tree of an expression.

    Raises ExpressionError, with a caret under the place: syntax errors, unknown operators (with
    the nearest name), wrong number or kind of arguments, point-in-time fields (`$$field`), and
    expressions without any field.
    """
    if not isinstance(text, str):
        raise ExpressionError(f"an expression is a string, got {type(text).__name__}: {text!r}.")
    # A registered operator changes what a text means, so the registry is part of the key.
    return _parse(text, tuple(known_operators().values()))


@lru_cache(maxsize=4096)
def _parse(text: str, _known: tuple[Operator, ...]) -> Node:
    if not text.strip():
        raise ExpressionError("the expression is empty; expected something like $close.")
    node = _Parser(text).whole()
    _check_depth(node)
    if not isinstance(node, Field | Call):
        raise error_at(node.span, "the expression names no field, so it has no value by date")
    return node


def _check_depth(node: Node) -> None:
    """Refuse trees (a sum of many terms, say) that recursion over the tree could not walk."""
    level, nodes = 0, [node]
    while nodes:
        level += 1
        if level > _DEEPEST * 2:
            raise error_at(nodes[0].span, f"more than {_DEEPEST * 2} operators inside each other")
        nodes = [a for n in nodes if isinstance(n, Call) for a in n.arguments]


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = tokenize(text)
        self.at = 0
        self.depth = 0

    # -- grammar -------------------------------------------------------------------------------

    def whole(self) -> Node:
        node = self.binary(_COMPARISON)
        token = self.peek()
        if token.kind != "end":
            raise self.unexpected(token, "an operator or the end")
        return node

    def binary(self, level: int) -> Node:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise error_at(self.peek().span, f"nested deeper than {_DEEPEST} levels")
        left = self.unary()
        while (found := _LEVELS.get(self.symbol(), 0)) >= level:
            token = self.take()
            right = self.binary(found + 1)
            if found == _COMPARISON and _LEVELS.get(self.symbol()) == _COMPARISON:
                raise error_at(
                    self.peek().span,
                    "comparisons cannot be chained; write (a < b) & (b < c)",
                )
            left = self.combine(_NAMES[token.text], left, right)
        self.depth -= 1
        return left

    def unary(self) -> Node:
        token = self.peek()
        if token.text not in ("-", "+", "~") or token.kind != "symbol":
            return self.power()
        self.take()
        self.depth += 1
        if self.depth > _DEEPEST:
            raise error_at(token.span, f"nested deeper than {_DEEPEST} levels")
        operand = self.unary()
        self.depth -= 1
        span = Span(self.text, token.span.start, operand.span.end)
        if token.text == "~":
            return _checked("Not", (operand,), span)
        if token.text == "+":
            return operand
        if isinstance(operand, Number):
            return _number(-operand.value, span)
        return _checked("Mul", (operand, _number(-1, span)), span)

    def power(self) -> Node:
        base = self.atom()
        if self.symbol() != "**":
            return base
        self.take()
        return self.combine("Power", base, self.unary())

    def atom(self) -> Node:
        token = self.take()
        if token.kind == "number":
            whole = token.text.isdigit()
            return Number(int(token.text) if whole else float(token.text), whole, token.span)
        if token.kind == "field":
            return Field(token.text[1:], token.span)
        if token.kind == "text":
            return Text(token.text[1:-1], token.span)
        if token.kind == "name":
            return self.call(token)
        if token.text == "(":
            node = self.binary(_COMPARISON)
            self.expect(")", opened=token)
            return node
        if token.kind == "period":
            raise error_at(
                token.span, "point-in-time fields ($$) are not supported; use a daily $field"
            )
        raise self.unexpected(token, "a field, a number, an operator or '('")

    def call(self, name: Token) -> Node:
        if self.peek().text != "(":
            word = _WORDS.get(name.text)
            hint = f"write {word}" if word else "an operator needs (...), a field needs $"
            raise error_at(name.span, f"unexpected name {name.text!r}: {hint}")
        if name.text in NOT_SUPPORTED:
            raise error_at(name.span, f"{name.text}: {NOT_SUPPORTED[name.text]}")
        if name.text not in known_operators():
            raise error_at(
                name.span, unknown_name("operator", name.text, known_operators(), limit=60)
            )
        opened = self.take()
        arguments: list[Node] = []
        while self.peek().text != ")":
            arguments.append(self.binary(_COMPARISON))
            if self.peek().text != ",":
                break
            self.take()
        self.expect(")", opened=opened)
        span = Span(self.text, name.span.start, self.tokens[self.at - 1].span.end)
        return _checked(name.text, tuple(arguments), span)

    def combine(self, name: str, left: Node, right: Node) -> Node:
        span = Span(self.text, left.span.start, right.span.end)
        if isinstance(left, Number) and isinstance(right, Number):
            return _fold(name, left, right, span)
        return _checked(name, (left, right), span)

    # -- tokens --------------------------------------------------------------------------------

    def peek(self) -> Token:
        return self.tokens[self.at]

    def symbol(self) -> str:
        token = self.tokens[self.at]
        return token.text if token.kind == "symbol" else ""

    def take(self) -> Token:
        token = self.tokens[self.at]
        self.at = min(self.at + 1, len(self.tokens) - 1)
        return token

    def expect(self, symbol: str, opened: Token) -> None:
        token = self.peek()
        if token.text != symbol:
            if token.kind == "end":
                raise error_at(opened.span, "this parenthesis is never closed")
            raise self.unexpected(token, f"',' or {symbol!r}")
        self.take()

    def unexpected(self, token: Token, expected: str) -> ExpressionError:
        what = "the expression ends" if token.kind == "end" else f"unexpected {token.text!r}"
        return error_at(token.span, f"{what} where {expected} was expected")


def _number(value: int | float, span: Span) -> Number:
    return Number(value, isinstance(value, int), span)


def _fold(name: str, left: Number, right: Number, span: Span) -> Number:
    if name not in _CONSTANT:
        raise error_at(span, "a comparison of two constants has no value by date")
    try:
        value = _CONSTANT[name](left.value, right.value)
    except ArithmeticError as error:
        raise error_at(span, f"this constant cannot be computed ({error})") from error
    if isinstance(value, complex):
        raise error_at(span, "this constant is not a real number")
    # Powers of powers of integers would grow for ever.
    return _number(float(value) if abs(value) > 1e18 else value, span)


# -- the check of a call against the table of operators ------------------------------------------


def _checked(name: str, arguments: tuple[Node, ...], span: Span) -> Node:
    known = known_operators()[name]
    if len(arguments) != len(known.arguments):
        raise error_at(
            span,
            f"{name} takes {len(known.arguments)} argument"
            f"{'' if len(known.arguments) == 1 else 's'} ({', '.join(known.arguments)}), "
            f"got {len(arguments)}",
        )
    for place, (kind, node) in enumerate(zip(known.arguments, arguments, strict=True), start=1):
        problem = _problem(known, kind, node)
        if problem:
            raise error_at(node.span, f"argument {place} of {SYMBOLS.get(name, name)}: {problem}")
    if "operand" in known.arguments and not any(isinstance(a, Field | Call) for a in arguments):
        raise error_at(span, f"{name} needs at least one argument with a field in it")
    if name in ("Add", "Sub") and all(is_condition(a) for a in arguments):
        # numpy's "+" of two conditions is "or" and its "-" an error: neither is what is meant.
        raise error_at(span, "two conditions cannot be added; write a | b, or a*1 + b*1 to count")
    if name == "Feature" and isinstance(arguments[0], Text):
        return Field(arguments[0].value, span)
    if name == "ChangeInstrument":
        name, arguments = "Mask", arguments[::-1]
    return Call(name, arguments, span)


def is_condition(node: Node) -> bool:
    """Whether the node gives true and false rather than numbers."""
    return isinstance(node, Call) and (
        known_operators()[node.operator].gives_condition
        or (node.operator == "Mask" and is_condition(node.arguments[0]))
    )


def _problem(known: Operator, kind: Kind, node: Node) -> str | None:
    """What is wrong with an argument, or None."""
    if kind == "text":
        return None if isinstance(node, Text) else "expected a quoted name, as in 'SH600000'"
    if isinstance(node, Text):
        return f"expected {'a number' if kind in ('window', 'lag', 'share') else 'an expression'}"
    if kind in ("window", "lag", "share"):
        if not isinstance(node, Number):
            return f"expected a plain number for the {kind}"
        return _number_problem(known, kind, node)
    if kind == "condition" and not is_condition(node):
        got = "a constant" if isinstance(node, Number) else "numbers"
        hint = "; & and | bind tighter than comparisons, as in ($a > 1) & ($b < 2)"
        return f"expected a condition, got {got}" + (hint if known.name in ("And", "Or") else "")
    if kind != "operand" and isinstance(node, Number):
        return "expected an expression with a field in it, got a constant"
    return None


def _number_problem(known: Operator, kind: Kind, node: Number) -> str | None:
    value = node.value
    if kind == "share":
        return None if 0 <= value <= 1 else f"expected a number from 0 to 1, got {value}"
    if kind == "lag":
        return None if node.whole else f"expected a whole number of rows, got {value}"
    if known.decay and not node.whole:
        return None if 0 < value < 1 else f"expected a span or an alpha in (0, 1), got {value}"
    if not node.whole or value < 0:
        return f"expected a whole number of rows (0: all rows so far), got {value}"
    if 0 < value < known.smallest:
        return f"expected a window of at least {known.smallest}, got {value}"
    return None
