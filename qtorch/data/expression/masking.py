"""Mask: an expression over another instrument, seen by every instrument."""

from __future__ import annotations

from torch import Tensor

from qtorch.core.errors import unknown_name
from qtorch.data.expression.block import Block
from qtorch.data.expression.machine import Kernel, Machine
from qtorch.data.expression.node import Call, Text
from qtorch.data.expression.plan import Step, make_plan
from qtorch.data.expression.tokens import error_at


def _mask(machine: Machine, step: Step) -> Tensor:
    """The inner expression over the other instrument's own rows, as a column for all.

    It is cut to each instrument's span: a row that an instrument lacks has no value. Raises
    ExpressionError with the nearest name for an instrument that the bars lack.
    """
    node, block = step.node, machine.block
    assert isinstance(node, Call)
    name = node.arguments[1]
    assert isinstance(name, Text)
    for bars in (block.bars, block.others):
        known = {} if bars is None else {i.lower(): i for i in bars.instruments}
        if bars is not None and name.value.lower() in known:
            bars = bars.select(instruments=[known[name.value.lower()]])
            break
    else:
        raise error_at(name.span, unknown_name("instrument", name.value, block.bars.instruments))
    inner = Block(bars, 0, 1, block.others)
    other = Machine(inner, make_plan([node.arguments[0]]), machine.kernels)
    column = block.empty(rows=block.num_rows)[:, :1]
    other.run(lambda _: column)
    values = column.expand(-1, block.num_columns).contiguous()
    return block.seal(values.to(step.dtype), head=True)


KERNELS: dict[str, Kernel] = {"Mask": _mask}
