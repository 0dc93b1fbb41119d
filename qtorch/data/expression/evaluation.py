"""Evaluation of expressions for all instruments at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from qtorch.core.errors import DataError, ExpressionError
from qtorch.data.expression import elementwise, history, quantile, rolling
from qtorch.data.expression.executor import Executor, Kernel
from qtorch.data.expression.operators import get_operators
from qtorch.data.expression.parser import Field, field_name, parse, walk
from qtorch.data.expression.plan import Plan, Step, make_plan
from qtorch.data.expression.series import Block
from qtorch.data.panel.panel import Panel
from qtorch.data.threads import map_threads
from qtorch.process.heartbeat import beat

_COLUMNS = 48  # 48 float64 columns of 2500 rows take a megabyte, which fits into the CPU caches
KERNELS: dict[str, Kernel] = {
    **elementwise.KERNELS,
    **rolling.KERNELS,
    **quantile.KERNELS,
    **history.KERNELS,
}


def evaluate(
    expressions: str | Sequence[str] | Mapping[str, str],
    bars: Panel,
    *,
    out: Tensor | None = None,
    mask_bars: Panel | None = None,
    num_threads: int | None = None,
) -> Panel:
    """Evaluate expressions on bars and return a panel with the same calendar and instruments.

    The fields of the result are the keys of the mapping, or else the expressions. Values are
    those of Qlib: a window of w rows ends at its date and uses the values that it contains (NaN
    if there are none), windows are clipped at the first stored row of an instrument, and values
    outside its span are NaN. Only `Ref` and `Delta` with a negative lag use future rows.

    bars: stored fields `[D, N, F]`, on the CPU or a GPU; the computation runs on their device.
    out: a float32 tensor `[D, N, number of expressions]` of any strides that receives the
    result; by default a new field-major tensor.
    mask_bars: bars with the same dates and fields, of further instruments that `Mask` may name.
    num_threads: number of Python threads on the CPU, each with one torch thread; by default
    torch's number of threads.

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
    plan = make_plan(nodes)
    d, n, _ = bars.shape
    if out is None:
        out = _new_storage(d, n, len(texts), bars.device)
    elif tuple(out.shape) != (d, n, len(texts)) or out.dtype != torch.float32:
        raise DataError(
            f"out is {out.dtype} {tuple(out.shape)}; expected float32 {(d, n, len(texts))} "
            "(dates, instruments, expressions)."
        )
    target = out

    def run(span: tuple[int, int]) -> None:
        start, stop = span
        beat("features", columns=f"{stop}/{n}")
        with torch.no_grad():  # by thread
            executor = Executor(Block(bars, start, stop, mask_bars), plan, kernels)
            executor.run(lambda k: target[:, start:stop, k])

    kernels = _select_kernels(plan)
    threads = _resolve_num_threads(num_threads, bars.device)
    if d and n:
        spans = _column_spans(n, bars.device)
        map_threads(run, spans, min(len(spans), threads))
    return bars.replace(values=target, fields=names)


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
    shape = (block.num_rows, block.num_columns)
    if not isinstance(result, Tensor) or tuple(result.shape) != shape:
        actual = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ExpressionError(
            f"the operator {step.operator!r} returned {actual}; expected a tensor {shape} "
            "(dates, instruments), the shape of its arguments."
        )
    return block.mask_outside_span(result.to(step.dtype, copy=True), head=True)


# -- blocks and threads ----------------------------------------------------------------------------


def _column_spans(n: int, device: torch.device) -> list[tuple[int, int]]:
    """Split the columns into blocks that fit into the CPU cache; larger blocks on a GPU."""
    width = _COLUMNS if device.type == "cpu" else 1024
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
