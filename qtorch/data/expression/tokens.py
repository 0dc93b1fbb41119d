"""The tokenizer of expressions, and errors that mark a position in the text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qtorch.core.errors import ExpressionError
from qtorch.data.expression.node import Span

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
