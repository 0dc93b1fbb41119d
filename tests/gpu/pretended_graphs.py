"""CUDA graphs of the pretended device.

A graph records operations with the tensors that they read and write. A replay repeats them on the
same tensors: what the host has decided or allocated since then has no effect. As on a GPU, what is
recorded has not happened: at the end, memory and random generators are as they were before. The
host may neither read nor copy to the device while it records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pretended_streams import address
from torch import Tensor
from torch.utils._pytree import tree_flatten

NOT_CAPTURED = "operation not permitted when stream is capturing"
RANDOM = {
    "native_dropout", "bernoulli", "bernoulli_", "rand", "rand_like", "randn", "randn_like",
    "uniform_", "normal_", "random_", "randperm",
}  # fmt: skip
# Arguments that operations overwrite without saying so: the running statistics of a batch norm.
OVERWRITTEN = {"native_batch_norm": (3, 4)}


class PretendedGraph:
    """A graph of `device`, a PretendedCuda; `move_state(old, new)` as of `graph_functions`."""

    def __init__(self, device: Any, move_state: Callable[[Tensor, Tensor], None]) -> None:
        self._device, self._move_state = device, move_state
        self._operations: list[tuple[Any, Any, Any, list[Any]]] = []
        self._saved_memory: dict[int, tuple[Tensor, Tensor]] = {}  # and its content, by address

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context manager: record the operations inside the block."""
        random_state = torch.get_rng_state()
        self._device.graph = self
        self._device.is_generator_recording = True  # an error leaves it so
        try:
            yield
            self._device.is_generator_recording = False
        finally:
            self._device.graph = None
            torch.set_rng_state(random_state)
            for memory, content in self._saved_memory.values():
                memory.copy_(content)
            self._saved_memory.clear()

    @staticmethod
    def check_generator(device: Any, name: str) -> None:
        """Raise for a random operation after a recording that an error has ended."""
        if name in RANDOM and device.graph is None and device.is_generator_recording:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def save_memory(self, func: Any, args: Any, kwargs: Any) -> None:
        """Save what an operation is about to overwrite."""
        for place in OVERWRITTEN.get(func.overloadpacket.__name__, ()):
            if args[place] is not None:
                self._save(args[place].content)
        values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in tree_flatten(values.get(argument.name))[0]:
                self._save(tensor.content)

    def _save(self, tensor: Tensor) -> None:
        if address(tensor) not in self._saved_memory:
            memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self._saved_memory[address(tensor)] = memory, memory.clone()

    def record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if not func.is_view:
            self._operations.append((func, args, kwargs, tree_flatten(result)[0]))

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat the operations, as one kernel."""
        device = self._device
        device.stages[device.stage].kernels["graph"] += 1
        device.is_replaying = True
        try:
            for func, args, kwargs, outputs in self._operations:
                results = tree_flatten(device.dispatch(func, args, kwargs))[0]
                for output, result in zip(outputs, results, strict=True):
                    if isinstance(output, torch.Tensor) and result is not output:
                        output.content.copy_(result.content)
                        self._move_state(result.content, output.content)
        finally:
            device.is_replaying = False


def graph_functions(device: Any, move_state: Callable[[Tensor, Tensor], None]) -> dict[str, Any]:
    """Return what torch.cuda offers for graphs.

    `move_state(old, new)`: what an operation has kept for the tensor `old` now belongs to `new`.
    """

    @contextmanager
    def graph(recorded_graph: PretendedGraph, **options: Any) -> Iterator[None]:
        device.count_wait("the beginning of a CUDA graph")
        with recorded_graph.recording():
            yield

    return {
        "CUDAGraph": lambda: PretendedGraph(device, move_state),
        "graph": graph,
        "is_current_stream_capturing": lambda: device.graph is not None,
    }
