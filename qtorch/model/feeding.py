"""How a network is given a batch, by what it declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from qtorch.core.errors import ConfigError
from qtorch.data.batches import Batch
from qtorch.metrics.loss import Loss


def readout_of(loss: Any) -> Callable[[Tensor], Tensor]:
    """How several outputs `[..., Q]` become the score `[...]`: as the loss says, else the first."""
    return loss.readout if isinstance(loss, Loss) else lambda score: score[..., 0]


class Feeder:
    """Calls a network on batches.

    A network that sees single samples is given a day batch flattened; one that sees
    cross-sections wants day batches and raises ConfigError for others. Scores come in the form
    of the batch: `[B]` or `[B, Q]`, of a day batch `[G, N]` or `[G, N, Q]`.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.flat = getattr(network, "inputs", "window") == "flat"
        self.cross_section = bool(getattr(network, "cross_section", False))
        self.extras: tuple[str, ...] = tuple(getattr(network, "extras", ()))

    def __call__(self, batch: Batch, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """The scores of a batch, as the network gives them.

        With `state` (parameters and buffers by name) a pure function of (state, batch).
        """
        arguments, named = self.arguments(batch)
        if state is None:
            found = self.network(*arguments, **named)
        else:
            found = functional_call(self.network, dict(state), arguments, named)
        if not isinstance(found, Tensor):
            raise ConfigError(
                f"{type(self.network).__name__} gave a {type(found).__name__}; expected scores."
            )
        if batch.is_day and not self.cross_section:
            return found.reshape(*batch.date.shape, *found.shape[1:])
        return found

    def arguments(self, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """What `forward` is given: by place, and by keyword."""
        if self.cross_section and not batch.is_day:
            raise ConfigError(
                f"{type(self.network).__name__} scores whole days at once; give it day batches: "
                "model.batch.order=day (in Python, batch={'order': 'day'})."
            )
        given = batch if self.cross_section else batch.flat()
        x = given.x
        if self.flat:
            x = x.transpose(-1, -2).flatten(-2)
        first = next(self.network.parameters(), None)
        if first is not None and x.dtype != first.dtype:
            x = x.to(first.dtype)
        named = {name: self._extra(given, name) for name in self.extras}
        if not self.cross_section:
            return (x,), named
        mask = given.mask
        assert mask is not None, "a day batch has a mask"
        return (x, mask), named

    def _extra(self, batch: Batch, name: str) -> Tensor:
        if name in ("instrument", "date"):
            found: Tensor = getattr(batch, name)
            return found
        if name not in batch.extra:
            known = ", ".join(sorted({*batch.extra, "instrument", "date"} - {"raw_label"}))
            raise ConfigError(
                f"{type(self.network).__name__} needs the tensor {name!r} with each sample, which "
                f"the dataset does not give (it gives {known}). Add it: "
                f"dataset.extras.{name}={{_target_: ...}}, see qtorch.data.extras."
            )
        return batch.extra[name]
