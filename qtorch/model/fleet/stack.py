"""The weights, buffers and optimizer moments of M members, stacked along their first axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from qtorch.core.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """Where each trained parameter of an architecture lies in a row of P numbers.

    `names` and `shapes` have one item for each parameter, in the order of the network.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def from_network(cls, network: nn.Module) -> Self:
        """Return the layout of the parameters that are trained.

        Raises ConfigError for a parameter that is not float32, and if there is none.
        """
        trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
        for name, parameter in trained.items():
            if parameter.dtype != torch.float32:
                raise ConfigError(f"the parameter {name} is {parameter.dtype}; expected float32.")
        if not trained:
            raise ConfigError(f"{type(network).__name__} has no parameter to train.")
        return cls(tuple(trained), tuple(p.shape for p in trained.values()))

    @property
    def sizes(self) -> list[int]:
        """The number of elements of each parameter; their sum is P."""
        return [math.prod(shape) for shape in self.shapes]

    def columns(self) -> dict[str, slice]:
        """Return the place of each parameter in a row."""
        places, begin = {}, 0
        for name, size in zip(self.names, self.sizes, strict=True):
            places[name] = slice(begin, begin + size)
            begin += size
        return places

    def unpack(self, rows: Tensor) -> dict[str, Tensor]:
        """Return `rows [M, P]` as parameters `[M, ...]` by name, without a copy.

        Its backward is a single concatenation of the gradients.
        """
        parts = torch.split(rows, self.sizes, dim=1)
        return {
            name: part.view(len(rows), *shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def pack(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the parameters of one member as a row `[P]`, on their device."""
        return torch.cat([parameters[name].detach().reshape(-1) for name in self.names])


class MemberStack:
    """The state of M members: `weights [M, P]`, `buffers` and `moments` by name, each `[M, ...]`.

    `buffers` are the network's buffers and the parameters that are not trained; `moments` are the
    optimizer's. Rows are members: taking a member out, adding one and changing their order are
    operations on rows, and no other member's numbers change.
    """

    def __init__(
        self,
        layout: Layout,
        weights: Tensor,
        buffers: dict[str, Tensor],
        moments: dict[str, Tensor],
    ) -> None:
        self.layout, self.weights = layout, weights
        self.buffers, self.moments = buffers, moments

    @classmethod
    def from_networks(
        cls,
        layout: Layout,
        networks: Sequence[nn.Module],
        moments: Mapping[str, int],
        device: torch.device,
    ) -> Self:
        """Stack networks of one architecture.

        `moments` are the names of the optimizer's moments, and their width: P, or 1 for a number
        of each member. They begin at zero.
        """
        states = [dict(n.named_parameters()) | dict(n.named_buffers()) for n in networks]
        weights = torch.stack([layout.pack(state) for state in states]).to(device)
        buffer_names = [name for name in states[0] if name not in layout.names]
        buffers = {n: torch.stack([s[n].detach() for s in states]).to(device) for n in buffer_names}
        zeros = {
            name: torch.zeros(len(networks), width, device=device)
            for name, width in moments.items()
        }
        return cls(layout, weights, buffers, zeros)

    def __len__(self) -> int:
        return len(self.weights)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name; the part before the slash says which group they belong to."""
        return {
            "weights": self.weights,
            **{f"buffers/{name}": t for name, t in self.buffers.items()},
            **{f"moments/{name}": t for name, t in self.moments.items()},
        }

    def map_tensors(self, values: Mapping[str, Tensor]) -> MemberStack:
        """Return a stack of the same architecture with other tensors, named as in `tensors`."""
        groups: dict[str, dict[str, Tensor]] = {"buffers": {}, "moments": {}}
        for key, tensor in values.items():
            group, _, name = key.partition("/")
            if name:
                groups[group][name] = tensor
        return MemberStack(self.layout, values["weights"], groups["buffers"], groups["moments"])

    def clone(self) -> MemberStack:
        """Return a copy."""
        return self.map_tensors({key: t.clone() for key, t in self.tensors().items()})

    def select(self, rows: Tensor) -> MemberStack:
        """Return a copy of the rows `[K]`, int64 on the stack's device."""
        return self.map_tensors({k: t.index_select(0, rows) for k, t in self.tensors().items()})

    def write(self, rows: Tensor, members: MemberStack) -> None:
        """Overwrite the rows `[K]` with those of another stack of K members."""
        new_values = members.tensors()
        for key, tensor in self.tensors().items():
            tensor.index_copy_(0, rows, new_values[key])

    def join(self, other: MemberStack) -> MemberStack:
        """Return this stack's members, followed by those of another one."""
        further = other.tensors()
        return self.map_tensors(
            {key: torch.cat((tensor, further[key])) for key, tensor in self.tensors().items()}
        )

    @torch.no_grad()
    def write_network(self, row: int, network: nn.Module) -> None:
        """Copy the weights and buffers of one member into a network."""
        parameters = self.layout.unpack(self.weights[row : row + 1])
        buffers = {name: tensor[row : row + 1] for name, tensor in self.buffers.items()}
        targets = dict(network.named_parameters()) | dict(network.named_buffers())
        for name, tensor in {**parameters, **buffers}.items():
            targets[name].copy_(tensor[0])


def copy_state(network: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a network's state, on the CPU."""
    return {name: t.detach().cpu().clone() for name, t in network.state_dict().items()}
