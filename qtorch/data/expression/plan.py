"""What to compute, once each: the steps behind a list of expressions, and their windows.

Equal subexpressions become one step. Rolling operators over the same step share their rolling
sums (Mean, Std, Slope and Corr of one series all use its sum), so the plan also collects, for
each series and family of sums, the whole set of windows asked for: `window_chain` then builds each
window from shorter ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import torch

from qtorch.data.expression.node import Call, Field, Node, Number, Text
from qtorch.data.expression.operators import known_operators
from qtorch.data.expression.parser import is_condition

Argument: TypeAlias = int | Number | Text
"""An argument of a step: another step by its place, or a constant."""
Key: TypeAlias = tuple[int, ...]
"""The step whose series is summed, or the two steps of a pair."""

_REGRESSION = ("sum", "position")
FAMILIES: dict[str, tuple[str, ...]] = {
    "Sum": ("sum",),
    "Mean": ("sum",),
    "Count": ("count",),
    "Mad": ("sum",),
    "Std": ("sum", "square"),
    "Var": ("sum", "square"),
    "Skew": ("sum", "square"),
    "Kurt": ("sum", "square"),
    "Slope": _REGRESSION,
    "Resi": _REGRESSION,
    "Rsquare": (*_REGRESSION, "square"),
    "WMA": _REGRESSION,
    "Max": ("max",),
    "Min": ("min",),
    "IdxMax": ("argmax",),
    "IdxMin": ("argmin",),
    "Rank": ("rank",),
    "Quantile": ("quantile",),
    "Med": ("quantile",),
}
# Results of these are float32 numbers if what they look at is.
_EXACT = {"Max", "Min", "IdxMax", "IdxMin", "Count"}
# These keep the type of what they look at.
_LIKE_INPUT = {"Ref", "Delta", "Abs", "Log", "Mask"}


@dataclass
class Step:
    """One thing to compute for all instruments.

    `wide` says that numpy would hold the result in float64; `dtype` is what it is stored in here:
    float64 only where a later difference could show the rounding.
    """

    node: Field | Call
    operator: str
    arguments: tuple[Argument, ...]
    wide: bool
    condition: bool
    outputs: list[int] = field(default_factory=list)
    consumers: list[int] = field(default_factory=list)
    dtype: torch.dtype = torch.float32

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """The steps that this one reads."""
        return tuple(a for a in self.arguments if isinstance(a, int))

    @cached_property
    def numbers(self) -> tuple[int | float, ...]:
        """Its constants in order."""
        return tuple(a.value for a in self.arguments if isinstance(a, Number))


@dataclass
class Plan:
    """Steps in an order in which they can be computed, and the windows of each series."""

    steps: list[Step]
    windows: dict[tuple[Key, str], tuple[int, ...]]
    shares: dict[tuple[Key, int], tuple[float, ...]]

    @cached_property
    def all_windows(self) -> tuple[int, ...]:
        """All windows asked of anything, for what all series share."""
        long = [w for (_, w) in self.shares]
        return tuple(sorted({w for windows in self.windows.values() for w in windows} | {*long}))

    def windows_of(self, key: Key, *families: str) -> tuple[int, ...]:
        """All windows asked of the families of a series, ascending; all families if none named."""
        found = {
            w
            for (k, family), windows in self.windows.items()
            if k == key and (not families or family in families)
            for w in windows
        }
        return tuple(sorted(found))


def make_plan(roots: Sequence[Node]) -> Plan:
    """The plan of parsed expressions; output `k` is expression `k`."""
    return _Planner().plan(roots)


class _Planner:
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.place: dict[Node, int] = {}
        self.windows: dict[tuple[Key, str], set[int]] = {}
        self.shares: dict[tuple[Key, int], set[float]] = {}

    def plan(self, roots: Iterable[Node]) -> Plan:
        for output, root in enumerate(roots):
            self.steps[self.step(_hoisted(root))].outputs.append(output)
        for at in range(len(self.steps) - 1, -1, -1):
            self.choose_dtype(at)
        return Plan(
            self.steps,
            {key: tuple(sorted(w)) for key, w in self.windows.items()},
            {key: tuple(sorted(s)) for key, s in self.shares.items()},
        )

    def step(self, node: Node) -> int:
        known = self.place.get(node)
        if known is not None:
            return known
        assert isinstance(node, Field | Call), node
        operator = "Field" if isinstance(node, Field) else node.operator
        arguments: tuple[Argument, ...] = ()
        # Mask changes the instruments under it, so its series is a plan of its own.
        if isinstance(node, Call) and operator != "Mask":
            arguments = tuple(
                a if isinstance(a, Number | Text) else self.step(a) for a in node.arguments
            )
        step = Step(node, operator, arguments, False, is_condition(node))
        step.wide = self.is_wide(step)
        at = self.place[node] = len(self.steps)
        self.steps.append(step)
        for i in set(step.inputs):
            self.steps[i].consumers.append(at)
        self.collect_windows(step)
        return at

    def is_wide(self, step: Step) -> bool:
        """Whether numpy and pandas would give float64."""
        if step.operator in ("Field", "Sign") or step.condition:
            return False
        if step.operator == "Mask":
            assert isinstance(step.node, Call)
            inner = _Planner()
            return inner.steps[inner.step(step.node.arguments[0])].wide
        inputs = [self.steps[i] for i in step.inputs]
        if step.operator in _LIKE_INPUT:
            return any(s.wide for s in inputs)
        kinds = known_operators()[step.operator].arguments
        if "operand" not in kinds:
            return True
        if step.operator == "If":
            inputs = [self.steps[a] for a in step.arguments[1:] if isinstance(a, int)]
        # Beside a condition (or alone) a constant becomes int64 or float64.
        return any(s.wide for s in inputs) or all(s.condition for s in inputs)

    def choose_dtype(self, at: int) -> None:
        """Store in float64 what numpy holds in float64, unless rounding cannot show later."""
        step = self.steps[at]
        if step.condition:
            step.dtype = torch.bool
        elif step.wide and not self.is_exact(at) and not self.is_narrow(at):
            step.dtype = torch.float64

    def is_exact(self, at: int) -> bool:
        step = self.steps[at]
        return step.operator in _EXACT and not any(self.steps[i].wide for i in step.inputs)

    def is_narrow(self, at: int) -> bool:
        """Only products and quotients that are outputs use it: a relative error stays small."""
        return self.is_final(at) or all(
            self.steps[c].operator in ("Mul", "Div") and self.is_final(c)
            for c in self.steps[at].consumers
        )

    def is_final(self, at: int) -> bool:
        return not self.steps[at].consumers

    # -- windows -------------------------------------------------------------------------------

    def collect_windows(self, step: Step) -> None:
        if not step.numbers or known_operators()[step.operator].function is not None:
            return
        window = step.numbers[0]
        if step.operator in FAMILIES:
            self.ask(step.inputs, FAMILIES[step.operator], int(window))
        if step.operator in ("Quantile", "Med"):
            share = step.numbers[1] if step.operator == "Quantile" else 0.5
            self.shares.setdefault((step.inputs, int(window)), set()).add(float(share))
        if step.operator in ("Corr", "Cov"):
            self.ask(step.inputs, ("product",), int(window))
            for i in step.inputs:
                self.ask((i,), ("sum", "square"), int(window))

    def ask(self, key: Key, families: Iterable[str], window: int) -> None:
        for family in families:
            self.windows.setdefault((key, family), set()).add(window)


def _hoisted(node: Node) -> Node:
    """The same expression with Mask as far out as it goes.

    `Mean(Mask($close, 'x'), 5)` is `Mask(Mean($close, 5), 'x')`: x's own rows fill the window.
    """
    if not isinstance(node, Call):
        return node
    arguments = tuple(_hoisted(a) for a in node.arguments)
    series = [a for a in arguments if isinstance(a, Field | Call)]
    masks = {a.arguments[1] for a in series if isinstance(a, Call) and a.operator == "Mask"}
    whole = all(isinstance(a, Call) and a.operator == "Mask" for a in series)
    if not (whole and len(masks) == 1):
        return Call(node.operator, arguments, node.span)
    if node.operator == "Mask":  # the inner one decides, as in Qlib
        return series[0]
    bare = tuple(
        a.arguments[0] if isinstance(a, Call) and a.operator == "Mask" else a for a in arguments
    )
    return Call("Mask", (Call(node.operator, bare, node.span), masks.pop()), node.span)


# -- windows from shorter windows ------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """Window `window` is window `older` shifted back by `shift` rows, and window `newer`."""

    window: int
    newer: int
    older: int
    shift: int


def window_chain(windows: Iterable[int], *, overlap: bool = False) -> tuple[Link, ...]:
    """Steps that build every window from window 1, few of them.

    Sums need parts that meet exactly; where the parts may `overlap` (a maximum counts a row twice
    without harm), any window is two copies of one at least half as long.

        window_chain([5, 10]) -> 2 = 1 + 1, 4 = 2 + 2, 5 = 1 + 4, 10 = 5 + 5
    """
    built, links = {1}, []

    def build(window: int) -> None:
        if window in built:
            return
        if overlap:
            part = min((b for b in built if 2 * b >= window), default=0)
            if not part:
                build((window + 1) // 2)
                part = min(b for b in built if 2 * b >= window)
            links.append(Link(window, part, part, window - part))
        else:
            newer, older = _split(window, built)
            build(newer)
            build(older)
            links.append(Link(window, newer, older, newer))
        built.add(window)

    for window in sorted(set(windows)):
        build(window)
    return tuple(links)


def _split(window: int, built: set[int]) -> tuple[int, int]:
    """Two parts of a window, built ones where there are such."""
    for part in sorted(built, reverse=True):
        if window - part in built:
            return part, window - part
    if window % 2 == 0:
        return window // 2, window // 2
    largest = max((b for b in built if window < 2 * b < 2 * window), default=0)
    if largest:
        return window - largest, largest
    return 1, window - 1
