"""An expression's text cut into tokens, and errors that point into the text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qtorch.core.errors import ExpressionError
from qtorch.data.expression.node import Span

# Qlib allows these four punctuation marks in a field's name, beside letters, digits and "_".
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
    """One token: its kind (a group of the pattern, or "end"), text and place."""

    kind: str
    text: str
    span: Span


def tokenize(text: str) -> list[Token]:
    """The tokens of `text`, an "end" token last.

    Raises ExpressionError for a character that begins no token.
    """
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            hint = _HINTS.get(text[at])
            raise error_at(
                Span(text, at, at + 1),
                f"unexpected character {text[at]!r}" + (f": {hint}" if hint else ""),
            )
        kind = match.lastgroup or ""
        if kind != "space":
            tokens.append(Token(kind, match.group(), Span(text, at, match.end())))
        at = match.end()
    return [*tokens, Token("end", "", Span(text, len(text), len(text) + 1))]


def error_at(span: Span, message: str) -> ExpressionError:
    """An ExpressionError that shows the expression and a caret under the place."""
    line_start = span.text.rfind("\n", 0, span.start) + 1
    line_end = span.text.find("\n", span.start)
    line = span.text[line_start : line_end if line_end >= 0 else len(span.text)]
    begin = span.start - line_start
    width = max(1, min(span.end - line_start, len(line)) - begin)
    if len(line) > 160:  # keep the neighbourhood only
        cut = max(0, begin - 60)
        tail = " ..." if cut + 140 < len(line) else ""
        line = ("... " if cut else "") + line[cut : cut + 140] + tail
        begin = begin - cut + (4 if cut else 0)
        width = max(1, min(width, len(line) - begin))
    return ExpressionError(f"{message}\n    {line}\n    {' ' * begin}{'^' * width}")
