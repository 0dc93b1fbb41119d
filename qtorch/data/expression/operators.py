"""The operators of the language: what they take, what they give, how far they reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from qtorch.core.errors import ArgumentError, ConfigError

Kind: TypeAlias = Literal["series", "operand", "condition", "window", "lag", "share", "text"]
"""What an argument may be.

- `series`: an expression with a field in it;
- `operand`: the same or a constant;
- `condition`: a comparison, or And, Or, Not of such;
- `window`: a whole number of rows, 0 for all rows so far;
- `lag`: a whole number of rows, negative for the future;
- `share`: a number between 0 and 1, both inclusive;
- `text`: a quoted name.
"""
Reach: TypeAlias = Callable[..., tuple[int | None, int]]
Function: TypeAlias = Callable[..., Tensor]


@dataclass(frozen=True)
class Operator:
    """One operator.

    `smallest` is the least window but 0; `decay` says that a number in (0, 1) may stand for the
    window (an exponential mean's alpha); `reach` maps the numeric arguments to the rows needed
    (before, after), None meaning all history; `function` is a user's own.
    """

    name: str
    arguments: tuple[Kind, ...]
    summary: str
    gives_condition: bool = False
    smallest: int = 1
    decay: bool = False
    reach: Reach | None = None
    function: Function | None = None


def _window_reach(*numbers: int | float) -> tuple[int | None, int]:
    window = numbers[0]
    return (None, 0) if window == 0 else (int(window) - 1, 0)


def _lag_reach(lag: int) -> tuple[int | None, int]:
    return (None, 0) if lag == 0 else (lag, -lag)


def _delta_reach(lag: int) -> tuple[int | None, int]:
    return (None, 0) if lag == 0 else (max(lag, 0), max(-lag, 0))


def _all_history(*_: Any) -> tuple[int | None, int]:
    return None, 0


def _elementwise() -> list[Operator]:
    pair: tuple[Kind, ...] = ("operand", "operand")
    values = {
        "Add": "sum of two series",
        "Sub": "difference",
        "Mul": "product",
        "Div": "quotient (x/0 is inf, 0/0 is NaN)",
        "Power": "left to the power of right",
        "Greater": "the greater of two; NaN where one is NaN",
        "Less": "the lesser of two; NaN where one is NaN",
    }
    tests = {"Gt": ">", "Ge": ">=", "Lt": "<", "Le": "<=", "Eq": "==", "Ne": "!="}
    return [
        Operator("Abs", ("series",), "absolute value"),
        Operator("Sign", ("series",), "-1, 0 or 1"),
        Operator("Log", ("series",), "natural logarithm, rounded as numpy does"),
        Operator("Not", ("condition",), "negation of a condition", gives_condition=True),
        *(Operator(n, pair, s) for n, s in values.items()),
        *(
            Operator(n, pair, f"left {s} right; NaN is {n == 'Ne'}", gives_condition=True)
            for n, s in tests.items()
        ),
        Operator("And", ("condition", "condition"), "both conditions", gives_condition=True),
        Operator("Or", ("condition", "condition"), "either condition", gives_condition=True),
        Operator("If", ("series", "operand", "operand"), "second where the first is true"),
        Operator("Mask", ("series", "text"), "the series of another instrument"),
        Operator("ChangeInstrument", ("text", "series"), "the series of another instrument"),
        Operator("Feature", ("text",), "a field by its quoted name"),
    ]


def _rolling() -> list[Operator]:
    plain = {
        "Mean": "mean",
        "Sum": "sum",
        "Std": "standard deviation (n - 1)",
        "Var": "variance (n - 1)",
        "Max": "maximum",
        "Min": "minimum",
        "IdxMax": "place of the maximum in the window, from 1; of the first NaN if there is one",
        "IdxMin": "place of the minimum in the window, from 1; of the first NaN if there is one",
        "Med": "median",
        "Mad": "mean absolute deviation",
        "Rank": "rank of today's value as a fraction of the values in the window",
        "Count": "number of values",
        "Slope": "slope of the regression on the row number",
        "Rsquare": "R squared of that regression; NaN where the deviation is under 2e-5",
        "Resi": "today's residual of that regression",
        "WMA": "linearly weighted mean over the count of values, as Qlib defines it",
    }
    window: tuple[Kind, ...] = ("series", "window")
    pair: tuple[Kind, ...] = ("series", "series", "window")
    return [
        *(Operator(n, window, f"rolling {s}", reach=_window_reach) for n, s in plain.items()),
        Operator("Skew", window, "rolling skewness", smallest=3, reach=_window_reach),
        Operator("Kurt", window, "rolling excess kurtosis", smallest=4, reach=_window_reach),
        Operator(
            "Quantile",
            ("series", "window", "share"),
            "rolling quantile, interpolated",
            reach=_window_reach,
        ),
        Operator("EMA", window, "exponential mean", decay=True, reach=_all_history),
        Operator(
            "Corr", pair, "rolling correlation; NaN at deviations < 2e-5", reach=_window_reach
        ),
        Operator("Cov", pair, "rolling covariance (n - 1)", reach=_window_reach),
        Operator("Ref", ("series", "lag"), "value `lag` rows ago; 0: the first", reach=_lag_reach),
        Operator("Delta", ("series", "lag"), "change over `lag` rows", reach=_delta_reach),
    ]


BUILT_IN: dict[str, Operator] = {o.name: o for o in [*_elementwise(), *_rolling()]}
_registered: dict[str, Operator] = {}
_KINDS = ("series", "operand", "condition", "window", "lag", "share", "text")
NOT_SUPPORTED = {
    "P": "point-in-time data is not supported",
    "PRef": "point-in-time data is not supported",
    "TResample": "resampling inside an expression is not supported; resample the bars instead",
    "Rolling": "name the operator itself (Mean, Sum, ...)",
}


def known_operators() -> dict[str, Operator]:
    """Every operator by name, registered ones included."""
    return {**BUILT_IN, **_registered}


def register_operator(
    name: str,
    function: Function | None = None,
    *,
    arguments: Sequence[Kind] = ("series", "window"),
    reach: Reach | None = None,
    summary: str = "",
    replace: bool = False,
) -> Any:
    """Add an operator of one's own to the language; usable as a decorator.

    `function(*arguments)` gets a `[D, N]` tensor for each series (float32 or float64; NaN is
    "no value", also before an instrument's first and after its last stored row) and a number for
    each constant, and returns a `[D, N]` tensor. Its columns are instruments, and a call may hold
    any subset of them: work down the rows, never across the columns, and change no argument in
    place. Conditions come as 0 and 1.

    `arguments` lists what each argument is (see `Kind`); `reach(*numbers)` gives the rows needed
    (before, after) from the numeric arguments, None before meaning all history. Without it a
    window `w` reaches `w - 1` rows back, a lag reaches back or ahead, and nothing else reaches.

        @register_operator("Range", arguments=("series", "window"))
        def rolling_range(x, window): ...

        evaluate(["Range($close, 5) / $close"], bars)

    Raises ConfigError where the name is taken (unless `replace`; a built-in stays) or is no name.
    """
    if not name.isidentifier():
        raise ConfigError(
            f"{name!r} cannot name an operator: give letters, digits and underscores."
        )
    if name in BUILT_IN or (name in _registered and not replace):
        raise ConfigError(
            f"the operator {name!r} exists already; choose another name"
            + ("." if name in BUILT_IN else " or pass replace=True.")
        )
    unknown = [kind for kind in arguments if kind not in _KINDS]
    if unknown or not any(kind in ("series", "operand", "condition") for kind in arguments):
        raise ArgumentError(
            f"the arguments of {name!r} are {tuple(arguments)}; expected kinds out of {_KINDS}, "
            "at least one of them series, operand or condition."
        )

    def register(function: Function) -> Function:
        reaching = reach or _default_reach(tuple(k for k in arguments if k in _KINDS[3:6]))
        _registered[name] = Operator(
            name, tuple(arguments), summary or name, reach=reaching, function=function
        )
        return function

    return register if function is None else register(function)


def _default_reach(numbers: tuple[str, ...]) -> Reach:
    def reach(*values: int) -> tuple[int | None, int]:
        before: int | None = 0
        after = 0
        for kind, value in zip(numbers, values, strict=True):
            if kind == "share":
                continue
            back, ahead = _window_reach(value) if kind == "window" else _delta_reach(value)
            before = None if before is None or back is None else max(before, back)
            after = max(after, ahead)
        return before, after

    return reach


def unregister_operator(name: str) -> None:
    """Take a registered operator out of the language again; unknown names are ignored."""
    _registered.pop(name, None)
