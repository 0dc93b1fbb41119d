"""Chains of simple layers for many members at once, as operations with a member axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.mlp import BatchNorm
from qtorch.nn.network import Network
from qtorch.nn.stacked import draw_dropout

# From the layer, its name, the state of all members and their inputs to their outputs.
StackedLayer = Callable[[nn.Module, str, Mapping[str, Tensor], Tensor], Tensor]

ACTIVATIONS = (nn.LeakyReLU, nn.SiLU, nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Identity)


class StackedLayers:
    """The layers of a flat network that is nothing but a chain of them, for K members at once.

    `vmap` runs any network for several members, with work of its own on each operation and with
    gradients and batch norms in layouts that have to be copied. Here a linear layer is one
    `baddbmm` for all members, and autograd sees a few operations alone.
    """

    def __init__(self, network: Network, chain: nn.Sequential) -> None:
        self.network, self.chain = network, chain

    @classmethod
    def from_network(cls, network: nn.Module) -> Self | None:
        """Return the layers of a network that declares its chain; None for any other network."""
        # The class itself must declare it: one derived from it may compute something else.
        name = vars(type(network)).get("layer_chain")
        if name is None or not isinstance(network, Network) or _has_hooks(network):
            return None
        chain = getattr(network, name)
        is_known = isinstance(chain, nn.Sequential) and all(
            type(layer) in {*LAYERS, nn.Dropout} and _is_supported(layer) for layer in chain
        )
        return cls(network, chain) if is_known else None

    @property
    def has_dropout(self) -> bool:
        """Whether the layers draw dropout masks in training."""
        return any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in self.chain)

    def __call__(
        self, state: Mapping[str, Tensor], x: Tensor, dropout_keys: Tensor | None
    ) -> Tensor:
        """Return the scores `[K, B]` or `[K, B, Q]` of flat inputs `x [K, B, F]`.

        `state` are the parameters and buffers of all members, by the names of the network; the
        running statistics in it are updated in place. `dropout_keys [K]`: as of `member_dropout`.
        """
        prefix: str = vars(type(self.network))["layer_chain"]
        num_drawn = 0
        for name, layer in self.chain.named_children():
            if not isinstance(layer, nn.Dropout):
                x = LAYERS[type(layer)](layer, f"{prefix}.{name}", state, x)
            elif layer.training and layer.p > 0.0 and dropout_keys is not None:
                x = draw_dropout(x, layer.p, dropout_keys.view(-1, 1, 1), num_drawn)
                num_drawn += 1
        return self.network.scores(x)


def _linear(layer: nn.Module, name: str, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    outputs: Tensor
    outputs = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]  # torch has no types here
    return outputs


class _Linear(torch.autograd.Function):
    """Map `x [K, B, F]` by weights `[K, H, F]` and biases `[K, H]` of each member.

    The gradient of `baddbmm` is that of the transposed weights, whose copy to the layout of the
    weights takes as long as the product itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if bias is None:
            return torch.bmm(x, weight.transpose(1, 2))
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = torch.bmm(gradient, weight) if ctx.needs_input_grad[0] else None
        of_bias = gradient.sum(1) if ctx.needs_input_grad[2] else None
        return of_x, torch.bmm(gradient.transpose(1, 2), x), of_bias


def _batch_norm(layer: nn.Module, name: str, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    assert isinstance(layer, nn.BatchNorm1d)
    num_members, num_rows, width = x.shape
    mean, variance, weight, bias = (
        state.get(f"{name}.{part}") for part in ("running_mean", "running_var", "weight", "bias")
    )
    assert mean is not None
    assert variance is not None
    is_training = layer.training and not (isinstance(layer, BatchNorm) and num_rows == 1)
    momentum = layer.momentum or 0.0
    if is_training:
        state[f"{name}.num_batches_tracked"].add_(1)
    if is_training and x.device.type == "cpu" and weight is not None and bias is not None:
        outputs: Tensor
        outputs, batch_mean, batch_variance = _Normalize.apply(x, weight, bias, layer.eps)  # type: ignore[no-untyped-call]  # torch has no types here
        mean.lerp_(batch_mean, momentum)
        variance.lerp_(batch_variance * (num_rows / max(1, num_rows - 1)), momentum)
        return outputs
    channels = F.batch_norm(
        x.transpose(0, 1).reshape(num_rows, num_members * width),
        mean.view(-1),
        variance.view(-1),
        None if weight is None else weight.reshape(-1),
        None if bias is None else bias.reshape(-1),
        is_training,
        momentum,
        layer.eps,
    )
    return channels.view(num_rows, num_members, width).transpose(0, 1)


class _Normalize(torch.autograd.Function):
    """Batch normalization of `x [K, B, C]` for each member and channel, on a CPU.

    torch's kernel takes `[B, K * C]`: the copies to that layout and back take longer than the
    arithmetic. Returns the outputs, and mean and (biased) variance `[K, C]`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean = x.mean(1)
        normalized = x - mean[:, None]
        variance = torch.linalg.vecdot(normalized, normalized, dim=1).div_(x.shape[1])
        scale = (variance + eps).rsqrt_()
        normalized.mul_(scale[:, None])
        ctx.save_for_backward(normalized, weight, scale)
        ctx.mark_non_differentiable(mean, variance)
        outputs = torch.addcmul(bias[:, None], normalized, weight[:, None])
        return outputs, mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        normalized, weight, scale = ctx.saved_tensors
        of_bias = gradient.sum(1)
        of_weight = torch.linalg.vecdot(gradient, normalized, dim=1)
        num_rows = gradient.shape[1]
        of_x = gradient - (of_bias / num_rows)[:, None]
        of_x.addcmul_(normalized, (of_weight / -num_rows)[:, None]).mul_((weight * scale)[:, None])
        return of_x, of_weight, of_bias, None


def _activation(layer: nn.Module, name: str, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    outputs: Tensor = layer(x)
    return outputs


LAYERS: dict[type[nn.Module], StackedLayer] = {
    nn.Linear: _linear,
    nn.BatchNorm1d: _batch_norm,
    BatchNorm: _batch_norm,
    **dict.fromkeys(ACTIVATIONS, _activation),
}


def _is_supported(layer: nn.Module) -> bool:
    """Whether a layer has settings with which it computes the same for several members."""
    if isinstance(layer, nn.BatchNorm1d):
        # Without a momentum the statistics are means of all batches, whose number is a tensor.
        return layer.track_running_stats and layer.momentum is not None
    return True


def _has_hooks(network: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
