"""TabNet: sequential attention that selects a few features at each decision step."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.mlp import BatchNorm
from qtorch.nn.network import Network
from qtorch.nn.recurrent import split_uses
from qtorch.nn.stacked import is_stacked

MOMENTUM = 0.01  # of all batch norms of TabNet


class TabNet(Network):
    """Decision steps that select features, transform them and add to the encoding of a row.

    Arik and Pfister, "TabNet: Attentive Interpretable Tabular Learning", AAAI 2021. Corresponds to
    Qlib's pytorch_tabnet.py: layers are named as in its encoder, and `fc_out` is the `fc` of its
    FinetuneModel. As there, `n_steps` includes the first step, which only provides the input of
    the first attention. `qtorch.model.TabNetModule` pretrains the network with the `decoder`,
    which is discarded afterwards.

    Differences: features that were selected get less weight in later steps, as in the paper, and
    the less the closer `relax` is to 1 (Qlib forgets previous selections; `relax=None` does the
    same); the parts of a batch that are normalized separately have equal sizes, so that no
    remainder of one sample is left; `n_shared=0` works; `n_d`, `n_a`, `n_shared`, `n_ind` and
    `n_steps` take effect.
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
        self.decoder_arguments = (out_dim, d_feat, n_shared, n_ind, n_steps, vbs)
        width = n_d + n_a
        self.bn = BatchNorm(d_feat, momentum=MOMENTUM)
        self.shared = make_shared_layers(d_feat, width, n_shared)
        self.first_step = FeatureTransformer(d_feat, width, n_shared, n_ind, vbs)
        self.steps = nn.ModuleList(
            DecisionStep(d_feat, n_a, width, n_shared, n_ind, vbs) for _ in range(n_steps - 1)
        )
        self.fc = nn.Linear(n_d, out_dim)
        self.fc_out = nn.Linear(out_dim, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [B, F * T]` to scores `[B]` or `[B, Q]`."""
        return self.scores(self.fc_out(self.encode_and_select(x)[0]))

    def encode(self, x: Tensor, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the encoding `[B, out_dim]` of rows `x [B, F]`, and the entropy `[B]` of the
        selection masks (mean over steps).

        `prior [B, F]` scales how strongly each feature may be selected (None: all 1).
        """
        encoding, selection = self.encode_and_select(x, prior)
        masks = torch.stack(selection)  # [steps, B, F]
        return encoding, -(masks * (masks + 1e-10).log()).sum(-1).mean(0)

    def encode_and_select(
        self, x: Tensor, prior: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the encoding as `encode` does, and the selection mask `[B, F]` of each step."""
        x = self.bn(x)
        count_norm_batches(self, x.shape[0])
        shares = sum_shares(x)
        first_layers, *layers = split_layer_uses(self.shared, 1 + len(self.steps))
        attention_input = self.first_step(x, first_layers)[:, self.n_d :]
        decisions: list[Tensor] = []
        selections: list[Tensor] = []
        for step, step_layers in zip(self.steps, layers, strict=True):
            if selections and self.relax is not None:
                unused = self.relax - selections[-1]
                prior = unused if prior is None else prior * unused
            selection, hidden = step(x, attention_input, prior, step_layers, shares)
            decision, attention_input = hidden.split((self.n_d, hidden.shape[-1] - self.n_d), -1)
            decisions.append(decision)
            selections.append(selection)
        return self.fc(F.relu(torch.stack(decisions)).sum(0)), selections

    def decoder(self) -> TabNetDecoder:
        """Return a new decoder for the outputs of `encode`."""
        return TabNetDecoder(*self.decoder_arguments)


class DecisionStep(nn.Module):
    """A decision step: returns the selection mask `[B, F]` and the hidden values `[B, width]`."""

    def __init__(
        self, d_feat: int, n_a: int, width: int, n_shared: int, n_ind: int, vbs: int
    ) -> None:
        super().__init__()
        self.atten_tran = AttentiveTransformer(n_a, d_feat, vbs)
        self.fea_tran = FeatureTransformer(d_feat, width, n_shared, n_ind, vbs)

    def forward(
        self,
        x: Tensor,
        attention_input: Tensor,
        prior: Tensor | None,
        shared: list[LinearWeights],
        shares: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        selection = self.atten_tran(attention_input, prior, shares)
        return selection, self.fea_tran(x * selection, shared)


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

    def forward(self, x: Tensor, shared: list[LinearWeights]) -> Tensor:
        """Map `x [B, in_size]` to `[B, width]`; `shared` are the linear layers of all steps."""
        linear = [*shared, *(_get_weights(glu.fc) for glu in self.independ)]
        for k, glu in enumerate((*self.shared, *self.independ)):
            hidden = glu(F.linear(x, *linear[k]))
            x = hidden if k == 0 else (x + hidden) * 0.5**0.5
        return x


class AttentiveTransformer(nn.Module):
    """Compute a sparse feature selection mask that sums to one: `[B, n_a]` to `[B, F]`.

    A `prior` of None is one for each feature. `shares` as of `sparsemax`.
    """

    def __init__(self, n_a: int, d_feat: int, vbs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(n_a, d_feat)
        self.bn = GhostNorm(d_feat, vbs)

    def forward(self, x: Tensor, prior: Tensor | None, shares: Tensor | None = None) -> Tensor:
        scores = self.bn(self.fc(x))
        return sparsemax(scores if prior is None else scores * prior, shares)


class TabNetDecoder(nn.Module):
    """Reconstruct features from an encoding: `[B, in_size]` to `[B, d_feat]`.

    The layers have the names of Qlib's TabNet_Decoder.
    """

    def __init__(
        self, in_size: int, d_feat: int, n_shared: int, n_ind: int, n_steps: int, vbs: int
    ) -> None:
        super().__init__()
        self.shared = make_shared_layers(in_size, d_feat, n_shared)
        self.steps = nn.ModuleList(
            DecoderStep(in_size, d_feat, n_shared, n_ind, vbs) for _ in range(n_steps)
        )

    def forward(self, x: Tensor) -> Tensor:
        count_norm_batches(self, x.shape[0])
        layers = split_layer_uses(self.shared, len(self.steps))
        steps = zip(self.steps, layers, strict=True)
        return torch.stack([step(x, shared) for step, shared in steps]).sum(0)


class DecoderStep(nn.Module):
    """A decoder step: a feature transformer and a linear layer."""

    def __init__(self, in_size: int, d_feat: int, n_shared: int, n_ind: int, vbs: int) -> None:
        super().__init__()
        self.fea_tran = FeatureTransformer(in_size, d_feat, n_shared, n_ind, vbs)
        self.fc = nn.Linear(d_feat, d_feat)

    def forward(self, x: Tensor, shared: list[LinearWeights]) -> Tensor:
        return self.fc(self.fea_tran(x, shared))


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
    used in evaluation and for a batch of one sample. `count_norm_batches` counts the parts.
    """

    def __init__(self, width: int, vbs: int) -> None:
        super().__init__()
        if vbs < 2:
            raise ValueError(f"vbs is {vbs}; expected at least 2 samples.")
        self.vbs = vbs
        self.bn = BatchNorm(width, momentum=MOMENTUM)

    def num_parts(self, num_samples: int) -> int:
        """Return how many parts of a training batch are normalized separately."""
        return max(1, num_samples // self.vbs)

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[0]  # torch.export would treat len(x) as a constant
        num_parts = self.num_parts(count) if self.training else 1
        if num_parts < 2:
            return self._normalize(x)
        size, num_larger = divmod(count, num_parts)
        sizes = [size + (k < num_larger) for k in range(num_parts)]
        return torch.cat([self._normalize(part) for part in torch.split(x, sizes)])

    def _normalize(self, x: Tensor) -> Tensor:
        """Normalize the samples of a part together."""
        bn = self.bn
        return F.batch_norm(
            x, bn.running_mean, bn.running_var, bn.weight, bn.bias,
            self.training and x.shape[0] > 1, MOMENTUM, bn.eps,
        )  # fmt: skip


def count_norm_batches(network: nn.Module, num_samples: int) -> None:
    """Count a training batch in each GhostNorm of a network, by one operation for all of them."""
    if not network.training or num_samples < 2:
        return
    counters: dict[int, list[Tensor]] = {}
    for norm in network.modules():
        if isinstance(norm, GhostNorm):
            assert norm.bn.num_batches_tracked is not None
            parts = counters.setdefault(norm.num_parts(num_samples), [])
            parts.append(norm.bn.num_batches_tracked)
    for num_parts, tensors in counters.items():
        if is_stacked():  # vmap has no operation for several tensors
            for tensor in tensors:
                tensor.add_(num_parts)
        else:
            torch._foreach_add_(tensors, num_parts)


LinearWeights = tuple[Tensor, Tensor]  # weight and bias of a linear layer


def make_shared_layers(in_size: int, width: int, count: int) -> nn.ModuleList:
    """Return the linear layers that the gated layers of all steps share."""
    return nn.ModuleList(nn.Linear(in_size if k == 0 else width, 2 * width) for k in range(count))


def split_layer_uses(layers: nn.ModuleList, count: int) -> list[list[LinearWeights]]:
    """Return the weights of linear layers for each of `count` uses; see `split_uses`."""
    uses = [
        list(zip(*(split_uses(w, count) for w in _get_weights(layer)), strict=True))
        for layer in layers
    ]
    return [[layer_uses[k] for layer_uses in uses] for k in range(count)]


def _get_weights(layer: object) -> LinearWeights:
    assert isinstance(layer, nn.Linear)
    return layer.weight, layer.bias


def sparsemax(scores: Tensor, shares: Tensor | None = None) -> Tensor:
    """Return the Euclidean projection of scores onto the simplex of the last axis.

    The result sums to one and is sparse, unlike that of a softmax. `shares` is the result of
    `sum_shares` for such scores.

    Martins and Astudillo, "From Softmax to Sparsemax", ICML 2016.
    """
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    shares = sum_shares(scores) if shares is None else shares
    return _Sparsemax.apply(scores, shares)  # type: ignore[no-untyped-call]  # untyped in torch


def sum_shares(values: Tensor) -> Tensor | None:
    """Return the matrix `[F, F]` that maps `[..., F]` to the means of the first k of F numbers.

    For CUDA alone, whose cumulated sum is not deterministic; None on other devices.
    """
    if not values.is_cuda:
        return None
    options: Any = {"dtype": torch.float64, "device": values.device}
    width = values.shape[-1]
    return torch.ones(width, width, **options).triu() / torch.arange(1, width + 1, **options)


class _Sparsemax(torch.autograd.Function):
    """The projection with the closed form of its gradient, which needs no gradient of a sort."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, shares: Tensor | None) -> Tensor:
        # The threshold that leaves a sum of one among the largest k scores is highest for the k
        # that the projection selects.
        largest = scores.sort(-1, descending=True).values
        if shares is not None:
            thresholds = torch.addmm(shares[0], largest.double(), shares, beta=-1)
            return F.relu(scores - thresholds.amax(-1, keepdim=True)).to(scores.dtype)
        maximum = largest[..., :1]
        count = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
        thresholds = ((largest - maximum).cumsum(-1) - 1) / count
        return F.relu(scores - maximum - thresholds.amax(-1, keepdim=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (projection,) = ctx.saved_tensors
        is_selected = projection.sign()
        gradient = gradient * is_selected
        # At least one is selected, also where scores are NaN.
        size = is_selected.sum(-1, keepdim=True).clamp(min=1)
        mean = gradient.sum(-1, keepdim=True) / size
        return torch.addcmul(gradient, mean, is_selected, value=-1), None
