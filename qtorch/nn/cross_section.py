"""Operations between the instruments of a day, shared by the networks that see whole days."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtorch.nn.recurrent import GRULayers, LSTMLayers


def newest_states(rnn: LSTMLayers | GRULayers, x: Tensor) -> Tensor:
    """The state after the newest step: `x [G, N, T, F]` to `[G, N, H]`."""
    states, _ = rnn(x.flatten(0, 1))  # [G * N, T, H]
    newest: Tensor = states[:, -1].unflatten(0, x.shape[:2])
    return newest


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis where the mask is; zero elsewhere, and where it is nowhere."""
    least = torch.finfo(scores.dtype).min
    share: Tensor = torch.softmax(scores.masked_fill(~mask, least), -1)
    return share * mask


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over a day's instruments: `values [G, N, ...]`, `mask [G, N]` to `[G, ...]`."""
    there = mask.reshape(*mask.shape, *(1 for _ in values.shape[2:])).to(values.dtype)
    mean: Tensor = (values * there).sum(1) / there.sum(1).clamp(min=1)
    return mean


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of each pair: `x [..., N, H]`, `y [..., K, H]` to `[..., N, K]`; zero for a vector
    of zeros, with a gradient of zero."""
    # vector_norm, for the square root of a sum of squares has no finite gradient at zero.
    lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True) @ torch.linalg.vector_norm(
        y, dim=-1, keepdim=True
    ).transpose(-1, -2)
    alike: Tensor = x @ y.transpose(-1, -2) / (lengths + 1e-6)
    return alike


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of `[G, N, H]` over the samples that `mask [G, N]` says are there.

    Where there is but one, the running statistics stand in.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]  # a mask too
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean, variance = self.running_mean, self.running_var
        if self.training:
            there = mask[..., None].to(x.dtype)
            count = there.sum()
            several = count > 1
            own = (x * there).sum((0, 1)) / count.clamp(min=1)
            squares = ((x - own) * there).square().sum((0, 1))
            mean = torch.where(several, own, mean)
            variance = torch.where(several, squares / count.clamp(min=1), variance)
            self._move_on(own.detach(), (squares / (count - 1)).detach(), several)
        scaled: Tensor = (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
        return scaled

    @torch.no_grad()
    def _move_on(self, mean: Tensor, variance: Tensor, several: Tensor) -> None:
        """The running statistics by a batch of several samples."""
        for kept, found in ((self.running_mean, mean), (self.running_var, variance)):
            kept.copy_(torch.where(several, kept + self.momentum * (found - kept), kept))
        self.num_batches_tracked.add_(several)
