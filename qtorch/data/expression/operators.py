"""The operators of the expression language: their arguments, results, and lookback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from qtorch.core.errors import ArgumentError, ConfigError

Kind: TypeAlias = Literal["series", "operand", "condition", "window", "lag", "share", "text"]
"""The kind of an argument.

- `series`: an expression with at least one field;
- `operand`: a series or a constant;
- `condition`: a comparison, or And, Or, Not of conditions;
- `window`: an integer number of rows, 0 for all past rows;
- `lag`: an integer number of rows, negative for the future;
- `share`: a number between 0 and 1, both inclusive, such as the level of a quantile;
- `text`: a quoted name.
"""
Reach: TypeAlias = Callable[..., tuple[int | None, int]]
Function: TypeAlias = Callable[..., Tensor]


@dataclass(frozen=True)
class Operator:
    """The definition of an operator.

    `min_window` is the smallest window other than 0. With `allows_alpha`, the window may be a
    number in (0, 1), the alpha of an exponential mean. `reach` maps the numeric arguments to the
    needed rows (before, after); None before means all history. `num_optional` arguments at the
    end may be left out. A `cross_section` operator compares the instruments of a day. `function`
    is the implementation of a user-defined operator.
    """

    name: str
    arguments: tuple[Kind, ...]
    summary: str
    returns_condition: bool = False
    min_window: int = 1
    allows_alpha: bool = False
    reach: Reach | None = None
    num_optional: int = 0
    cross_section: bool = False
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


def _elementwise_operators() -> list[Operator]:
    pair: tuple[Kind, ...] = ("operand", "operand")
    summaries = {
        "Add": "sum of two series",
        "Sub": "difference",
        "Mul": "product",
        "Div": "quotient (x/0 is inf, 0/0 is NaN)",
        "Power": "left to the power of right",
        "Greater": "the larger of two values; NaN if either is NaN",
        "Less": "the smaller of two values; NaN if either is NaN",
    }
    symbols = {"Gt": ">", "Ge": ">=", "Lt": "<", "Le": "<=", "Eq": "==", "Ne": "!="}
    return [
        Operator("Abs", ("series",), "absolute value"),
        Operator("Sign", ("series",), "-1, 0 or 1"),
        Operator("Log", ("series",), "natural logarithm, rounded as by numpy"),
        Operator("Not", ("condition",), "negation of a condition", returns_condition=True),
        *(Operator(n, pair, s) for n, s in summaries.items()),
        *(
            Operator(n, pair, f"left {s} right; NaN is {n == 'Ne'}", returns_condition=True)
            for n, s in symbols.items()
        ),
        Operator("And", ("condition", "condition"), "both conditions", returns_condition=True),
        Operator("Or", ("condition", "condition"), "either condition", returns_condition=True),
        Operator("If", ("series", "operand", "operand"), "second if first is true, else third"),
        Operator("Mask", ("series", "text"), "the series of another instrument"),
        Operator("ChangeInstrument", ("text", "series"), "the series of another instrument"),
        Operator("Feature", ("text",), "a field by its quoted name"),
    ]


def _rolling_operators() -> list[Operator]:
    summaries = {
        "Mean": "mean",
        "Sum": "sum",
        "Std": "standard deviation (n - 1)",
        "Var": "variance (n - 1)",
        "Max": "maximum",
        "Min": "minimum",
        "IdxMax": "position of the maximum in the window, from 1; of the first NaN if there is one",
        "IdxMin": "position of the minimum in the window, from 1; of the first NaN if there is one",
        "Med": "median",
        "Mad": "mean absolute deviation",
        "Rank": "rank of today's value as a fraction of the values in the window",
        "Count": "number of values",
        "Slope": "slope of the regression on row numbers",
        "Rsquare": "R squared of that regression; NaN if the standard deviation is at most 2e-5",
        "Resi": "today's residual of that regression",
        "WMA": "linearly weighted mean divided by the count of values, as in Qlib",
    }
    window: tuple[Kind, ...] = ("series", "window")
    pair: tuple[Kind, ...] = ("series", "series", "window")
    return [
        *(Operator(n, window, f"rolling {s}", reach=_window_reach) for n, s in summaries.items()),
        Operator("Skew", window, "rolling skewness", min_window=3, reach=_window_reach),
        Operator("Kurt", window, "rolling excess kurtosis", min_window=4, reach=_window_reach),
        Operator(
            "Quantile",
            ("series", "window", "share"),
            "rolling quantile, interpolated",
            reach=_window_reach,
        ),
        Operator("DecayLinear", window, "rolling mean with weights 1..w", reach=_window_reach),
        Operator("Product", window, "rolling product", reach=_window_reach),
        Operator(
            "ArgMax",
            window,
            "position of the first maximum in the window, from 1, whatever is missing",
            reach=_window_reach,
        ),
        Operator(
            "ArgMin",
            window,
            "position of the first minimum in the window, from 1, whatever is missing",
            reach=_window_reach,
        ),
        Operator("EMA", window, "exponential mean", allows_alpha=True, reach=_all_history),
        Operator(
            "Corr", pair, "rolling correlation; NaN at deviations < 2e-5", reach=_window_reach
        ),
        Operator("Cov", pair, "rolling covariance (n - 1)", reach=_window_reach),
        Operator(
            "Ref", ("series", "lag"), "value `lag` rows ago; 0: first value", reach=_lag_reach
        ),
        Operator("Delta", ("series", "lag"), "change over `lag` rows", reach=_delta_reach),
    ]


def _cross_section_operators() -> list[Operator]:
    summaries = {
        "CSRank": "rank among the day's members as a fraction of their number; ties: average rank",
        "CSZScore": "(x - mean) / standard deviation (n - 1) of the day's members",
        "CSScale": "x divided by the sum of the absolute values of the day's members",
        "CSDemean": "x minus the mean of the day's members",
    }
    return [
        Operator(
            name,
            ("series", "series"),
            f"{summary}; a second series limits it to members with an equal value, such as an "
            "industry",
            num_optional=1,
            cross_section=True,
        )
        for name, summary in summaries.items()
    ]


BUILT_IN: dict[str, Operator] = {
    o.name: o
    for o in [*_elementwise_operators(), *_rolling_operators(), *_cross_section_operators()]
}
_user_operators: dict[str, Operator] = {}
_KINDS = get_args(Kind)
NUMBER_KINDS = ("window", "lag", "share")
NOT_SUPPORTED = {
    "P": "point-in-time data is not supported",
    "PRef": "point-in-time data is not supported",
    "TResample": "resampling inside an expression is not supported; resample the bars instead",
    "Rolling": "use the operator itself (Mean, Sum, ...)",
}


def get_operators() -> dict[str, Operator]:
    """Return all operators by name, including registered ones."""
    return {**BUILT_IN, **_user_operators}


def get_user_operators() -> tuple[Operator, ...]:
    """Return the registered operators."""
    return tuple(_user_operators.values())


def register_operator(
    name: str,
    function: Function | None = None,
    *,
    arguments: Sequence[Kind] = ("series", "window"),
    reach: Reach | None = None,
    summary: str = "",
    cross_section: bool = False,
    replace: bool = False,
) -> Any:
    """Register a user-defined operator; can be used as a decorator.

    `function(*arguments)` receives a `[D, N]` tensor for each series (float32 or float64; NaN is
    a missing value, also before the first and after the last stored row of an instrument) and a
    number for each constant, and returns a `[D, N]` tensor. Conditions are passed as 0 and 1. A
    call may contain any subset of the instruments, so the function must treat each column
    independently, and it must not modify its arguments. Every evaluation compares its result on a
    few columns with a second call, and raises ExpressionError if it depends on the others.

    With `cross_section`, the function may compare the instruments of a day: one call contains all
    rows and instruments, and values of instruments that are not in the universe on their day are
    NaN, before and after the call.

    `arguments` lists the kind of each argument (see `Kind`). `reach(*numbers)` maps the numeric
    arguments to the needed rows (before, after); None before means all history. By default, a
    window `w` needs `w - 1` rows before, and a lag needs rows before or after.

        @register_operator("Range", arguments=("series", "window"))
        def rolling_range(x, window): ...

        evaluate(["Range($close, 5) / $close"], bars)

    Raises ConfigError if the name is not an identifier or exists already. `replace` allows
    replacing a registered operator, but not a built-in one.
    """
    if not name.isidentifier():
        raise ConfigError(f"{name!r} cannot name an operator: use letters, digits and underscores.")
    if name in BUILT_IN or (name in _user_operators and not replace):
        raise ConfigError(
            f"the operator {name!r} exists already; choose another name"
            + ("." if name in BUILT_IN else " or pass replace=True.")
        )
    unknown_kinds = [kind for kind in arguments if kind not in _KINDS]
    if unknown_kinds or not any(kind in ("series", "operand", "condition") for kind in arguments):
        raise ArgumentError(
            f"the arguments of {name!r} are {tuple(arguments)}; expected kinds from {_KINDS}, "
            "with at least one series, operand or condition."
        )

    def register(function: Function) -> Function:
        operator_reach = reach or _default_reach(tuple(k for k in arguments if k in NUMBER_KINDS))
        _user_operators[name] = Operator(
            name,
            tuple(arguments),
            summary or name,
            reach=operator_reach,
            cross_section=cross_section,
            function=function,
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
    """Remove a registered operator; unknown names are ignored."""
    _user_operators.pop(name, None)
