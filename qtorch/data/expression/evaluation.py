"""Evaluation of expressions for all instruments at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtorch.core.errors import DataError, ExpressionError
from qtorch.data.device_memory import free_bytes
from qtorch.data.expression import accumulation, elementwise, history, quantile, rolling
from qtorch.data.expression.cross_section import check_result, compute_day_step
from qtorch.data.expression.executor import Executor, Kernel
from qtorch.data.expression.group_kernels import DeviceExecutor
from qtorch.data.expression.operators import Function, get_operators
from qtorch.data.expression.parser import Field, Node, field_name, parse, walk
from qtorch.data.expression.plan import Plan, Stage, Step, make_plan
from qtorch.data.expression.series import Block
from qtorch.data.panel.panel import Panel, select_rows
from qtorch.data.threads import map_threads
from qtorch.data.transfer import BlockFetcher, send_to_device
from qtorch.process.heartbeat import beat

log = logging.getLogger(__name__)

_COLUMNS = 48  # 48 float64 columns of 2500 rows take a megabyte, which fits into the CPU caches
# The memory of a block of instruments on a GPU in float32 planes, and the share that it may take.
MIN_PLANES, PLANES_PER_STEP, PLANES_PER_OUTPUT, MEMORY_SHARE = 512, 4, 2, 0.6
MAX_STORED_BYTES = 2**30  # of values that comparisons of the instruments of a day hold at once
KERNELS: dict[str, Kernel] = {
    **elementwise.KERNELS,
    **rolling.KERNELS,
    **quantile.KERNELS,
    **history.KERNELS,
    **accumulation.KERNELS,
}


def evaluate(
    expressions: str | Sequence[str] | Mapping[str, str],
    bars: Panel,
    *,
    out: Tensor | None = None,
    mask_bars: Panel | None = None,
    rows: slice | None = None,
    num_threads: int | None = None,
    device: torch.device | str | None = None,
) -> Panel:
    """Evaluate expressions on bars and return a panel with the same calendar and instruments.

    The fields of the result are the keys of the mapping, or else the expressions. Values are
    those of Qlib: a window of w rows ends at its date and uses the values that it contains (NaN
    if there are none), windows are clipped at the first stored row of an instrument, and values
    outside its span are NaN. Only `Ref` and `Delta` with a negative lag use future rows.
    Operators that compare the instruments of a day (CSRank, ...) see those that `bars.mask` has on
    that day, and return NaN for the others.

    bars: stored fields `[D, N, F]`, on the CPU or a GPU.
    out: a float32 tensor `[D, N, number of expressions]` of any strides that receives the
    result; by default a new field-major tensor on the device of the bars.
    rows: the rows of the result; the others are only read by windows. By default all.
    mask_bars: bars with the same dates and fields, of further instruments that `Mask` may name.
    num_threads: number of Python threads on the CPU, each with one torch thread; by default
    torch's number of threads.
    device: where to compute, by default the device of the bars. A GPU computes blocks of
    instruments that fit into its free memory; the host copies the results of one while the GPU
    computes the next. Results of a GPU equal those of the CPU up to rounding.

    Deliberate differences from Qlib: the standard deviation of a flat window is exactly 0
    (Qlib's rounding leaves 1e-9, which divided by 1e-12 gives 1e3 and more), and infinite values
    are treated as missing by Slope, Rsquare and Resi too (in Qlib they invalidate the rest of
    the series).

    Raises ExpressionError for expressions that cannot be parsed and for missing fields.
    """
    names, texts = _split_names(expressions)
    nodes = [parse(text) for text in texts]
    for node in (n for root in nodes for n in walk(root)):
        if isinstance(node, Field):
            field_name(node, bars.fields)
    result_bars = bars if rows is None else select_rows(bars, rows)
    d, n, _ = result_bars.shape
    if out is None:
        out = _new_storage(d, n, len(texts), bars.device)
    elif tuple(out.shape) != (d, n, len(texts)) or out.dtype != torch.float32:
        raise DataError(
            f"out is {out.dtype} {tuple(out.shape)}; expected float32 {(d, n, len(texts))} "
            "(dates, instruments, expressions)."
        )
    target = bars.device if device is None else torch.device(device)
    threads = _resolve_num_threads(num_threads, target)
    evaluation_class = _Evaluation if target.type == "cpu" else _DeviceEvaluation
    if d and n:
        first = 0
        on_device = _move_bars(bars, target)
        other_bars = None if mask_bars is None else _move_bars(mask_bars, target)
        for plan in _split_plan(nodes, len(bars.calendar) * n):
            part = out[:, :, first : first + plan.num_outputs]
            evaluation_class(plan, on_device, other_bars, part, rows, threads).run()
            first += plan.num_outputs
    return result_bars.replace(values=out, fields=names)


def _split_plan(nodes: Sequence[Node], num_cells: int) -> list[Plan]:
    """Plan all expressions together, or in parts if they would store too many values `[D, N]`.

    Parts share no steps, so they compute some of them again.
    """
    plan = make_plan(nodes)
    if len(nodes) == 1 or plan.num_stored_bytes(num_cells) <= MAX_STORED_BYTES:
        return [plan]
    middle = len(nodes) // 2
    return [p for part in (nodes[:middle], nodes[middle:]) for p in _split_plan(part, num_cells)]


class _Evaluation:
    """The evaluation of a plan on all instruments, stage by stage, into `out`."""

    def __init__(
        self,
        plan: Plan,
        bars: Panel,
        mask_bars: Panel | None,
        out: Tensor,
        rows: slice | None,
        num_threads: int,
    ) -> None:
        self.plan, self.bars, self.mask_bars = plan, bars, mask_bars
        self.out, self.rows, self.num_threads = out, rows, num_threads
        self.kernels = _select_kernels(plan)
        self.stored: dict[int, Tensor] = {}  # by step, values [D, N] that whole days or stages read

    def run(self) -> None:
        for stage in self.plan.stages:
            if stage.steps:
                self.run_block_steps(stage)
            if stage.day_steps:
                self.run_day_steps(stage)
            for at in stage.released:
                del self.stored[at]

    def run_block_steps(self, stage: Stage) -> None:
        """Compute the steps on blocks of instruments."""
        d, n, _ = self.bars.shape
        for at in stage.stored:
            dtype = self.plan.steps[at].dtype
            self.stored[at] = torch.empty((d, n), dtype=dtype, device=self.bars.device)

        self.compute_blocks(stage)

    def compute_blocks(self, stage: Stage) -> None:
        """Compute the steps of a stage, block by block."""
        n = len(self.bars.instruments)

        def run(span: tuple[int, int]) -> None:
            start, stop = span
            beat("features", columns=f"{stop}/{n}")
            with torch.no_grad():  # by thread
                block = Block(self.bars, start, stop, self.mask_bars)
                executor = Executor(block, self.plan, self.kernels, stage, self.stored)
                executor.run(self.out[:, start:stop], self.rows)

        spans = _column_spans(n, _COLUMNS)
        map_threads(run, spans, min(len(spans), self.num_threads))

    def run_day_steps(self, stage: Stage) -> None:
        """Compute the steps that compare the instruments of a day."""
        block = Block(self.bars, 0, len(self.bars.instruments))
        for at in stage.day_steps:
            step = self.plan.steps[at]
            beat("features", operator=step.operator)
            self.stored[at] = compute_day_step(
                step, self.plan, self.stored, block, num_threads=self.num_threads
            )
            for output in step.outputs:
                self.out[:, :, output] = self.stored[at][self.rows or slice(None)]


class _DeviceEvaluation(_Evaluation):
    """The evaluation on a GPU, in blocks that fit into its free memory.

    `out` may be in host memory: then a block is copied there while the next one is computed.
    """

    def run(self) -> None:
        result = self.out
        if len(self.plan.stages) == 1 or result.device == self.bars.device:
            super().run()
            return
        # The stages write single columns, which would be slow in host memory.
        d, n, f = result.shape
        self.out = _new_storage(d, n, f, self.bars.device)
        super().run()
        result.copy_(self.out)

    def compute_blocks(self, stage: Stage) -> None:
        n = len(self.bars.instruments)
        fetcher = None if self.out.device == self.bars.device else BlockFetcher(self.bars.device)
        pending = _column_spans(n, self.block_width())[::-1]
        while pending:
            start, stop = pending.pop()
            beat("features", columns=f"{stop}/{n}")
            target = self.out[:, start:stop]
            values = target if fetcher is None else self.allocate_block(target)
            if not self.try_block(stage, start, stop, values):
                middle = (start + stop) // 2
                log.info("%d instruments need too much of the GPU's memory", stop - start)
                pending += [(middle, stop), (start, middle)]
            elif fetcher is not None:
                fetcher.add(_match_layout(values, target), target)
        if fetcher is not None:
            fetcher.finish()

    def allocate_block(self, target: Tensor) -> Tensor:
        """Allocate the results of a block, by field: its copies read and write whole rows."""
        d, n, f = target.shape
        return _new_storage(d, n, f, self.bars.device)

    def try_block(self, stage: Stage, start: int, stop: int, values: Tensor) -> bool:
        """Compute a block; return False if the memory did not suffice and it can be divided."""
        block = Block(self.bars, start, stop, self.mask_bars)
        try:
            with torch.no_grad():
                executor = DeviceExecutor(block, self.plan, self.kernels, stage, self.stored)
                executor.run(values, self.rows)
        except torch.OutOfMemoryError:
            if stop - start == 1:
                raise
            return False
        return True

    def block_width(self) -> int:
        """Return how many instruments fit into the free memory at once."""
        free = free_bytes(self.bars.device)
        assert free is not None, "a GPU"
        num_planes = MIN_PLANES + PLANES_PER_STEP * len(self.plan.steps)
        num_planes += PLANES_PER_OUTPUT * self.plan.num_outputs
        column_bytes = 4 * num_planes * len(self.bars.calendar)
        return max(1, int(MEMORY_SHARE * free / column_bytes))


def _match_layout(values: Tensor, target: Tensor) -> Tensor:
    """Return values `[D, n, F]` laid out in the order of the dimensions of `target`."""
    strides = target.stride()
    order = sorted(range(3), key=lambda dim: -strides[dim])
    return values.permute(order).contiguous().permute([order.index(dim) for dim in range(3)])


def _move_bars(bars: Panel, device: torch.device) -> Panel:
    """Return the bars on a device, their spans on the host, which decides by them."""
    if bars.device == device and bars.spans.device.type == "cpu":
        return bars
    values = send_to_device(bars.values.permute(2, 0, 1), device).permute(1, 2, 0)
    return Panel(
        values,
        bars.calendar,
        bars.instruments,
        bars.fields,
        mask=send_to_device(bars.mask, device),
        spans=bars.spans.cpu(),
    )


def _split_names(
    expressions: str | Sequence[str] | Mapping[str, str],
) -> tuple[list[str], list[str]]:
    if isinstance(expressions, str):
        expressions = [expressions]
    if isinstance(expressions, Mapping):
        return list(expressions), list(expressions.values())
    return list(expressions), list(expressions)


def _new_storage(d: int, n: int, f: int, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty((f, d, n), device=device).permute(1, 2, 0)
    # Unlike torch, numpy requests huge pages, which makes the first write to a large array
    # several times faster.
    return torch.from_numpy(np.empty((f, d, n), dtype=np.float32)).permute(1, 2, 0)


def _select_kernels(plan: Plan) -> dict[str, Kernel]:
    kernels = dict(KERNELS)
    for step in plan.steps:
        operator = get_operators().get(step.operator)
        if operator is not None and operator.function is not None:
            kernels[step.operator] = _user_kernel
    return kernels


def _user_kernel(executor: Executor, step: Step) -> Tensor:
    """Call a user-defined operator with tensors and numbers, and validate its result `[D, n]`."""
    operator = get_operators()[step.operator]
    assert operator.function is not None
    arguments = [
        executor.get_numbers(step, k) if isinstance(a, int) else a.value
        for k, a in enumerate(step.arguments)
    ]
    result = operator.function(*arguments)
    block = executor.block
    check_result(step.operator, result, (block.num_rows, block.num_columns))
    if block.start == 0:
        _check_independence(step.operator, operator.function, arguments, result)
    return block.mask_outside_span(result.to(step.dtype, copy=True), head=True)


def _check_independence(
    name: str, function: Function, arguments: Sequence[Any], result: Tensor
) -> None:
    """Raise ExpressionError if a user's operator gives other values for a part of the columns."""
    n = result.shape[1]
    if n < 2:
        return
    # Two parts without a common column: an operator that depends on a single one is found too.
    parts = [slice(0, n, 9), slice(4, n, 9)] if n > 9 else [slice(0, n // 2), slice(n // 2, n)]
    for columns in parts:
        part = function(
            *(a[:, columns].contiguous() if isinstance(a, Tensor) else a for a in arguments)
        )
        expected = result[:, columns]
        check_result(name, part, tuple(expected.shape))
        scale = torch.nan_to_num(expected.double(), nan=0.0, posinf=0.0, neginf=0.0).abs().amax()
        tolerance = 1e-6 * float(scale)
        if not torch.allclose(
            part.double(), expected.double(), rtol=1e-4, atol=tolerance, equal_nan=True
        ):
            raise ExpressionError(
                f"the operator {name!r} gives an instrument other values when some of the other "
                "instruments are left out. Register it with cross_section=True if it compares "
                "the instruments of a day; otherwise it must treat each column independently."
            )


# -- blocks and threads ----------------------------------------------------------------------------


def _column_spans(n: int, width: int) -> list[tuple[int, int]]:
    """Split the columns into blocks of about the same size, at most `width`."""
    blocks = -(-n // width)
    edges = [round(k * n / blocks) for k in range(blocks + 1)]
    return list(pairwise(edges))


def _resolve_num_threads(num_threads: int | None, device: torch.device) -> int:
    if device.type != "cpu":
        return 1
    if num_threads is None:
        num_threads = torch.get_num_threads() or os.cpu_count() or 1
    if num_threads < 1:
        raise DataError(f"num_threads is {num_threads}; expected at least 1.")
    return num_threads
