"""TabNet: several looks at one row of features, each at the few that an attention picks."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.mlp import BatchNorm
from qtorch.nn.network import Network
from qtorch.nn.tabnet_layers import (
    MOMENTUM,
    AttentiveTransformer,
    FeatureTransformer,
    shared_layers,
)


class TabNet(Network):
    """Steps that pick features, transform them, add to the decision and say where to look next.

    Arik and Pfister, "TabNet: Attentive Interpretable Tabular Learning", AAAI 2021. Answers to
    Qlib's pytorch_tabnet.py: layers named as in its encoder, `fc_out` is the `fc` of its
    FinetuneModel. As there, `n_steps` counts the step that only says where to look first.
    `qtorch.model.TabNetModule` pretrains it, with the `decoder` that it then throws away.

    Differences: what was picked weighs less in the next steps, the less the nearer `relax` is to
    1, as the paper has it (Qlib forgets it from step to step; `relax=None` does as Qlib does);
    the parts of a batch that are normalised apart are equally large, none is a rest of one;
    `n_shared=0` works; `n_d`, `n_a`, `n_shared`, `n_ind`, `n_steps` are heeded.
    """

    inputs: ClassVar[Literal["window", "flat"]] = "flat"

    def __init__(
        self,
        d_feat: int = 158,
        out_dim: int = 64,
        n_d: int = 64,
        n_a: int = 64,
        n_shared: int = 2,
        n_ind: int = 2,
        n_steps: int = 5,
        relax: float | None = 1.3,
        vbs: int = 2048,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        if n_steps < 2 or n_shared + n_ind < 1:
            raise ValueError(
                f"n_steps is {n_steps}, expected 2 or more; n_shared + n_ind is "
                f"{n_shared + n_ind}, expected 1 or more."
            )
        if relax is not None and relax < 1:
            raise ValueError(f"relax is {relax}; expected 1 or more, or None.")
        self.n_d, self.relax = n_d, relax
        self.decoder_form = (out_dim, d_feat, n_shared, n_ind, n_steps, vbs)
        width = n_d + n_a
        self.bn = BatchNorm(d_feat, momentum=MOMENTUM)
        self.shared = shared_layers(d_feat, width, n_shared)
        self.first_step = FeatureTransformer(d_feat, width, n_shared, n_ind, vbs)
        self.steps = nn.ModuleList(
            DecisionStep(d_feat, n_a, width, n_shared, n_ind, vbs) for _ in range(n_steps - 1)
        )
        self.fc = nn.Linear(n_d, out_dim)
        self.fc_out = nn.Linear(out_dim, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, F * T]` to `[B]` or `[B, Q]`."""
        return self.scores(self.fc_out(self.encode(x)[0]))

    def encode(self, x: Tensor, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What a row `x [B, F]` says, `[B, out_dim]`, and the entropy of what was picked, the
        steps' mean, `[B]`. `prior [B, F]`: how far each feature may be picked (None: all 1)."""
        x = self.bn(x)
        prior = torch.ones_like(x) if prior is None else prior
        look = self.first_step(x, self.shared)[:, self.n_d :]
        parts, entropies = [], []
        for step in self.steps:
            picked, found = step(x, look, prior, self.shared)
            if self.relax is not None:
                prior = prior * (self.relax - picked)
            parts.append(F.relu(found[:, : self.n_d]))
            entropies.append(-(picked * (picked + 1e-10).log()).sum(-1))
            look = found[:, self.n_d :]
        return self.fc(torch.stack(parts).sum(0)), torch.stack(entropies).mean(0)

    def decoder(self) -> TabNetDecoder:
        """A new decoder that fits `encode`."""
        return TabNetDecoder(*self.decoder_form)


class TabNetDecoder(nn.Module):
    """Features again from what an encoder says of them: `[B, into]` to `[B, d_feat]`.

    Named as Qlib's TabNet_Decoder.
    """

    def __init__(
        self, into: int, d_feat: int, n_shared: int, n_ind: int, n_steps: int, vbs: int
    ) -> None:
        super().__init__()
        self.shared = shared_layers(into, d_feat, n_shared)
        self.steps = nn.ModuleList(
            DecoderStep(into, d_feat, n_shared, n_ind, vbs) for _ in range(n_steps)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([step(x, self.shared) for step in self.steps]).sum(0)


class DecisionStep(nn.Module):
    """One look: what it picks, `[B, F]`, and what it finds there, `[B, width]`."""

    def __init__(
        self, d_feat: int, n_a: int, width: int, n_shared: int, n_ind: int, vbs: int
    ) -> None:
        super().__init__()
        self.atten_tran = AttentiveTransformer(n_a, d_feat, vbs)
        self.fea_tran = FeatureTransformer(d_feat, width, n_shared, n_ind, vbs)

    def forward(
        self, x: Tensor, look: Tensor, prior: Tensor, shared: nn.ModuleList
    ) -> tuple[Tensor, Tensor]:
        picked = self.atten_tran(look, prior)
        return picked, self.fea_tran(x * picked, shared)


class DecoderStep(nn.Module):
    """A feature transformer and a linear layer."""

    def __init__(self, into: int, d_feat: int, n_shared: int, n_ind: int, vbs: int) -> None:
        super().__init__()
        self.fea_tran = FeatureTransformer(into, d_feat, n_shared, n_ind, vbs)
        self.fc = nn.Linear(d_feat, d_feat)

    def forward(self, x: Tensor, shared: nn.ModuleList) -> Tensor:
        found: Tensor = self.fc(self.fea_tran(x, shared))
        return found
