"""Call a network on batches, with the inputs that it declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from qtorch.core.errors import ConfigError
from qtorch.data.batches import Batch
from qtorch.metrics.loss import Loss


def get_readout(loss: Any) -> Callable[[Tensor], Tensor]:
    """Return the function from outputs `[..., Q]` to a score `[...]`.

    This is the loss's `readout`; for any other callable, the first output.
    """
    return loss.readout if isinstance(loss, Loss) else lambda score: score[..., 0]


class ForwardAdapter:
    """Call a network's `forward` on a Batch.

    A network of single samples receives a day batch flattened. A cross-section network needs day
    batches and raises ConfigError for others. Scores have the shape of the batch: `[B]` or `[B,
    Q]`, for a day batch `[G, N]` or `[G, N, Q]`.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.flat = getattr(network, "inputs", "window") == "flat"
        self.cross_section = bool(getattr(network, "cross_section", False))
        self.extras: tuple[str, ...] = tuple(getattr(network, "extras", ()))

    def __call__(self, batch: Batch, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the network's scores of a batch.

        With `state` (parameters and buffers by name), this is a pure function of (state, batch).
        """
        arguments, keywords = self.arguments(batch)
        if state is None:
            scores = self.network(*arguments, **keywords)
        else:
            scores = functional_call(self.network, dict(state), arguments, keywords)
        if not isinstance(scores, Tensor):
            raise ConfigError(
                f"{type(self.network).__name__} returned {type(scores).__name__}, not a Tensor."
            )
        if batch.is_day and not self.cross_section:
            return scores.reshape(*batch.date.shape, *scores.shape[1:])
        return scores

    def arguments(self, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Return the positional and keyword arguments of `forward` for a batch."""
        if self.cross_section and not batch.is_day:
            raise ConfigError(
                f"{type(self.network).__name__} scores whole days and needs day batches: set "
                "model.batch.order=day (in Python, batch={'order': 'day'})."
            )
        network_batch = batch if self.cross_section else batch.flatten()
        x = network_batch.x
        if self.flat:
            x = x.transpose(-1, -2).flatten(-2)
        first_parameter = next(self.network.parameters(), None)
        if first_parameter is not None and x.dtype != first_parameter.dtype:
            x = x.to(first_parameter.dtype)
        keywords = {name: self._extra_tensor(network_batch, name) for name in self.extras}
        if not self.cross_section:
            return (x,), keywords
        mask = network_batch.mask
        assert mask is not None, "a day batch has a mask"
        return (x, mask), keywords

    def _extra_tensor(self, batch: Batch, name: str) -> Tensor:
        if name in ("instrument", "date"):
            index: Tensor = getattr(batch, name)
            return index
        if name not in batch.extra:
            available = ", ".join(sorted({*batch.extra, "instrument", "date"} - {"raw_label"}))
            raise ConfigError(
                f"{type(self.network).__name__} needs the extra tensor {name!r}, which the dataset "
                f"does not have (it has {available}). Add it: "
                f"dataset.extras.{name}={{_target_: ...}}, see qtorch.data.extras."
            )
        return batch.extra[name]
