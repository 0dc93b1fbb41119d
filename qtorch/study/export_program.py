"""A fitted network as a program of tensors alone: what `predict` does with one batch."""

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
from qtorch.model.feeding import Feeder

BATCH_AXES = {1: ("batch",), 2: ("days", "instruments")}


class Scoring(nn.Module):
    """Inputs by place to the score that `predict` gives: `x`, for a network of whole days `mask`,
    then the network's extras; `[B]`, or `[G, N]`."""

    def __init__(self, network: nn.Module, readout: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.readout = network, readout
        self.cross_section = bool(getattr(network, "cross_section", False))
        self.extras: tuple[str, ...] = tuple(getattr(network, "extras", ()))

    @property
    def names(self) -> list[str]:
        """The inputs, in their order."""
        return ["x", *(["mask"] if self.cross_section else []), *self.extras]

    @property
    def num_axes(self) -> int:
        """How many axes count samples: a batch, or days and instruments."""
        return 2 if self.cross_section else 1

    def forward(self, *inputs: Tensor) -> Tensor:
        placed, named = inputs[: self.num_axes], inputs[self.num_axes :]
        score: Tensor = self.network(*placed, **dict(zip(self.extras, named, strict=True)))
        return self.readout(score) if score.dim() > self.num_axes else score

    def inputs_of(self, batch: Batch) -> list[Tensor]:
        """A batch as the inputs."""
        placed, named = Feeder(self.network).arguments(batch)
        return [t.contiguous() for t in (*placed, *(named[name] for name in self.extras))]


@dataclass(frozen=True)
class Traced:
    """A program, and the form of its inputs: a name for each axis of any size, else its size."""

    program: ExportedProgram
    shapes: list[list[str | int]]


def traced(scoring: Scoring, example: Sequence[Tensor]) -> Traced:
    """The program of a network in evaluation mode, for batches of any size.

    How many instruments a day has is free where the network allows it. Raises ConfigError where
    the network cannot be traced, or fits batches of one size alone.
    """
    # Axes of length one would be taken for constants.
    doubled = tuple(torch.cat([t, t]) for t in example)
    if scoring.num_axes == 2 and doubled[0].shape[1] == 1:
        doubled = tuple(torch.cat([t, t], 1) for t in doubled)
    free = dict.fromkeys(range(scoring.num_axes), Dim.AUTO)
    name = type(scoring.network).__name__
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                scoring, doubled, dynamic_shapes=((free,) * len(doubled),)
            )
    except Exception as error:  # of dozens of kinds
        raise ConfigError(
            f"{name} cannot be traced by torch.export: {first_line(error)} "
            "format=safetensors takes any network of a configuration."
        ) from error
    shapes = [_shape(node, scoring.num_axes) for node in _inputs(program)]
    if isinstance(shapes[0][0], int):
        raise ConfigError(
            f"{name} could be traced for batches of {shapes[0][0]} alone; "
            "format=safetensors takes any network of a configuration."
        )
    return Traced(program, shapes)


def _inputs(program: ExportedProgram) -> list[Any]:
    wanted = list(program.graph_signature.user_inputs)
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[name] for name in wanted]


def _shape(node: Any, num_axes: int) -> list[str | int]:
    names = BATCH_AXES[num_axes]
    return [
        size if isinstance(size, int) else names[min(axis, num_axes - 1)]
        for axis, size in enumerate(node.meta["val"].shape)
    ]


def first_line(error: BaseException) -> str:
    """What an error of another library says, as one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if text.endswith(".") else f"{text}."
