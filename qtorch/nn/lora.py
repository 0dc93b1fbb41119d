"""LoRA: fine-tune a frozen network through low-rank matrices that are added to its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

# Layers whose weights are [out, in] matrices.
ADAPTABLE_LAYERS = (nn.Linear, nn.LSTM, nn.GRU, nn.RNN, nn.MultiheadAttention)


class LoRA(nn.Module):
    """A network with weights `W + alpha / rank x B A`, of which only A and B are trained.

    `A [rank, in]` starts random and `B [out, rank]` at zero, so that the initial outputs are those
    of the network. Adapted are the weight matrices of linear, recurrent and attention layers whose
    parameter names match one of `targets` (patterns; all by default). `trained` are patterns of
    parameters that are trained directly, such as the head. A LoRA takes the same inputs as its
    network. `use_effective_weights` lets a training step call methods of the network other than
    `forward`. `merge` returns the network with the products added to its weights.

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
            raise ValueError(f"rank is {rank}; expected at least 1.")
        self.network = network
        self._is_active = False
        self.rank, self.scale = rank, (rank if alpha is None else alpha) / rank
        self.inputs = getattr(network, "inputs", "window")
        self.cross_section = getattr(network, "cross_section", False)
        self.extras = getattr(network, "extras", ())
        self.low, self.high = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in adaptable_weights(network).items():
            if not any(fnmatch(name, pattern) for pattern in targets):
                continue
            out_size, in_size = weight.shape
            low = torch.empty(rank, in_size, dtype=weight.dtype, device=weight.device)
            self.low[_parameter_key(name)] = nn.Parameter(nn.init.kaiming_uniform_(low, a=5**0.5))
            self.high[_parameter_key(name)] = nn.Parameter(weight.new_zeros(out_size, rank))
        if not self.low:
            weight_names = ", ".join(adaptable_weights(network))
            raise ValueError(
                f"targets {list(targets)} match no weight; choose from {weight_names or 'none'}."
            )
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(any(fnmatch(name, pattern) for pattern in trained))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network with its effective weights."""
        if self._is_active:
            return self.network(*args, **kwargs)
        return functional_call(self.network, self.effective_weights(), args, kwargs)

    def effective_weights(self) -> dict[str, Tensor]:
        """Return the effective weights `W + alpha / rank x B A` by parameter name.

        Only parameters with low-rank matrices are included.
        """
        parameters = dict(self.network.named_parameters())
        return {
            name: parameters[name] + self.scale * (self.high[key] @ self.low[key])
            for name in parameters
            if (key := _parameter_key(name)) in self.low
        }

    @contextmanager
    def use_effective_weights(self) -> Iterator[nn.Module]:
        """Context manager that yields the network with its effective weights in place.

        Gradients of results computed inside the block reach A and B. The network must not be
        moved to another device meanwhile.
        """
        assert not self._is_active, "use_effective_weights cannot be nested"
        originals: list[tuple[dict[str, Any], str, Any]] = []
        for name, value in self.effective_weights().items():
            path, _, leaf = name.rpartition(".")
            parameters: dict[str, Any] = self.network.get_submodule(path)._parameters
            originals.append((parameters, leaf, parameters[leaf]))
            # nn.Module.__setattr__ would reject a tensor that is not a Parameter.
            parameters[leaf] = value
        self._is_active = True
        try:
            yield self.network
        finally:
            self._is_active = False
            for parameters, leaf, weight in originals:
                parameters[leaf] = weight

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Add the products to the weights; return the network with all parameters trainable."""
        parameters = dict(self.network.named_parameters())
        for name, value in self.effective_weights().items():
            parameters[name].copy_(value)
        for name in self.high:
            self.high[name].zero_()
        return self.network.requires_grad_(True)


@contextmanager
def use_effective_weights(network: nn.Module) -> Iterator[nn.Module]:
    """Context manager that yields a network whose methods use its effective weights.

    For a LoRA this is the wrapped network (see `LoRA.use_effective_weights`); any other network is
    yielded as it is.
    """
    if not isinstance(network, LoRA):
        yield network
        return
    with network.use_effective_weights() as inner:
        yield inner


def adaptable_weights(network: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return the weight matrices that LoRA can adapt, by parameter name."""
    weights = {}
    for prefix, module in network.named_modules():
        if isinstance(module, ADAPTABLE_LAYERS):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 2:
                    weights[f"{prefix}.{name}" if prefix else name] = parameter
    return weights


def _parameter_key(name: str) -> str:
    return name.replace(".", "/")  # ParameterDict does not allow dots
