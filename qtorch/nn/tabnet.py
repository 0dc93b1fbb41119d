"""TabNet: sequential attention that selects a few features at each decision step."""

from __future__ import annotations

from collections.abc import Sequence
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
        return self.scores(self.fc_out(self.encode_rows(x)))

    def encode_rows(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        """Return the encoding `[B, out_dim]` of rows `x [B, F]`.

        `prior [B, F]` scales how strongly each feature may be selected (None: all 1).
        """
        return self._encode(x, prior)[0]

    def encode(self, x: Tensor, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the encoding of `encode_rows`, and the entropy `[B]` of the selection masks.

        It is the mean over steps.
        """
        encoding, selections, parts = self._encode(x, prior)
        masks = torch.stack(selections)  # [steps, B, F]
        return encoding, parts.separate(-(masks * (masks + 1e-10).log()).sum(-1).mean(0))

    def _encode(self, x: Tensor, prior: Tensor | None) -> tuple[Tensor, list[Tensor], NormParts]:
        """Return the encoding, the selection mask of each step, and the parts of the batch.

        The rows of the masks are in the order of the parts.
        """
        parts = NormParts.of_batch(self, x.shape[0])
        x = parts.alternate(self.bn(x))
        prior = None if prior is None else parts.alternate(prior)
        shares = sum_shares(x)
        first_layers, *layers = split_layer_uses(self.shared, 1 + len(self.steps))
        attention_input = self.first_step(x, first_layers, parts)[:, self.n_d :]
        decisions: list[Tensor] = []
        selections: list[Tensor] = []
        for step, step_layers in zip(self.steps, layers, strict=True):
            if selections and self.relax is not None:
                unused = self.relax - selections[-1]
                prior = unused if prior is None else prior * unused
            selection, hidden = step(x, attention_input, prior, step_layers, shares, parts)
            decision, attention_input = hidden.split((self.n_d, hidden.shape[-1] - self.n_d), -1)
            decisions.append(decision)
            selections.append(selection)
        parts.update_statistics()
        encoding = self.fc(F.relu(torch.stack(decisions)).sum(0))
        return parts.separate(encoding), selections, parts

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
        parts: NormParts,
    ) -> tuple[Tensor, Tensor]:
        selection = self.atten_tran(attention_input, prior, shares, parts)
        return selection, self.fea_tran(x * selection, shared, parts)


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

    def forward(self, x: Tensor, shared: list[LinearWeights], parts: NormParts) -> Tensor:
        """Map `x [B, in_size]` to `[B, width]`; `shared` are the linear layers of all steps."""
        linear = [*shared, *(_get_weights(glu.fc) for glu in self.independ)]
        for k, glu in enumerate((*self.shared, *self.independ)):
            hidden = glu(F.linear(x, *linear[k]), parts)
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

    def forward(
        self, x: Tensor, prior: Tensor | None, shares: Tensor | None, parts: NormParts
    ) -> Tensor:
        scores = self.bn(self.fc(x), parts)
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
        parts = NormParts.of_batch(self, x.shape[0])
        x = parts.alternate(x)
        layers = split_layer_uses(self.shared, len(self.steps))
        steps = zip(self.steps, layers, strict=True)
        output = torch.stack([step(x, shared, parts) for step, shared in steps]).sum(0)
        parts.update_statistics()
        return parts.separate(output)


class DecoderStep(nn.Module):
    """A decoder step: a feature transformer and a linear layer."""

    def __init__(self, in_size: int, d_feat: int, n_shared: int, n_ind: int, vbs: int) -> None:
        super().__init__()
        self.fea_tran = FeatureTransformer(in_size, d_feat, n_shared, n_ind, vbs)
        self.fc = nn.Linear(d_feat, d_feat)

    def forward(self, x: Tensor, shared: list[LinearWeights], parts: NormParts) -> Tensor:
        return self.fc(self.fea_tran(x, shared, parts))


class GLU(nn.Module):
    """Norm and gate after a linear layer, which is shared (not owned) if `in_size` is None."""

    def __init__(self, in_size: int | None, width: int, vbs: int) -> None:
        super().__init__()
        self.fc = None if in_size is None else nn.Linear(in_size, 2 * width)
        self.bn = GhostNorm(2 * width, vbs)

    def forward(self, x: Tensor, parts: NormParts) -> Tensor:
        """Map the linear layer's output `[B, 2 * width]` to `[B, width]`."""
        return F.glu(self.bn(x, parts), -1)


class GhostNorm(nn.Module):
    """Batch normalization of equal parts of a batch, of at least `vbs` samples, separately.

    Hoffer et al., "Train longer, generalize better", NeurIPS 2017. The running statistics are
    used in evaluation and for a batch of one sample. `NormParts` counts the parts.
    """

    def __init__(self, width: int, vbs: int) -> None:
        super().__init__()
        if vbs < 2:
            raise ValueError(f"vbs is {vbs}; expected at least 2 samples.")
        self.vbs = vbs
        self.bn = BatchNorm(width, momentum=MOMENTUM)

    def num_parts(self, num_samples: int) -> int:
        """Return how many parts of a training batch are normalized separately."""
        return max(1, num_samples // self.vbs) if self.training else 1

    def forward(self, x: Tensor, parts: NormParts) -> Tensor:
        if parts.is_alternating:
            return parts.normalize(self, x)
        count = x.shape[0]  # torch.export would treat len(x) as a constant
        num_parts = self.num_parts(count)
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


class NormParts:
    """The parts of a batch that the ghost norms of a network normalize separately.

    If P > 1 parts have equal sizes, their rows alternate (`is_alternating`): row k is one of part
    k % P. Seen as `[B / P, P * C]`, the rows of all parts are then normalized by one operation.
    """

    def __init__(self, norms: list[GhostNorm], num_parts: int) -> None:
        self.num_parts, self.is_alternating = num_parts, bool(norms) and num_parts > 1
        if not self.is_alternating:
            return
        self._norms = [norm.bn for norm in norms]
        weights = _repeat_all(num_parts, [bn.weight for bn in self._norms])
        biases = _repeat_all(num_parts, [bn.bias for bn in self._norms])
        sizes = [num_parts * bn.num_features for bn in self._norms]
        assert self._norms[0].running_mean is not None
        statistics = _zeros_of_sizes(self._norms[0].running_mean, [*sizes, *sizes])
        self._means, self._variances = statistics[: len(sizes)], statistics[len(sizes) :]
        self._arguments = {
            id(norm): arguments
            for norm, *arguments in zip(
                norms, self._means, self._variances, weights, biases, strict=True
            )
        }

    @classmethod
    def of_batch(cls, network: nn.Module, num_samples: int) -> NormParts:
        """Return the parts of a batch, and count them in each norm of the network."""
        if not network.training or num_samples < 2:
            return cls([], 1)
        norms = [module for module in network.modules() if isinstance(module, GhostNorm)]
        num_parts = norms[0].num_parts(num_samples)  # they have one `vbs`
        counters = [norm.bn.num_batches_tracked for norm in norms]
        _add_to_all([c for c in counters if c is not None], num_parts)
        return cls(norms if num_samples % num_parts == 0 else [], num_parts)

    def alternate(self, rows: Tensor) -> Tensor:
        """Return the rows `[B, ...]` of a batch in the order of the parts."""
        return self._exchange(rows, self.num_parts, -1) if self.is_alternating else rows

    def separate(self, rows: Tensor) -> Tensor:
        """Return rows in their original order."""
        return self._exchange(rows, -1, self.num_parts) if self.is_alternating else rows

    def _exchange(self, rows: Tensor, *sizes: int) -> Tensor:
        return rows.reshape(*sizes, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)

    def normalize(self, norm: GhostNorm, x: Tensor) -> Tensor:
        """Normalize the rows `x [B, C]` of all parts, and keep the statistics of each part."""
        mean, variance, weight, bias = self._arguments[id(norm)]
        rows = x.reshape(-1, self.num_parts * x.shape[-1])
        momentum = 1.0  # so that the statistics are those of this batch
        rows = F.batch_norm(rows, mean, variance, weight, bias, True, momentum, norm.bn.eps)
        return rows.reshape(x.shape)

    @torch.no_grad()
    def update_statistics(self) -> None:
        """Update the running statistics of each norm by those of the parts, one after another."""
        if not self.is_alternating:
            return
        running = [t for bn in self._norms for t in (bn.running_mean, bn.running_var)]
        for part in range(self.num_parts):
            values = [
                statistics.view(self.num_parts, -1)[part]
                for pair in zip(self._means, self._variances, strict=True)
                for statistics in pair
            ]
            _move_all([t for t in running if t is not None], values, MOMENTUM)


def _zeros_of_sizes(reference: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Return zeros `[size]` for each size, with the dtype and device of `reference`."""
    if is_stacked():  # vmap's batch norm updates no parts of a tensor
        return [reference.new_zeros(size) for size in sizes]
    return torch.split(reference.new_zeros(sum(sizes)), sizes)


def _add_to_all(tensors: list[Tensor], number: int) -> None:
    """Add a number to each tensor."""
    if is_stacked():  # vmap has no operation for several tensors
        for tensor in tensors:
            tensor.add_(number)
    else:
        torch._foreach_add_(tensors, number)


def _move_all(tensors: list[Tensor], values: list[Tensor], share: float) -> None:
    """Move each tensor a share of the way to its value."""
    if is_stacked():  # as above
        for tensor, value in zip(tensors, values, strict=True):
            tensor.add_(value - tensor, alpha=share)
    else:
        torch._foreach_lerp_(tensors, values, share)


def _repeat_all(count: int, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Return each tensor `[C]` repeated, `[count * C]`."""
    return _RepeatAll.apply(count, *tensors)  # type: ignore[no-untyped-call]  # untyped in torch


class _RepeatAll(torch.autograd.Function):
    """`_repeat_all` with as few operations for many tensors as for one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        repeated = torch.cat([tensor for tensor in tensors for _ in range(count)])
        return torch.split(repeated, [count * len(tensor) for tensor in tensors])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.count = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parts = [gradient.reshape(ctx.count, -1) for gradient in gradients]
        sums = torch.cat(parts, 1).sum(0)
        return None, *torch.split(sums, [part.shape[1] for part in parts])


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
