"""The evaluation plan of a list of expressions: unique steps, and the windows that they need.

Equal subexpressions become one step. Rolling operators on the same step share their rolling sums
(Mean, Std, Slope and Corr of a series all use its sum), so the plan also collects all windows for
each series and family of sums.

A plan runs in stages. Within a stage, blocks of instruments are independent of each other.
Operators that compare the instruments of a day need all blocks of their stage, and end it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch

from qtorch.data.expression.operators import get_operators
from qtorch.data.expression.parser import (
    Call,
    Field,
    Node,
    Number,
    Text,
    fold,
    is_condition,
    is_cross_section,
    subnodes,
)

Argument: TypeAlias = int | Number | Text
"""An argument of a step: the index of another step, or a constant."""
Key: TypeAlias = tuple[int, ...]
"""The index of the step whose series is summed, or the indices of the two steps of a pair."""

_REGRESSION_SUMS = ("sum", "position")
FAMILIES: dict[str, tuple[str, ...]] = {
    "Sum": ("sum",),
    "Mean": ("sum",),
    "Count": ("count",),
    "Mad": ("sum",),
    "Std": ("sum", "square"),
    "Var": ("sum", "square"),
    "Skew": ("sum", "square"),
    "Kurt": ("sum", "square"),
    "Slope": _REGRESSION_SUMS,
    "Resi": _REGRESSION_SUMS,
    "Rsquare": (*_REGRESSION_SUMS, "square"),
    "WMA": _REGRESSION_SUMS,
    "DecayLinear": _REGRESSION_SUMS,
    "Product": ("factor",),
    "ArgMax": ("latest",),
    "ArgMin": ("latest",),
    "Max": ("max",),
    "Min": ("min",),
    "IdxMax": ("argmax",),
    "IdxMin": ("argmin",),
    "Rank": ("rank",),
    "Quantile": ("quantile",),
    "Med": ("quantile",),
}
# Operators whose results on float32 inputs are exact in float32.
_EXACT_IN_FLOAT32 = {"Max", "Min", "IdxMax", "IdxMin", "ArgMax", "ArgMin", "Count"}
# Operators whose results have the dtype of their input.
_KEEP_INPUT_DTYPE = {"Ref", "Delta", "Abs", "Log", "Mask"}


@dataclass
class Step:
    """An operation that is computed for all instruments.

    `is_wide` is True if numpy would compute the result in float64. `dtype` is the dtype used here,
    which is float64 only if a later difference could make the rounding error visible.
    """

    node: Field | Call
    operator: str
    arguments: tuple[Argument, ...]
    is_wide: bool
    is_condition: bool
    outputs: list[int] = field(default_factory=list)
    consumers: list[int] = field(default_factory=list)
    dtype: torch.dtype = torch.float32

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """The indices of the steps that this step reads."""
        return tuple(a for a in self.arguments if isinstance(a, int))

    @cached_property
    def constants(self) -> tuple[int | float, ...]:
        """The numeric arguments in order."""
        return tuple(a.value for a in self.arguments if isinstance(a, Number))

    @cached_property
    def is_cross_section(self) -> bool:
        """Whether the step compares the instruments of a day."""
        return is_cross_section(self.node)


@dataclass
class Stage:
    """A part of a plan: steps on blocks of instruments, then steps on whole days.

    `stored` are the steps on blocks whose values whole days or later stages read. `released` are
    the stored steps and steps on whole days that no later stage reads.
    """

    steps: list[int] = field(default_factory=list)
    day_steps: list[int] = field(default_factory=list)
    stored: set[int] = field(default_factory=set)
    released: list[int] = field(default_factory=list)


@dataclass
class Plan:
    """Steps in the order of computation, and the windows of each series."""

    steps: list[Step]
    windows: dict[tuple[Key, str], tuple[int, ...]]
    quantile_levels: dict[tuple[Key, int], tuple[float, ...]]

    @cached_property
    def all_windows(self) -> tuple[int, ...]:
        """All windows of all series, for the row counts that series share."""
        quantile_windows = [w for (_, w) in self.quantile_levels]
        return tuple(
            sorted({w for windows in self.windows.values() for w in windows} | {*quantile_windows})
        )

    @property
    def num_outputs(self) -> int:
        """The number of expressions."""
        return sum(len(step.outputs) for step in self.steps)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in order; a single one without operators that compare instruments.

        Fields are loaded again in each stage that reads them, because this is cheaper than storing
        them.
        """
        levels: list[int] = []
        for step in self.steps:
            inputs = [levels[i] + self.steps[i].is_cross_section for i in step.inputs]
            levels.append(max(inputs, default=0))
        stages = [Stage() for _ in range(max(levels, default=0) + 1)]
        for at, step in enumerate(self.steps):
            # (level, whether it reads whole days) of each consumer
            readers = {(levels[c], self.steps[c].is_cross_section) for c in step.consumers}
            if step.operator == "Field":
                for level in {level for level, is_day_step in readers if not is_day_step}:
                    stages[level].steps.append(at)
                if step.outputs and at not in stages[0].steps:
                    stages[0].steps.append(at)
                continue
            stage = stages[levels[at]]
            (stage.day_steps if step.is_cross_section else stage.steps).append(at)
            if not step.is_cross_section and readers - {(levels[at], False)}:
                stage.stored.add(at)
            if step.is_cross_section or at in stage.stored:
                last_level = max((level for level, _ in readers), default=levels[at])
                stages[last_level].released.append(at)
        return tuple(stages)

    def num_stored_bytes(self, num_cells: int) -> int:
        """Return the largest number of bytes of values `[D, N]` that the stages hold at once."""
        sizes = [torch.empty(0, dtype=s.dtype).element_size() * num_cells for s in self.steps]
        current, largest = 0, 0
        for stage in self.stages:
            current += sum(sizes[at] for at in [*stage.stored, *stage.day_steps])
            largest = max(largest, current)
            current -= sum(sizes[at] for at in stage.released)
        return largest

    def get_windows(self, key: Key, *families: str) -> tuple[int, ...]:
        """Return the windows of a series for the given families (default: all), ascending."""
        selection = {
            w
            for (k, family), windows in self.windows.items()
            if k == key and (not families or family in families)
            for w in windows
        }
        return tuple(sorted(selection))


def make_plan(roots: Sequence[Node]) -> Plan:
    """Build the plan of parsed expressions; output `k` is expression `k`."""
    return _Planner().plan(roots)


class _Planner:
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.positions: dict[tuple[Any, ...], int] = {}
        self.windows: dict[tuple[Key, str], set[int]] = {}
        self.quantile_levels: dict[tuple[Key, int], set[float]] = {}

    def plan(self, roots: Iterable[Node]) -> Plan:
        for output, root in enumerate(roots):
            self.steps[self.add_root(_hoist_masks(root))].outputs.append(output)
        for step in self.steps:
            step.dtype = self.choose_dtype(step)
        return Plan(
            self.steps,
            {key: tuple(sorted(w)) for key, w in self.windows.items()},
            {key: tuple(sorted(s)) for key, s in self.quantile_levels.items()},
        )

    def add_root(self, root: Node) -> int:
        """Add the steps of an expression and return the index of its last step."""
        index = fold(root, self.add_step, _children_in_plan)
        assert isinstance(index, int), root
        return index

    def add_step(self, node: Node, arguments: tuple[Argument, ...]) -> Argument:
        """Return the index of the step of a node, adding it if no equal step exists."""
        if isinstance(node, Number | Text):
            return node
        operator = "Field" if isinstance(node, Field) else node.operator
        key: tuple[Any, ...] = (operator, *arguments)
        if isinstance(node, Field):
            key = (operator, node.name)
        elif operator == "Mask":
            key = (operator, self.masked_planner.add_root(node.arguments[0]), node.arguments[1])
        if key in self.positions:
            return self.positions[key]
        step = Step(node, operator, arguments, False, is_condition(node))
        step.is_wide = self.is_wide(step)
        index = self.positions[key] = len(self.steps)
        self.steps.append(step)
        for i in set(step.inputs):
            self.steps[i].consumers.append(index)
        self.collect_windows(step)
        return index

    @cached_property
    def masked_planner(self) -> _Planner:
        """The planner that tells apart the arguments of Mask and knows their precision."""
        return _Planner()

    def is_wide(self, step: Step) -> bool:
        """Whether numpy and pandas would return float64."""
        if step.operator in ("Field", "Sign") or step.is_condition:
            return False
        if step.operator == "Mask":
            assert isinstance(step.node, Call)
            inner = self.masked_planner
            return inner.steps[inner.add_root(step.node.arguments[0])].is_wide
        inputs = [self.steps[i] for i in step.inputs]
        if step.operator in _KEEP_INPUT_DTYPE:
            return any(s.is_wide for s in inputs)
        kinds = get_operators()[step.operator].arguments
        if "operand" not in kinds:
            return True
        if step.operator == "If":
            inputs = [self.steps[a] for a in step.arguments[1:] if isinstance(a, int)]
        # With only conditions and constants as operands, numpy returns int64 or float64.
        return any(s.is_wide for s in inputs) or all(s.is_condition for s in inputs)

    def choose_dtype(self, step: Step) -> torch.dtype:
        """Use float64 if numpy does, unless rounding errors cannot become visible later."""
        if step.is_condition:
            return torch.bool
        is_exact = step.operator in _EXACT_IN_FLOAT32 and not any(
            self.steps[i].is_wide for i in step.inputs
        )
        # Relative errors stay small if only final products and quotients use the step.
        is_narrow = all(
            c.operator in ("Mul", "Div") and not c.consumers
            for c in (self.steps[i] for i in step.consumers)
        )
        return torch.float64 if step.is_wide and not is_exact and not is_narrow else torch.float32

    # -- windows -------------------------------------------------------------------------------

    def collect_windows(self, step: Step) -> None:
        if not step.constants or get_operators()[step.operator].function is not None:
            return
        window = step.constants[0]
        if step.operator in FAMILIES:
            self.request_windows(step.inputs, FAMILIES[step.operator], int(window))
        if step.operator in ("Quantile", "Med"):
            level = step.constants[1] if step.operator == "Quantile" else 0.5
            self.quantile_levels.setdefault((step.inputs, int(window)), set()).add(float(level))
        if step.operator in ("Corr", "Cov"):
            self.request_windows(step.inputs, ("product",), int(window))
            for i in step.inputs:
                self.request_windows((i,), ("sum", "square"), int(window))

    def request_windows(self, key: Key, families: Iterable[str], window: int) -> None:
        for family in families:
            self.windows.setdefault((key, family), set()).add(window)


def _children_in_plan(node: Node) -> tuple[Node, ...]:
    """Return the arguments of a call. That of Mask has a separate plan, for another instrument."""
    return () if isinstance(node, Call) and node.operator == "Mask" else subnodes(node)


def _hoist_masks(root: Node) -> Node:
    """Move Mask outwards as far as possible without changing the meaning.

    `Mean(Mask($close, 'x'), 5)` is `Mask(Mean($close, 5), 'x')`: the window uses the rows of x.
    """
    return fold(root, _hoist_mask)


def _hoist_mask(node: Node, arguments: tuple[Node, ...]) -> Node:
    if not isinstance(node, Call):
        return node
    series = [a for a in arguments if isinstance(a, Field | Call)]
    masks = {a.arguments[1] for a in series if isinstance(a, Call) and a.operator == "Mask"}
    is_masked_throughout = all(isinstance(a, Call) and a.operator == "Mask" for a in series)
    if is_cross_section(node) or not (is_masked_throughout and len(masks) == 1):
        return Call(node.operator, arguments, node.span)
    if node.operator == "Mask":  # the inner Mask takes precedence, as in Qlib
        return series[0]
    inner_arguments = tuple(
        a.arguments[0] if isinstance(a, Call) and a.operator == "Mask" else a for a in arguments
    )
    return Call("Mask", (Call(node.operator, inner_arguments, node.span), masks.pop()), node.span)
