"""The base class of all networks, which declares what inputs a network takes."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn


class Network(nn.Module):
    """A network that returns a score for each sample of a batch.

    `inputs` declares what `forward` takes: "window" is `x [B, T, F]`; "flat" is `x [B, F * T]`,
    feature by feature (all steps of the first feature, oldest first, then of the second), which
    is Qlib's order of Alpha360. `forward` returns `[B]`, or `[B, Q]` if `num_outputs` (Q, one per
    label column) is more than one. `d_feat` is the number of features (of inputs, for a flat
    network). It is filled in from the dataset if it is not set, as are the constructor arguments
    `step_len` (T), `num_instruments` (of the dataset's panel) and `num_days` (of its calendar). An
    argument `close_column` that names a feature gives `close_index`, its position, and so on.

    A network with `cross_section` takes whole days: `forward(x, mask)` takes `x [G, N, T, F]`
    (`[G, N, F * T]` if flat; G days in a batch) and `mask [G, N]` bool, False for padding, and
    returns `[G, N]` or `[G, N, Q]`. Its outputs for padding are ignored, and padding must not
    affect the other outputs.

    `extras` names additional tensors that `forward` takes as keyword arguments: "instrument" and
    "date" (`[B]` int64, columns and rows of the panel), and extras of the dataset by name.

    `recurrent_layer` names the layer that takes the recurrent weights of a trained LSTM or GRU.

    `layer_chain` names the `nn.Sequential` of a flat network that passes its inputs through it and
    returns the `scores` of its outputs, and does nothing else. Several members of such a network
    are then trained with fewer operations.

    A network stores its constructor arguments, so that `config` describes it.
    """

    inputs: ClassVar[Literal["window", "flat"]] = "window"
    cross_section: ClassVar[bool] = False
    extras: ClassVar[tuple[str, ...]] = ()
    recurrent_layer: ClassVar[str] = "rnn"
    layer_chain: ClassVar[str | None] = None

    num_outputs: int
    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self: Self = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        # nn.Module.__setattr__ cannot be used, because it requires __init__ to have run.
        self.__dict__["arguments"] = dict(list(bound.arguments.items())[1:])  # without self
        return self

    def __init__(self, num_outputs: int = 1) -> None:
        super().__init__()
        if num_outputs < 1:
            raise ValueError(f"num_outputs is {num_outputs}; expected at least 1.")
        self.num_outputs = num_outputs

    @property
    def config(self) -> dict[str, Any]:
        """A Hydra config of the same architecture: `{"_target_": ..., argument: value}`."""
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}", **self.arguments}

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the last layer's outputs `[..., Q]`, without the last axis if Q is one."""
        # Unlike an index, squeeze has a gradient without a kernel.
        return outputs.squeeze(-1) if self.num_outputs == 1 else outputs
