"""Turn a fitted network into a program of tensors that scores a batch as `predict` does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from qtorch.core.errors import ConfigError
from qtorch.data.batches import Batch
from qtorch.model.feeding import ForwardAdapter

BATCH_AXES = {1: ("batch",), 2: ("days", "instruments")}


class ScoringModule(nn.Module):
    """Maps positional input tensors to the scores of `predict`.

    The inputs are `x`, then `mask` if the network processes whole days, then the network's extras.
    The scores have shape `[B]`, or `[G, N]` (days, instruments) for whole days.
    """

    def __init__(self, network: nn.Module, readout: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.readout = network, readout
        self.cross_section = bool(getattr(network, "cross_section", False))
        self.extras: tuple[str, ...] = tuple(getattr(network, "extras", ()))

    @property
    def names(self) -> list[str]:
        """The names of the inputs, in order."""
        return ["x", *(["mask"] if self.cross_section else []), *self.extras]

    @property
    def num_axes(self) -> int:
        """The number of leading axes over samples: 1 (batch) or 2 (days, instruments)."""
        return 2 if self.cross_section else 1

    def forward(self, *inputs: Tensor) -> Tensor:
        positional, extra_tensors = inputs[: self.num_axes], inputs[self.num_axes :]
        score: Tensor = self.network(
            *positional, **dict(zip(self.extras, extra_tensors, strict=True))
        )
        return self.readout(score) if score.dim() > self.num_axes else score

    def batch_inputs(self, batch: Batch) -> list[Tensor]:
        """The input tensors of a batch, in order."""
        positional, extra_tensors = ForwardAdapter(self.network).arguments(batch)
        return [
            t.contiguous() for t in (*positional, *(extra_tensors[name] for name in self.extras))
        ]


@dataclass(frozen=True)
class TracedProgram:
    """An exported program and its input shapes: the name of each dynamic axis, else its size."""

    program: ExportedProgram
    shapes: list[list[str | int]]


def trace_program(scoring: ScoringModule, example: Sequence[Tensor]) -> TracedProgram:
    """Trace a network in evaluation mode into a program for batches of any size.

    The number of instruments per day is dynamic too if the network allows it. Raises ConfigError
    if the network cannot be traced, or only for one batch size.
    """
    # torch.export treats axes of length one as constants, so every axis gets at least two entries.
    doubled_example = tuple(torch.cat([t, t]) for t in example)
    if scoring.num_axes == 2 and doubled_example[0].shape[1] == 1:
        doubled_example = tuple(torch.cat([t, t], 1) for t in doubled_example)
    dynamic_axes = dict.fromkeys(range(scoring.num_axes), Dim.AUTO)
    name = type(scoring.network).__name__
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                scoring, doubled_example, dynamic_shapes=((dynamic_axes,) * len(doubled_example),)
            )
    except Exception as error:  # torch.export raises dozens of exception types
        raise ConfigError(
            f"torch.export cannot trace {name}: {first_line(error)} "
            "format=safetensors works for any network built from a configuration."
        ) from error
    shapes = [_symbolic_shape(node, scoring.num_axes) for node in _input_nodes(program)]
    if isinstance(shapes[0][0], int):
        raise ConfigError(
            f"{name} could only be traced for batches of size {shapes[0][0]}; "
            "format=safetensors works for any network built from a configuration."
        )
    return TracedProgram(program, shapes)


def _input_nodes(program: ExportedProgram) -> list[Any]:
    names = list(program.graph_signature.user_inputs)
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[name] for name in names]


def _symbolic_shape(node: Any, num_axes: int) -> list[str | int]:
    names = BATCH_AXES[num_axes]
    return [
        size if isinstance(size, int) else names[min(axis, num_axes - 1)]
        for axis, size in enumerate(node.meta["val"].shape)
    ]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, ending with a period."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if text.endswith(".") else f"{text}."
