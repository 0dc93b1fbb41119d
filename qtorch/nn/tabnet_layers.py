"""Layers of TabNet: sparse feature selection, gated linear units, ghost batch norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.mlp import BatchNorm

MOMENTUM = 0.01  # of all batch norms of TabNet


class AttentiveTransformer(nn.Module):
    """Compute a sparse feature selection mask that sums to one: `[B, n_a]` to `[B, F]`."""

    def __init__(self, n_a: int, d_feat: int, vbs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(n_a, d_feat)
        self.bn = GhostNorm(d_feat, vbs)

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        return sparsemax(self.bn(self.fc(x)) * prior)


class FeatureTransformer(nn.Module):
    """Gated layers with residuals: first those that share linear layers with the other steps, then
    those of this step only."""

    def __init__(self, in_size: int, width: int, n_shared: int, n_ind: int, vbs: int) -> None:
        super().__init__()
        self.shared = nn.ModuleList(GLU(None, width, vbs) for _ in range(n_shared))
        first_size = width if n_shared else in_size
        self.independ = nn.ModuleList(
            GLU(first_size if k == 0 else width, width, vbs) for k in range(n_ind)
        )

    def forward(self, x: Tensor, shared: nn.ModuleList) -> Tensor:
        """Map `x [B, in_size]` to `[B, width]`; `shared` are the linear layers of all steps."""
        linear = [*shared, *(glu.fc for glu in self.independ)]
        for k, glu in enumerate((*self.shared, *self.independ)):
            hidden = glu(linear[k](x))
            x = hidden if k == 0 else (x + hidden) * 0.5**0.5
        return x


class GLU(nn.Module):
    """Norm and gate after a linear layer, which is shared (not owned) if `in_size` is None."""

    def __init__(self, in_size: int | None, width: int, vbs: int) -> None:
        super().__init__()
        self.fc = None if in_size is None else nn.Linear(in_size, 2 * width)
        self.bn = GhostNorm(2 * width, vbs)

    def forward(self, x: Tensor) -> Tensor:
        """Map the linear layer's output `[B, 2 * width]` to `[B, width]`."""
        return F.glu(self.bn(x), -1)


class GhostNorm(nn.Module):
    """Batch normalization of equal parts of a batch, of at least `vbs` samples, separately.

    Hoffer et al., "Train longer, generalize better", NeurIPS 2017. The running statistics are
    used in evaluation and for a batch of one sample.
    """

    def __init__(self, width: int, vbs: int) -> None:
        super().__init__()
        if vbs < 2:
            raise ValueError(f"vbs is {vbs}; expected at least 2 samples.")
        self.vbs = vbs
        self.bn = BatchNorm(width, momentum=MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        num_parts = x.shape[0] // self.vbs if self.training else 1
        if num_parts < 2:
            output: Tensor = self.bn(x)
            return output
        return torch.cat([self.bn(part) for part in x.tensor_split(num_parts)])


def make_shared_layers(in_size: int, width: int, count: int) -> nn.ModuleList:
    """Return the linear layers that the gated layers of all steps share."""
    return nn.ModuleList(nn.Linear(in_size if k == 0 else width, 2 * width) for k in range(count))


def sparsemax(scores: Tensor) -> Tensor:
    """Return the Euclidean projection of scores onto the simplex of the last axis.

    The result sums to one and is sparse, unlike that of a softmax.

    Martins and Astudillo, "From Softmax to Sparsemax", ICML 2016.
    """
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    scores = scores - scores.detach().amax(-1, keepdim=True)
    sorted_scores = scores.sort(-1, descending=True).values
    surplus = sorted_scores.cumsum(-1) - 1
    count = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    size = (count * sorted_scores > surplus).sum(-1, keepdim=True)
    return F.relu(scores - surplus.gather(-1, size - 1) / size)
