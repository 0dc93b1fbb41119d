"""What TabNet is made of: features picked, gated layers, norms of parts of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.mlp import BatchNorm

MOMENTUM = 0.01  # of all its batch norms


class AttentiveTransformer(nn.Module):
    """How much of each feature is picked: `[B, n_a]` to `[B, F]`, of sum one, mostly zeros."""

    def __init__(self, n_a: int, d_feat: int, vbs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(n_a, d_feat)
        self.bn = GhostNorm(d_feat, vbs)

    def forward(self, look: Tensor, prior: Tensor) -> Tensor:
        return sparsemax(self.bn(self.fc(look)) * prior)


class FeatureTransformer(nn.Module):
    """Gated layers, each but the first beside what came in: first those whose linear part all
    steps share, then this step's own."""

    def __init__(self, into: int, width: int, n_shared: int, n_ind: int, vbs: int) -> None:
        super().__init__()
        self.shared = nn.ModuleList(GLU(None, width, vbs) for _ in range(n_shared))
        first = width if n_shared else into
        self.independ = nn.ModuleList(
            GLU(first if k == 0 else width, width, vbs) for k in range(n_ind)
        )

    def forward(self, x: Tensor, shared: nn.ModuleList) -> Tensor:
        """`x [B, into]` to `[B, width]`; `shared` are the linear layers that the steps share."""
        linear = [*shared, *(glu.fc for glu in self.independ)]
        for k, glu in enumerate((*self.shared, *self.independ)):
            found = glu(linear[k](x))
            x = found if k == 0 else (x + found) * 0.5**0.5
        return x


class GLU(nn.Module):
    """Norm and gate behind a linear layer, which is its own (`into` wide) or another's (None)."""

    def __init__(self, into: int | None, width: int, vbs: int) -> None:
        super().__init__()
        self.fc = None if into is None else nn.Linear(into, 2 * width)
        self.bn = GhostNorm(2 * width, vbs)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 2 * width]`, the linear layer's, to `[B, width]`."""
        return F.glu(self.bn(x), -1)


class GhostNorm(nn.Module):
    """Batch normalisation of equal parts of at least `vbs` samples, each by itself.

    Hoffer et al., "Train longer, generalize better", NeurIPS 2017. In evaluation, and for a
    batch of one, the running statistics stand in.
    """

    def __init__(self, width: int, vbs: int) -> None:
        super().__init__()
        if vbs < 2:
            raise ValueError(f"vbs is {vbs}; a part to normalise has 2 samples or more.")
        self.vbs = vbs
        self.bn = BatchNorm(width, momentum=MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.shape[0] // self.vbs if self.training else 1
        if parts < 2:
            whole: Tensor = self.bn(x)
            return whole
        return torch.cat([self.bn(part) for part in x.tensor_split(parts)])


def shared_layers(into: int, width: int, count: int) -> nn.ModuleList:
    """The linear layers that gated layers of all steps share."""
    return nn.ModuleList(nn.Linear(into if k == 0 else width, 2 * width) for k in range(count))


def sparsemax(scores: Tensor) -> Tensor:
    """Shares over the last axis, of sum one, with true zeros: the nearest ones to the scores.

    Martins and Astudillo, "From Softmax to Sparsemax", ICML 2016.
    """
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    scores = scores - scores.detach().amax(-1, keepdim=True)
    ordered = scores.sort(-1, descending=True).values
    surplus = ordered.cumsum(-1) - 1
    count = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    size = (count * ordered > surplus).sum(-1, keepdim=True)
    return F.relu(scores - surplus.gather(-1, size - 1) / size)
