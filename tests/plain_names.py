"""The rule on plain names: which identifiers `test_rules.py` refuses, and why.

The first version of qtorch named functions and variables by past participles (`told`, `found`,
`_checked`), prepositions (`over`, `weights_of`) and riddles (`_anew`). A reader could not search
for a concept, nor tell a verb from a value. A function's name begins with a verb or is the noun
of what it returns; a value's name is a noun.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

# Never the whole name of a function, an argument, a variable or an attribute.
BANNED = frozenset(
    [
        "about",
        "again",
        "alike",
        "alone",
        "anew",
        "anything",
        "apart",
        "asked",
        "asker",
        "at_work",
        "begun",
        "both",
        "company",
        "done",
        "ended",
        "everything",
        "few",
        "foreign",
        "found",
        "given",
        "gone",
        "got",
        "heard",
        "held",
        "here",
        "how",
        "keeper",
        "kept",
        "known",
        "least",
        "lent",
        "less",
        "let",
        "little",
        "lost",
        "made",
        "manner",
        "many",
        "meant",
        "mine",
        "more",
        "most",
        "much",
        "nobody",
        "nothing",
        "one",
        "others",
        "ours",
        "put",
        "said",
        "saying",
        "seen",
        "sent",
        "shown",
        "something",
        "stays",
        "taken",
        "telling",
        "theirs",
        "there",
        "they",
        "thing",
        "things",
        "told",
        "us",
        "wanted",
        "way",
        "what",
        "when",
        "where",
        "which",
        "who",
        "whom",
        "whose",
        "why",
        "wish",
        "zygote",
    ]
)
# Participles that do not end in -ed.
IRREGULAR = frozenset(
    [
        "begun",
        "bought",
        "bound",
        "broken",
        "brought",
        "built",
        "caught",
        "chosen",
        "drawn",
        "driven",
        "fought",
        "found",
        "given",
        "gone",
        "grown",
        "held",
        "kept",
        "known",
        "laid",
        "led",
        "lent",
        "lost",
        "made",
        "meant",
        "met",
        "paid",
        "said",
        "seen",
        "sent",
        "shown",
        "sold",
        "sought",
        "spent",
        "stood",
        "taken",
        "taught",
        "thought",
        "told",
        "understood",
        "won",
        "written",
    ]
)
# Words in -ed that are no participles, and participles that are the field's own nouns.
NO_PARTICIPLE = frozenset(["embed", "exceed", "feed", "need", "proceed", "seed", "speed"])
PREPOSITIONS = frozenset(
    [
        "above",
        "after",
        "again",
        "and",
        "anew",
        "apart",
        "as",
        "at",
        "away",
        "back",
        "before",
        "behind",
        "below",
        "beside",
        "by",
        "down",
        "for",
        "from",
        "here",
        "if",
        "in",
        "into",
        "not",
        "of",
        "off",
        "on",
        "or",
        "out",
        "over",
        "so",
        "than",
        "then",
        "there",
        "to",
        "too",
        "under",
        "up",
        "with",
        "within",
        "without",
    ]
)
VERBS = frozenset(["back_off", "fall_back", "log_in", "shut_down", "spin_up", "tear_down", "to"])
# Adjectives of the field that begin the noun of a result.
TERMS = frozenset(["deflated", "expected", "masked", "paired", "stored"])
# Public names of Qlib's, which stay.
QLIB_NAMES = frozenset(["check_stock_suspended"])
PREFIXES = ("test_", "on_", "is_", "has_", "visit_")


def is_participle(word: str) -> bool:
    """Whether a word is a past participle, as far as its spelling says."""
    if word in NO_PARTICIPLE:
        return False
    return word in IRREGULAR or (len(word) > 4 and word.endswith("ed"))


def function_fault(name: str) -> str | None:
    """Why a function may not have this name; None if it may."""
    bare = name.strip("_")
    if name.startswith("__") or not bare or bare.startswith(PREFIXES) or bare in VERBS | QLIB_NAMES:
        return None
    words = bare.split("_")
    if bare in BANNED:
        return "says nothing about the function"
    if is_participle(words[0]) and words[0] not in TERMS:
        return "begins with a past participle; begin with the verb"
    if words[-1] in PREPOSITIONS:
        return f"ends with {words[-1]!r}; name the result"
    if is_participle(words[-1]):
        return "ends with a past participle; begin with the verb"
    return None


def value_fault(name: str) -> str | None:
    """Why an argument, a variable or an attribute may not have this name; None if it may."""
    bare = name.strip("_")
    return "says nothing about the value" if bare in BANNED else None


def faulty_names(tree: ast.AST) -> Iterator[tuple[str, int, str]]:
    """Yield every name that a module may not define, its line, and what is wrong with it."""
    for name, line, fault in _names(tree):
        if fault is not None:
            yield name, line, fault


def _names(tree: ast.AST) -> Iterator[tuple[str, int, str | None]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno, function_fault(node.name)
        elif isinstance(node, ast.ClassDef):
            yield node.name, node.lineno, value_fault(node.name.lower())
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno, value_fault(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno, value_fault(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno, value_fault(node.attr)
