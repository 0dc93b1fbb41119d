"""Operations across the instruments of a day, for the networks that take whole days."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.recurrent import GRULayers, LSTMLayers


def newest_states(rnn: LSTMLayers | GRULayers, x: Tensor) -> Tensor:
    """Return the state after the newest step: `x [G, N, T, F]` to `[G, N, H]`."""
    states, _ = rnn(x.flatten(0, 1))  # [G * N, T, H]
    return states[:, -1].unflatten(0, x.shape[:2])


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis where `mask` is True; zero elsewhere and in rows without any."""
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(~mask, lowest), -1) * mask


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average `values [G, N, ...]` over the instruments in `mask [G, N]`: `[G, ...]`."""
    weight = mask.reshape(*mask.shape, *(1 for _ in values.shape[2:])).to(values.dtype)
    return (values * weight).sum(1) / weight.sum(1).clamp(min=1)


def cosine_similarities(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine of each pair: `x [..., N, H]`, `y [..., K, H]` to `[..., N, K]`.

    A zero vector has cosine zero and a finite gradient.
    """
    return _CosineSimilarities.apply(x, y)[0]  # type: ignore[no-untyped-call]  # untyped in torch


class _CosineSimilarities(torch.autograd.Function):
    """`x y' / (|x| |y|' + 1e-6)`, with a third of the operations that its parts' gradients need."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        cosine, lengths = similarity_and_lengths(x, y)
        return cosine, *lengths

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None
        precision = ctx.saved_tensors[-1].dtype  # in mixed precision the others may have less
        tensors = (t.to(precision) for t in ctx.saved_tensors)
        gradients = similarity_gradients(gradient.to(precision), *tensors)
        return tuple(g.to(t.dtype) for g, t in zip(gradients, ctx.saved_tensors, strict=False))


def similarity_and_lengths(
    x: Tensor, y: Tensor, x_length: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the cosines `[..., N, K]` as `cosine_similarities`, and what their gradients need.

    That is the lengths of `x` and `y`, and what their product was divided by. `x_length` is the
    length of `x` if it is known, as of `own_similarities`.
    """
    y_length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    if x_length is None:
        x_length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    product_of_lengths = x_length @ y_length.transpose(-1, -2) + 1e-6
    cosine = x @ y.transpose(-1, -2) / product_of_lengths
    return cosine, (x_length, y_length, product_of_lengths)


def similarity_gradients(
    gradient: Tensor, x: Tensor, y: Tensor, cosine: Tensor, x_length: Tensor, y_length: Tensor,
    product_of_lengths: Tensor, *, y_gradient: Tensor | None = None,
    is_x_positive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of `x` and `y` for that of their cosines.

    `y_gradient` is a gradient of `y` from elsewhere, to which this one is added. `is_x_positive`:
    no `x_length` is zero.
    """
    to_product = gradient / product_of_lengths
    to_lengths = to_product * cosine  # with the other sign
    x_factor = (to_lengths @ y_length) / (x_length if is_x_positive else _positive(x_length))
    x_gradient = torch.addcmul(to_product @ y, x_factor, x, value=-1)
    to_y = to_product.transpose(-1, -2)
    y_gradient = to_y @ x if y_gradient is None else torch.baddbmm(y_gradient, to_y, x)
    y_factor = (to_lengths.transpose(-1, -2) @ x_length) / _positive(y_length)
    return x_gradient, torch.addcmul(y_gradient, y_factor, y, value=-1)


class _OwnSimilarities(torch.autograd.Function):
    """`_CosineSimilarities` of `x` with itself: both gradients are one, and so are both lengths."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, ...]:
        length = _positive(torch.linalg.vector_norm(x, dim=-1, keepdim=True))
        product_of_lengths = length @ length.transpose(-1, -2) + 1e-6
        return x @ x.transpose(-1, -2) / product_of_lengths, length, product_of_lengths

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> Tensor | None:
        if gradient is None:
            return None
        x, cosine, length, product_of_lengths = ctx.saved_tensors
        to_product = gradient / product_of_lengths
        to_product = to_product + to_product.transpose(-1, -2)
        to_lengths = to_product * cosine  # with the other sign
        return torch.addcmul(to_product @ x, (to_lengths @ length) / length, x, value=-1)


def _positive(length: Tensor) -> Tensor:
    """Return the lengths, to divide by: what is divided by a length of zero is zero itself."""
    return length.clamp(min=torch.finfo(length.dtype).tiny)


def exact_similarities(x: Tensor, y: Tensor) -> Tensor:
    """Return `cosine_similarities` in float32, to choose the most similar ones by.

    In half precision, rounding would decide which they are.
    """
    with torch.autocast(x.device.type, enabled=False):
        return cosine_similarities(x.float(), y.float())


def own_similarities(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `exact_similarities` of each pair within `x [..., N, H]`, `[..., N, N]`, and lengths.

    The lengths `[..., N, 1]` are those of `x`, or a tiny number where they are zero.
    """
    with torch.autocast(x.device.type, enabled=False):
        similarity, length, _ = _OwnSimilarities.apply(x.float())  # type: ignore[no-untyped-call]  # untyped in torch
        return similarity, length


class MaskCounts(NamedTuple):
    """What norms over the same samples share.

    Each row's `share [G * N]` in a mean, whether there are at least two samples (`is_several`,
    bool, and `update`, the same as 1 or 0), and the `correction` of their variance for its degrees
    of freedom. Without several samples all shares are zero.
    """

    share: Tensor
    is_several: Tensor
    update: Tensor
    correction: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor, dtype: torch.dtype) -> MaskCounts:
        """Count the samples for which `mask [G, N]` is True."""
        count = mask.sum(dtype=dtype)
        is_several = count > 1  # not `if`: no device synchronization, and compilable
        update = is_several.to(dtype)
        share = mask.flatten() * (update / count.clamp(min=1))
        return cls(share, is_several, update, count / (count - 1).clamp(min=1))


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalization of `[G, N, H]` over the samples for which `mask [G, N]` is True.

    A training batch with fewer than two samples is normalized with the running statistics. In
    training, several norms over the same samples can get their `MaskCounts` instead of the mask.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor, mask: Tensor | MaskCounts) -> Tensor:  # type: ignore[override]  # also takes a mask
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        rows, mean, variance = x.flatten(0, 1), self.running_mean, self.running_var
        mean, variance = mean.to(x.dtype), variance.to(x.dtype)
        if not self.training:
            return F.batch_norm(rows, mean, variance, self.weight, self.bias, eps=self.eps).view_as(
                x
            )
        counts = mask if isinstance(mask, MaskCounts) else MaskCounts.from_mask(mask, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            output, batch_mean, batch_variance, *_ = _MaskedBatchNorm.apply(  # type: ignore[no-untyped-call]  # untyped in torch
                rows, counts.share, counts.is_several, mean, variance,
                self.weight, self.bias, self.eps,
            )  # fmt: skip
        self._update_running_stats(batch_mean, batch_variance, counts)
        return output.view_as(x)

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, variance: Tensor, counts: MaskCounts) -> None:
        """Update the running statistics if there are several samples."""
        unbiased_variance = variance * counts.correction
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased_variance)):
            running.addcmul_(value - running, counts.update, value=self.momentum)
        self.num_batches_tracked.add_(counts.is_several)


class _MaskedBatchNorm(torch.autograd.Function):
    """Normalize `rows [M, H]` by their mean and variance under `share [M]`, which sums to one.

    Without `is_several`, by `mean` and `variance` `[H]`. Returns the normalized rows, the batch's
    mean and variance, and what the gradient needs, which takes half as many operations as the
    gradients of its parts.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor, share: Tensor, is_several: Tensor, mean: Tensor, variance: Tensor,
        weight: Tensor, bias: Tensor, eps: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        batch_mean = share @ rows
        batch_variance = share @ (rows - batch_mean).square()
        mean = torch.where(is_several, batch_mean, mean)
        scale = (torch.where(is_several, batch_variance, variance) + eps).rsqrt()
        normal = (rows - mean) * scale
        return torch.addcmul(bias, normal, weight), batch_mean, batch_variance, normal, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        _, share, _, _, _, weight, _, _ = inputs
        ctx.save_for_backward(share, weight, *output[3:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 8
        share, weight, normal, scale = ctx.saved_tensors
        bias_gradient = gradient.sum(0)
        weight_gradient = (gradient * normal).sum(0)
        # What the mean and the variance of the batch pass on to its rows.
        passed_on = torch.addcmul(bias_gradient, normal, weight_gradient)
        rows_gradient = torch.addcmul(gradient, share[:, None], passed_on, value=-1)
        rows_gradient = rows_gradient * (weight * scale)
        return rows_gradient, None, None, None, None, weight_gradient, bias_gradient, None
