"""LoRA: a frozen network learns again through matrices of low rank beside its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

# Weights of layers that multiply: [out, in] matrices of linear and recurrent layers.
ADAPTED = (nn.Linear, nn.LSTM, nn.GRU, nn.RNN, nn.MultiheadAttention)


class LoRA(nn.Module):
    """A network whose weights `W` act as `W + alpha / rank x B A`; only A and B learn.

    `A [rank, in]` begins at random and `B [out, rank]` at zero, so that it begins as the network
    itself. Adapted are the weight matrices of linear, recurrent and attention layers whose
    parameter names fit one of `targets` (patterns; all by default), and `trained` names patterns
    of parameters that learn whole beside them (a head). It feeds as the network does; `applied`
    lends the network to who calls more of it than `forward`. `merge` gives the network with the
    products added into its weights.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """

    def __init__(
        self,
        network: nn.Module,
        rank: int = 4,
        alpha: float | None = None,
        targets: Sequence[str] = ("*",),
        trained: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank is {rank}; it must be at least 1.")
        self.network = network
        self._applied = False
        self.rank, self.scale = rank, (rank if alpha is None else alpha) / rank
        self.inputs = getattr(network, "inputs", "window")
        self.cross_section = getattr(network, "cross_section", False)
        self.extras = getattr(network, "extras", ())
        self.low, self.high = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in adaptable(network).items():
            if not any(fnmatch(name, pattern) for pattern in targets):
                continue
            out, into = weight.shape
            low = torch.empty(rank, into, dtype=weight.dtype, device=weight.device)
            self.low[_key(name)] = nn.Parameter(nn.init.kaiming_uniform_(low, a=5**0.5))
            self.high[_key(name)] = nn.Parameter(weight.new_zeros(out, rank))
        if not self.low:
            known = ", ".join(adaptable(network))
            raise ValueError(f"targets {list(targets)} fit no weight; it has {known or 'none'}.")
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(any(fnmatch(name, pattern) for pattern in trained))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives with the adapted weights."""
        if self._applied:
            return self.network(*args, **kwargs)
        return functional_call(self.network, self.adapted(), args, kwargs)

    def adapted(self) -> dict[str, Tensor]:
        """The network's weights by name where they differ from its own."""
        own = dict(self.network.named_parameters())
        return {
            name: own[name] + self.scale * (self.high[key] @ self.low[key])
            for name in own
            if (key := _key(name)) in self.low
        }

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The network, with the adapted weights in the place of its own while the block runs; the
        gradient of what is made of them goes to A and B. It is not to be moved meanwhile."""
        assert not self._applied, "the weights are adapted already"
        own: list[tuple[dict[str, Any], str, Any]] = []
        for name, value in self.adapted().items():
            path, _, leaf = name.rpartition(".")
            parameters: dict[str, Any] = self.network.get_submodule(path)._parameters
            own.append((parameters, leaf, parameters[leaf]))
            parameters[leaf] = value  # past nn.Module.__setattr__, which takes Parameters alone
        self._applied = True
        try:
            yield self.network
        finally:
            self._applied = False
            for parameters, leaf, weight in own:
                parameters[leaf] = weight

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The network itself, the products added into its weights, all of it free to learn."""
        own = dict(self.network.named_parameters())
        for name, value in self.adapted().items():
            own[name].copy_(value)
        for name in self.high:
            self.high[name].zero_()
        return self.network.requires_grad_(True)


@contextmanager
def acting(network: nn.Module) -> Iterator[nn.Module]:
    """A network, all of whose methods see the weights that it acts with: of a LoRA the network in
    it, see `LoRA.applied`."""
    if not isinstance(network, LoRA):
        yield network
        return
    with network.applied() as inner:
        yield inner


def adaptable(network: nn.Module) -> Mapping[str, nn.Parameter]:
    """The weight matrices by name that LoRA can adapt."""
    found = {}
    for prefix, module in network.named_modules():
        if isinstance(module, ADAPTED):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 2:
                    found[f"{prefix}.{name}" if prefix else name] = parameter
    return found


def _key(name: str) -> str:
    return name.replace(".", "/")  # a ParameterDict takes no dots
