"""What KunQuant's Alpha101 computes otherwise than the paper, as changes of qtorch's expressions.

Each departure was read in KunQuant's source (of its Python package: predefined/Alpha101.py for the
formulas, ops/CompOp.py and the header Kun/Ops.hpp for the operators), and `vary_expression` writes
it in the expression language, so that the values can be compared.

Where a price does not move, KunQuant also gives some quotients another value than the paper
(SetInfOrNanToValue in 17, 23, 30, 34, 38, 43, 47 and 66, a range of 0.0001 in 53, 54, 55 and 60).
That is not written here, because random prices always move.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path

from qtorch.data.expression.parser import Call, Node, fold, parse
from qtorch.data.handler.alpha101 import DOLLAR_VOLUME, alpha101

EXPRESSIONS, NAMES = alpha101()
TESTS = Path(__file__).resolve().parents[2] / "tests" / "data" / "handler"
# The paper's formulas, with its windows of a fraction of a day.
PAPER = (TESTS / "alpha101_formulas.txt").read_text().splitlines()
_WINDOW = re.compile(r", (\d+(?:\.\d+)?)\)")

# By column: what its function in predefined/Alpha101.py does otherwise, and the parts of the
# expression that it changes with the changed ones.
FORMULAS: dict[int, tuple[str, dict[str, str]]] = {
    1: ("subtracts no 0.5", {" - 0.5": ""}),
    10: ("does not rank the result", {"CSRank(If(": "(If("}),
    27: (
        "divides the mean of 2 days by 2 again, which changes no rank",
        {"$vwap), 6), 2)/2": "$vwap), 6), 2)/2/2"},
    ),
    29: (
        "sums the ranks of two days, not the smaller of two for one day",
        {
            "Sum(Min(CSRank(CSRank(-1*CSRank(Delta($close - 1, 5)))), 2), 1)": (
                "Sum(CSRank(CSRank(-1*CSRank(Delta($close - 1, 5)))), 2)"
            )
        },
    ),
    32: ("divides the mean of 7 days by 7 again", {"Sum($close, 7)/7": "Sum($close, 7)/7/7"}),
    36: (
        "divides the mean of 200 days by 200 again",
        {"Sum($close, 200)/200": "Sum($close, 200)/200/200"},
    ),
    38: ("takes the rolling rank of open, not of close", {"Rank($close, 10)": "Rank($open, 10)"}),
    39: (
        "takes the mean of 250 returns instead of the sum, which changes no rank",
        {"Sum(($close/Ref($close, 1) - 1), 250)": "Mean(($close/Ref($close, 1) - 1), 250)"},
    ),
    47: ("divides the mean of 5 days by 5 again", {"(Sum($high, 5)/5)": "(Sum($high, 5)/5/5)"}),
    72: (
        "adds 0.0001 to both ranks",
        {
            "CSRank(DecayLinear(Corr(($high": "(CSRank(DecayLinear(Corr(($high",
            ", 10))/CSRank(": ", 10)) + 0.0001)/(CSRank(",
            ", 6), 2))": ", 6), 2)) + 0.0001)",
        },
    ),
}
# By column: the number that stands for a correlation that is undefined (SetInfOrNanToValue), by the
# order of the correlations; None where none does.
FILL_VALUES: dict[int, tuple[int | None, ...]] = {
    **dict.fromkeys((2, 3, 6, 14, 15, 18, 22, 26, 28, 31, 44, 50, 55, 88, 92, 94), (0,)),
    **dict.fromkeys((40, 77), (1,)),
    45: (0, 1),
    78: (None, 0),
    85: (1, 1),
    96: (0, 0),
    98: (None, 0),
}


def change_formula(number: int, expression: str) -> str:
    """Replace the part of a formula that its function in predefined/Alpha101.py changes."""
    if number not in FORMULAS:
        return expression
    for part, changed_part in FORMULAS[number][1].items():
        if part not in expression:
            raise ValueError(f"ALPHA{number:03d} has no part {part!r}: {expression}")
        expression = expression.replace(part, changed_part)
    return expression


def round_windows(number: int, expression: str) -> str:
    """Round the paper's windows to the nearest day (the numbers in predefined/Alpha101.py)."""
    text = re.sub(r"\badv(\d+)", r"mean(volume, \1)", PAPER[number - 1])
    text = text.replace("returns", "(close/delay(close, 1) - 1)")
    # The language writes the base of SignedPower twice, for its sign and its absolute value.
    text = re.sub(r"^SignedPower\((.+), delta", r"\1 \1 delta", text)
    windows = [float(w) for w in _WINDOW.findall(text)]
    if all(w.is_integer() for w in windows):
        return expression
    if [int(w) for w in windows] != [int(w) for w in _WINDOW.findall(expression)]:
        raise ValueError(f"ALPHA{number:03d} has other windows than the paper: {expression}")
    rounded = iter(windows)
    return _WINDOW.sub(lambda _: f", {round(next(rounded))})", expression)


def average_volume(number: int, expression: str) -> str:
    """Let adv be the mean of the volume in shares (WindowedAvg of volume)."""
    return expression.replace(DOLLAR_VOLUME, "$volume")


def fill_correlations(number: int, expression: str) -> str:
    """Replace undefined correlations by a number (SetInfOrNanToValue)."""
    values = iter(FILL_VALUES.get(number, ()))

    def fill(text: str, arguments: tuple[str, ...]) -> str:
        value = next(values, None)
        return text if value is None else f"If(Abs({text}) <= 1, {text}, {value})"

    return replace_calls(expression, ("Corr",), fill)


def require_full_windows(number: int, expression: str) -> str:
    """Let a window without all its values have no value (FastWindowedSum, ReduceMax, ...).

    Of full windows of random prices, only correlations are ever missing.
    """

    def require(text: str, arguments: tuple[str, ...]) -> str:
        series, window = arguments
        if "Corr(" not in series:
            return text
        return f"({text} + 0*Log(1 + Count({series}, {window}) - {window}))"

    return replace_calls(expression, ("Sum", "DecayLinear", "Max", "Rank", "Product"), require)


def count_positions(number: int, expression: str) -> str:
    """Let a rolling rank be a position in the window, from 1, instead of a fraction (TsRank).

    A position is exact in KunQuant, but here it may be 1.0000001.
    """
    return replace_calls(expression, ("Rank",), lambda text, arguments: f"({arguments[1]}*{text})")


def prefer_second_argument(number: int, expression: str) -> str:
    """Let the larger or smaller of two values be the second if one is missing (sc_max, sc_min)."""

    def compare(text: str, arguments: tuple[str, ...]) -> str:
        left, right = arguments
        sign = ">" if text.startswith("Greater") else "<"
        return f"If({left} {sign} {right}, {left}, {right})"

    return replace_calls(expression, ("Greater", "Less"), compare)


def replace_calls(
    expression: str,
    operators: Collection[str],
    replace: Callable[[str, tuple[str, ...]], str],
) -> str:
    """Replace the calls of some operators by `replace(call, arguments)`, the innermost first."""

    def combine(node: Node, arguments: tuple[str, ...]) -> str:
        if not isinstance(node, Call):
            return str(node)
        text = f"{node.operator}({', '.join(arguments)})"
        return replace(text, arguments) if node.operator in operators else text

    return fold(parse(expression), combine)


DEPARTURES: dict[str, Callable[[int, str], str]] = {
    "computes another formula": change_formula,
    "rounds windows to the nearest day": round_windows,
    "takes the mean volume in shares as adv": average_volume,
    "gives undefined correlations a value": fill_correlations,
    "gives windows with a missing value none": require_full_windows,
    "takes positions as rolling ranks": count_positions,
    "takes the second of two values if one is missing": prefer_second_argument,
}
"""What KunQuant does otherwise, in the order in which the changes apply."""


@cache
def vary_expression(number: int, *, leave_out: str | None = None) -> str:
    """Return the expression of a column with KunQuant's departures, but for one if `leave_out`."""
    expression = EXPRESSIONS[number - 1]
    for name, change in DEPARTURES.items():
        if name != leave_out:
            expression = change(number, expression)
    return expression


def describe_departure(number: int, name: str) -> str:
    """Say what KunQuant does otherwise in a column."""
    return FORMULAS[number][0] if name == "computes another formula" else name
