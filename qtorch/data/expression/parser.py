"""The syntax tree of an expression, and the parser that builds it by precedence climbing.

The grammar is the subset of Python that Qlib's expressions use, with Python's precedence:
comparisons bind weakest, then `|`, `&`, `+ -`, `* /`, unary `- + ~`, `**`. Qlib passes the text to
`eval`; here no code is executed.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar

from qtorch.core.errors import ExpressionError, format_count, unknown_name_message
from qtorch.data.expression.operators import (
    NOT_SUPPORTED,
    NUMBER_KINDS,
    Kind,
    Operator,
    get_operators,
    get_user_operators,
)

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
    span: Span = field(compare=False, repr=False)
    is_integer: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_integer", isinstance(self.value, int))

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
        return fold(self, _format_node)


Node: TypeAlias = Field | Number | Text | Call
T = TypeVar("T")


def walk(node: Node) -> Iterator[Node]:
    """Yield the node and all its descendants, parents first, in the order of the text."""
    nodes = [node]
    while nodes:
        node = nodes.pop()
        yield node
        nodes.extend(reversed(subnodes(node)))


def subnodes(node: Node) -> tuple[Node, ...]:
    """Return the arguments of a call; other nodes have none."""
    return node.arguments if isinstance(node, Call) else ()


def fold(
    root: Node,
    combine: Callable[[Node, tuple[T, ...]], T],
    children: Callable[[Node], Sequence[Node]] = subnodes,
) -> T:
    """Compute a value for each node from those of its children, and return that of the root.

    Children come first, in the order of the text. Trees of generated expressions are deeper than
    Python's recursion limit, so functions of trees use this loop instead of recursion.
    """
    results: list[T] = []
    pending: list[tuple[Node, int]] = [(root, -1)]
    while pending:
        node, num_children = pending.pop()
        if num_children < 0:
            parts = children(node)
            pending.append((node, len(parts)))
            pending.extend((part, -1) for part in reversed(parts))
        else:
            first = len(results) - num_children
            results[first:] = [combine(node, tuple(results[first:]))]
    return results[0]


def _format_node(node: Node, arguments: tuple[str, ...]) -> str:
    return f"{node.operator}({','.join(arguments)})" if isinstance(node, Call) else str(node)


def field_name(field: Field, stored_names: Sequence[str]) -> str:
    """Return the stored name of a field: as written or in lower case, as Qlib stores names.

    Raises ExpressionError with the nearest name if the field is not stored.
    """
    for name in (field.name, field.name.lower()):
        if name in stored_names:
            return name
    raise expression_error(field.span, unknown_name_message("field", field.name, stored_names))


# -- tokens ----------------------------------------------------------------------------------------

# Besides letters, digits and "_", Qlib allows these four punctuation marks in field names.
_NAME = r"[\w\u3001\uff1a\uff08\uff09]+"
_TOKEN = re.compile(
    rf"""
    (?P<space>\s+)
  | (?P<period>\$\${_NAME})
  | (?P<field>\${_NAME})
  | (?P<number>(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)
  | (?P<name>[^\W\d]\w*)
  | (?P<text>'[^']*'|"[^"]*")
  | (?P<symbol>\*\*|<=|>=|==|!=|[-+*/<>&|~(),])
    """,
    re.VERBOSE,
)
_HINTS = {
    "=": "to compare, write ==",
    "!": "to negate a condition, write ~ or Not(...)",
    "%": "there is no remainder operator",
    "^": "for a power write **, for a condition & or |",
    "$": "a field's name follows the dollar sign, as in $close",
    "[": "subscripts are not part of the language",
    "'": "the closing quote is missing",
    '"': "the closing quote is missing",
}


@dataclass(frozen=True)
class Token:
    """A token with its kind (a group of the pattern, or "end"), text and position."""

    kind: str
    text: str
    span: Span


def tokenize(text: str) -> list[Token]:
    """Split `text` into tokens; the last one is an "end" token.

    Raises ExpressionError for an unexpected character.
    """
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            hint = _HINTS.get(text[position])
            raise expression_error(
                Span(text, position, position + 1),
                f"unexpected character {text[position]!r}" + (f": {hint}" if hint else ""),
            )
        kind = match.lastgroup or ""
        if kind != "space":
            tokens.append(Token(kind, match.group(), Span(text, position, match.end())))
        position = match.end()
    return [*tokens, Token("end", "", Span(text, len(text), len(text) + 1))]


def expression_error(span: Span, message: str) -> ExpressionError:
    """Build an ExpressionError that shows the expression with carets under `span`."""
    line_start = span.text.rfind("\n", 0, span.start) + 1
    line_end = span.text.find("\n", span.start)
    line = span.text[line_start : line_end if line_end >= 0 else len(span.text)]
    caret = span.start - line_start
    width = max(1, min(span.end - line_start, len(line)) - caret)
    if len(line) > 160:  # show only the neighbourhood
        offset = max(0, caret - 60)
        tail = " ..." if offset + 140 < len(line) else ""
        line = ("... " if offset else "") + line[offset : offset + 140] + tail
        caret = caret - offset + (4 if offset else 0)
        width = max(1, min(width, len(line) - caret))
    return ExpressionError(f"{message}\n    {line}\n    {' ' * caret}{'^' * width}")


# -- grammar ---------------------------------------------------------------------------------------

_COMPARISON = 1
_LEVELS = {"|": 2, "&": 3, "+": 4, "-": 4, "*": 5, "/": 5}
_LEVELS |= dict.fromkeys(("<", "<=", ">", ">=", "==", "!="), _COMPARISON)
_NAMES = {symbol: name for name, symbol in SYMBOLS.items()}
_CONSTANT: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": operator.truediv,
    # An integer power could grow without limit; a float overflows to an error.
    "Power": lambda a, b: a**b if abs(b) <= 64 else float(a) ** b,
}
_WORD_SYMBOLS = {"and": "&", "or": "|", "not": "~"}
# Generated expressions nest hundreds of levels; a text beyond these limits is an accident or an
# attack on the memory.
_MAX_NESTING = 2_000
_MAX_DEPTH = 5_000
_MAX_MASK_DEPTH = 20  # each level of Mask is evaluated by a recursive call


def parse(text: str) -> Node:
    """Parse an expression into its syntax tree.

    Raises ExpressionError, with the position marked, for syntax errors, unknown operators (with
    the nearest name), a wrong number or kind of arguments, point-in-time fields (`$$field`), and
    expressions without a field.
    """
    if not isinstance(text, str):
        raise ExpressionError(f"an expression is a string, got {type(text).__name__}: {text!r}.")
    # Registered operators change the meaning of a text, so they are part of the cache key. The
    # built-in ones do not change, and a hash of all of them takes longer than a short parse.
    return _parse(text, get_user_operators())


@lru_cache(maxsize=4096)
def _parse(text: str, _user_operators: tuple[Operator, ...]) -> Node:
    if not text.strip():
        raise ExpressionError("the expression is empty; expected something like $close.")
    node = _Parser(text).parse_all()
    _check_depth(node)
    if not isinstance(node, Field | Call):
        raise expression_error(node.span, "the expression has no field, so it has no daily values")
    return node


def _check_depth(node: Node) -> None:
    """Raise for trees that are too deep, such as a sum of very many terms."""
    level, nodes = 0, [node]
    while nodes:
        level += 1
        if level > _MAX_DEPTH:
            raise expression_error(nodes[0].span, f"more than {_MAX_DEPTH} nested operators")
        nodes = [a for n in nodes for a in subnodes(n)]

    def count_masks(node: Node, counts: tuple[int, ...]) -> int:
        is_mask = isinstance(node, Call) and node.operator == "Mask"
        count = max(counts, default=0) + is_mask
        if count > _MAX_MASK_DEPTH:
            raise expression_error(node.span, f"more than {_MAX_MASK_DEPTH} nested Mask")
        return count

    fold(node, count_masks)


Parsing: TypeAlias = Generator[Any, Any, Node]
"""A method of the parser: it yields the methods that it calls, and receives their nodes."""


def _run(parsing: Parsing) -> Node:
    """Run a method of the parser with an explicit stack of calls, however deep the text nests."""
    calls = [parsing]
    node: Node | None = None
    while calls:
        try:
            calls.append(calls[-1].send(node))
            node = None
        except StopIteration as stop:
            calls.pop()
            node = stop.value
    assert node is not None
    return node


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = tokenize(text)
        self.index = 0
        self.depth = 0

    # -- grammar -------------------------------------------------------------------------------

    def parse_all(self) -> Node:
        node = _run(self.parse_binary(_COMPARISON))
        token = self.peek()
        if token.kind != "end":
            raise self.token_error(token, "an operator or the end")
        return node

    def parse_binary(self, level: int) -> Parsing:
        self.enter_level(self.peek())
        left: Node = yield self.parse_unary()
        while (next_level := _LEVELS.get(self.peek_symbol(), 0)) >= level:
            token = self.advance()
            right = yield self.parse_binary(next_level + 1)
            if next_level == _COMPARISON and _LEVELS.get(self.peek_symbol()) == _COMPARISON:
                raise expression_error(
                    self.peek().span,
                    "comparisons cannot be chained; write (a < b) & (b < c)",
                )
            left = self.combine_operands(_NAMES[token.text], left, right)
        self.depth -= 1
        return left

    def parse_unary(self) -> Parsing:
        token = self.peek()
        if token.text not in ("-", "+", "~") or token.kind != "symbol":
            power: Node = yield self.parse_power()
            return power
        self.enter_level(self.advance())
        operand: Node = yield self.parse_unary()
        self.depth -= 1
        span = Span(self.text, token.span.start, operand.span.end)
        if token.text == "~":
            return _build_call("Not", (operand,), span)
        if token.text == "+":
            return operand
        if isinstance(operand, Number):
            return Number(-operand.value, span)
        return _build_call("Mul", (operand, Number(-1, span)), span)

    def parse_power(self) -> Parsing:
        base: Node = yield self.parse_atom()
        if self.peek_symbol() != "**":
            return base
        self.advance()
        exponent: Node = yield self.parse_unary()
        return self.combine_operands("Power", base, exponent)

    def parse_atom(self) -> Parsing:
        token = self.advance()
        if token.kind == "number":
            text = token.text
            return Number(int(text) if text.isdigit() else float(text), token.span)
        if token.kind == "field":
            return Field(token.text[1:], token.span)
        if token.kind == "text":
            return Text(token.text[1:-1], token.span)
        if token.kind == "name":
            call: Node = yield self.parse_call(token)
            return call
        if token.text == "(":
            node: Node = yield self.parse_binary(_COMPARISON)
            self.expect(")", parenthesis=token)
            return node
        if token.kind == "period":
            raise expression_error(
                token.span, "point-in-time fields ($$) are not supported; use a daily $field"
            )
        raise self.token_error(token, "a field, a number, an operator or '('")

    def parse_call(self, name: Token) -> Parsing:
        if self.peek().text != "(":
            symbol = _WORD_SYMBOLS.get(name.text)
            hint = f"write {symbol}" if symbol else "an operator needs (...), a field needs $"
            raise expression_error(name.span, f"unexpected name {name.text!r}: {hint}")
        if name.text in NOT_SUPPORTED:
            raise expression_error(name.span, f"{name.text}: {NOT_SUPPORTED[name.text]}")
        if name.text not in get_operators():
            raise expression_error(
                name.span, unknown_name_message("operator", name.text, get_operators(), limit=60)
            )
        parenthesis = self.advance()
        arguments: list[Node] = []
        while self.peek().text != ")":
            arguments.append((yield self.parse_binary(_COMPARISON)))
            if self.peek().text != ",":
                break
            self.advance()
        self.expect(")", parenthesis=parenthesis)
        span = Span(self.text, name.span.start, self.tokens[self.index - 1].span.end)
        return _build_call(name.text, tuple(arguments), span)

    def combine_operands(self, name: str, left: Node, right: Node) -> Node:
        span = Span(self.text, left.span.start, right.span.end)
        if isinstance(left, Number) and isinstance(right, Number):
            return _fold_constants(name, left, right, span)
        return _build_call(name, (left, right), span)

    def enter_level(self, token: Token) -> None:
        self.depth += 1
        if self.depth > _MAX_NESTING:
            raise expression_error(token.span, f"nested deeper than {_MAX_NESTING} levels")

    # -- tokens --------------------------------------------------------------------------------

    def peek(self) -> Token:
        return self.tokens[self.index]

    def peek_symbol(self) -> str:
        token = self.tokens[self.index]
        return token.text if token.kind == "symbol" else ""

    def advance(self) -> Token:
        token = self.tokens[self.index]
        self.index = min(self.index + 1, len(self.tokens) - 1)
        return token

    def expect(self, symbol: str, parenthesis: Token) -> None:
        token = self.peek()
        if token.text != symbol:
            if token.kind == "end":
                raise expression_error(parenthesis.span, "this parenthesis is never closed")
            raise self.token_error(token, f"',' or {symbol!r}")
        self.advance()

    def token_error(self, token: Token, expected: str) -> ExpressionError:
        problem = "the expression ends" if token.kind == "end" else f"unexpected {token.text!r}"
        return expression_error(token.span, f"{problem} where {expected} was expected")


def _fold_constants(name: str, left: Number, right: Number, span: Span) -> Number:
    if name not in _CONSTANT:
        raise expression_error(span, "a comparison of two constants has no daily values")
    try:
        value = _CONSTANT[name](left.value, right.value)
    except ArithmeticError as error:
        raise expression_error(span, f"this constant cannot be computed ({error})") from error
    if isinstance(value, complex):
        raise expression_error(span, "this constant is not a real number")
    # Large integers become floats, because nested integer powers could grow without limit.
    return Number(float(value) if abs(value) > 1e18 else value, span)


# -- validation of calls -------------------------------------------------------------------------


def _build_call(name: str, arguments: tuple[Node, ...], span: Span) -> Node:
    definition = get_operators()[name]
    max_count = len(definition.arguments)
    min_count = max_count - definition.num_optional
    if not min_count <= len(arguments) <= max_count:
        expected = format_count(max_count, "argument")
        expected = expected if min_count == max_count else f"{min_count} or {expected}"
        kinds = ", ".join(definition.arguments)
        raise expression_error(span, f"{name} takes {expected} ({kinds}), got {len(arguments)}")
    for position, (kind, node) in enumerate(
        zip(definition.arguments, arguments, strict=False), start=1
    ):
        problem = _argument_problem(definition, kind, node)
        if problem:
            raise expression_error(
                node.span, f"argument {position} of {SYMBOLS.get(name, name)}: {problem}"
            )
    if "operand" in definition.arguments and not any(
        isinstance(a, Field | Call) for a in arguments
    ):
        raise expression_error(span, f"{name} needs at least one argument with a field in it")
    if name in ("Add", "Sub") and all(is_condition(a) for a in arguments):
        # In numpy "+" of two conditions is a logical "or" and "-" is an error, so reject both.
        raise expression_error(
            span, "two conditions cannot be added; write a | b, or a*1 + b*1 to count"
        )
    if name == "Feature" and isinstance(arguments[0], Text):
        return Field(arguments[0].value, span)
    if name == "ChangeInstrument":
        name, arguments = "Mask", arguments[::-1]
    if name == "Mask":
        _check_mask_argument(arguments[0])
    return Call(name, arguments, span)


def _check_mask_argument(node: Node) -> None:
    for part in walk(node):
        if is_cross_section(part):
            assert isinstance(part, Call)
            raise expression_error(
                part.span,
                f"{part.operator} compares the instruments of a day, but Mask selects a single "
                f"one; write {part.operator}(Mask(...))",
            )


def is_cross_section(node: Node) -> bool:
    """Whether the node is a call of an operator that compares the instruments of a day."""
    return isinstance(node, Call) and get_operators()[node.operator].cross_section


def is_condition(node: Node) -> bool:
    """Whether the values of the node are booleans instead of numbers."""
    while isinstance(node, Call) and node.operator == "Mask":
        node = node.arguments[0]
    return isinstance(node, Call) and get_operators()[node.operator].returns_condition


def _argument_problem(definition: Operator, kind: Kind, node: Node) -> str | None:
    """Describe what is wrong with an argument; None if it is valid."""
    if kind == "text":
        return None if isinstance(node, Text) else "expected a quoted name, as in 'SH600000'"
    if isinstance(node, Text):
        return f"expected {'a number' if kind in NUMBER_KINDS else 'an expression'}"
    if kind in NUMBER_KINDS:
        if not isinstance(node, Number):
            return f"expected a number for the {kind}"
        return _number_problem(definition, kind, node)
    if kind == "condition" and not is_condition(node):
        actual = "a constant" if isinstance(node, Number) else "numbers"
        hint = "; & and | bind tighter than comparisons, as in ($a > 1) & ($b < 2)"
        return f"expected a condition, got {actual}" + (
            hint if definition.name in ("And", "Or") else ""
        )
    if kind != "operand" and isinstance(node, Number):
        return "expected an expression with a field in it, got a constant"
    return None


def _number_problem(definition: Operator, kind: Kind, node: Number) -> str | None:
    value = node.value
    if kind == "share":
        return None if 0 <= value <= 1 else f"expected a number from 0 to 1, got {value}"
    if kind == "lag":
        return None if node.is_integer else f"expected an integer number of rows, got {value}"
    if definition.allows_alpha and not node.is_integer:
        return None if 0 < value < 1 else f"expected a span or an alpha in (0, 1), got {value}"
    if not node.is_integer or value < 0:
        return f"expected an integer number of rows (0: all past rows), got {value}"
    if 0 < value < definition.min_window:
        return f"expected a window of at least {definition.min_window}, got {value}"
    return None
