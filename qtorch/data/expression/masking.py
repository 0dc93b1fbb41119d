"""The operator Mask, which evaluates an expression for another instrument."""

from __future__ import annotations

from torch import Tensor

from qtorch.core.errors import unknown_name
from qtorch.data.expression.block import Block
from qtorch.data.expression.machine import Executor, Kernel
from qtorch.data.expression.node import Call, Text
from qtorch.data.expression.plan import Step, make_plan
from qtorch.data.expression.tokens import expression_error


def _mask(executor: Executor, step: Step) -> Tensor:
    """Evaluate the inner expression on the rows of the other instrument and copy it to all.

    The result is NaN outside each instrument's own span. Raises ExpressionError with the nearest
    name if the bars do not have the other instrument.
    """
    node, block = step.node, executor.block
    assert isinstance(node, Call)
    name = node.arguments[1]
    assert isinstance(name, Text)
    for bars in (block.bars, block.mask_bars):
        names_by_lower = {} if bars is None else {i.lower(): i for i in bars.instruments}
        if bars is not None and name.value.lower() in names_by_lower:
            bars = bars.select(instruments=[names_by_lower[name.value.lower()]])
            break
    else:
        raise expression_error(
            name.span, unknown_name("instrument", name.value, block.bars.instruments)
        )
    inner_block = Block(bars, 0, 1, block.mask_bars)
    inner_executor = Executor(inner_block, make_plan([node.arguments[0]]), executor.kernels)
    column = block.empty(rows=block.num_rows)[:, :1]
    inner_executor.run(lambda _: column)
    values = column.expand(-1, block.num_columns).contiguous()
    return block.mask_outside_span(values.to(step.dtype), head=True)


KERNELS: dict[str, Kernel] = {"Mask": _mask}
