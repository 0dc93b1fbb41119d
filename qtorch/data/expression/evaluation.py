"""Expressions to numbers, for all instruments at once."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from qtorch.core.errors import DataError, ExpressionError
from qtorch.core.heartbeat import beat
from qtorch.data.expression import (
    elementwise,
    history,
    masking,
    quantile,
    rolling_order,
    rolling_sum,
)
from qtorch.data.expression.block import Block, field_name
from qtorch.data.expression.machine import Kernel, Machine
from qtorch.data.expression.node import Field, walk
from qtorch.data.expression.operators import known_operators
from qtorch.data.expression.parser import parse
from qtorch.data.expression.plan import Plan, Step, make_plan
from qtorch.data.panel import Panel

_COLUMNS = 48  # a float64 column of 2500 rows x 48 is a megabyte: what caches hold
KERNELS: dict[str, Kernel] = {
    **elementwise.KERNELS,
    **rolling_sum.KERNELS,
    **rolling_order.KERNELS,
    **quantile.KERNELS,
    **history.KERNELS,
    **masking.KERNELS,
}


def evaluate(
    expressions: str | Sequence[str] | Mapping[str, str],
    bars: Panel,
    *,
    out: Tensor | None = None,
    others: Panel | None = None,
    num_threads: int | None = None,
) -> Panel:
    """The values of expressions over bars, as a panel with the bars' calendar and instruments.

    The fields of the result are the mapping's names, or the expressions themselves. Values are
    Qlib's: a window of w rows ends at its date and sees the values of the rows it has (NaN where
    there is none), windows are cut at an instrument's first stored row, and nothing lies outside
    its span. Only `Ref` and `Delta` with a negative lag look ahead.

    bars: `[D, N, F]` of stored fields, on the CPU or a GPU; computed where it lies.
    out: a float32 tensor `[D, N, number of expressions]` of any strides to write into; else new
    field-major storage.
    others: bars of the same dates and fields of instruments that `Mask` may name besides.
    num_threads: Python threads on the CPU, each with one torch thread; default: torch's number.

    Differences from Qlib, on purpose: on flat windows a deviation is exactly 0 (Qlib's rounding
    leaves 1e-9, which divided by 1e-12 gives 1e3 and more); an infinite value counts as missing
    in Slope, Rsquare, Resi too (in Qlib it spoils the rest of the series).

    Raises ExpressionError for what does not parse and for fields that the bars lack.
    """
    names, texts = _named(expressions)
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
        machine = Machine(Block(bars, start, stop, others), plan, kernels)
        machine.run(lambda k: target[:, start:stop, k])

    kernels = _kernels(plan)
    threads = _threads(num_threads, bars.device)
    if d and n:
        with torch.no_grad():
            spans = _spans(n, bars.device)
            _run_all(run, spans, min(len(spans), threads))
    return Panel(target, bars.calendar, bars.instruments, names, mask=bars.mask, spans=bars.spans)


def _named(expressions: str | Sequence[str] | Mapping[str, str]) -> tuple[list[str], list[str]]:
    if isinstance(expressions, str):
        expressions = [expressions]
    if isinstance(expressions, Mapping):
        return list(expressions), list(expressions.values())
    return list(expressions), list(expressions)


def _new_storage(d: int, n: int, f: int, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty((f, d, n), device=device).permute(1, 2, 0)
    # numpy asks the system for huge pages, torch does not: the first touch of a gigabyte is
    # several times as quick.
    return torch.from_numpy(np.empty((f, d, n), dtype=np.float32)).permute(1, 2, 0)


def _kernels(plan: Plan) -> dict[str, Kernel]:
    kernels = dict(KERNELS)
    for step in plan.steps:
        operator = known_operators().get(step.operator)
        if operator is not None and operator.function is not None:
            kernels[step.operator] = _registered
    return kernels


def _registered(machine: Machine, step: Step) -> Tensor:
    """A user's operator: tensors and numbers in, a tensor `[D, n]` out, checked."""
    operator = known_operators()[step.operator]
    assert operator.function is not None
    arguments = [
        machine.numbers(step, k) if isinstance(a, int) else a.value
        for k, a in enumerate(step.arguments)
    ]
    result = operator.function(*arguments)
    block = machine.block
    expected = (block.num_rows, block.num_columns)
    if not isinstance(result, Tensor) or tuple(result.shape) != expected:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ExpressionError(
            f"the operator {step.operator!r} returned {got}; expected a tensor {expected} "
            "(dates, instruments), as it was given."
        )
    return block.seal(result.to(step.dtype, copy=True), head=True)


# -- blocks and threads ----------------------------------------------------------------------------


def _spans(n: int, device: torch.device) -> list[tuple[int, int]]:
    """Columns of each block: what fits the cache on a CPU, many at once on a GPU."""
    width = _COLUMNS if device.type == "cpu" else 1024
    blocks = -(-n // width)
    edges = [round(k * n / blocks) for k in range(blocks + 1)]
    return list(pairwise(edges))


def _threads(num_threads: int | None, device: torch.device) -> int:
    if device.type != "cpu":
        return 1
    if num_threads is None:
        num_threads = torch.get_num_threads() or os.cpu_count() or 1
    if num_threads < 1:
        raise DataError(f"num_threads is {num_threads}; expected a number from 1.")
    return num_threads


def _run_all(
    run: Callable[[tuple[int, int]], None], spans: Iterable[tuple[int, int]], threads: int
) -> None:
    """Run every block; one torch thread in each Python thread, which share the blocks."""
    waiting: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    for span in spans:
        waiting.put(span)
    before = torch.get_num_threads()
    errors: list[BaseException] = []

    def work() -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            while not errors:
                try:
                    run(waiting.get_nowait())
                except queue.Empty:
                    return
                except BaseException as error:
                    errors.append(error)

    # Also a single worker is a thread of its own: torch's number of threads belongs to a thread,
    # and the caller's stays as it is.
    workers = [threading.Thread(target=work, name=f"expression-{k}") for k in range(threads)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(before)
    if errors:
        raise errors[0]
