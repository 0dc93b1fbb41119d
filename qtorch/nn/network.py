"""The base of all networks: what a network says about itself, and nothing about training."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn


class Network(nn.Module):
    """A score for each sample of a batch: maths alone.

    `inputs` declares what `forward` takes: "window" is `x [B, T, F]`; "flat" is `x [B, F * T]`,
    feature by feature (all steps of the first feature, oldest first, then of the second), the
    order in which Qlib lays out Alpha360. `forward` returns `[B]`, or `[B, Q]` where
    `num_outputs` (Q, one per label column) is more than one. `d_feat` is the number of features
    (of inputs, for a flat network) and is filled from the dataset where it is not given, as are
    `step_len` (T), `num_instruments` (of the dataset's panel) and `num_days` (of its calendar)
    where the constructor takes them.

    With `cross_section` a network sees whole days: `forward(x, mask)` takes `x [G, N, T, F]`
    (`[G, N, F * T]` if flat) and `mask [G, N]` bool, False for padding, and returns `[G, N]` or
    `[G, N, Q]`. What it gives for padding is of no consequence, and padding changes nothing else.

    `extras` names the tensors that `forward` takes by keyword besides: "instrument" and "date"
    (`[B]` int64, the panel's columns and rows), and whatever the dataset adds by the same name.

    A network keeps its constructor's arguments, so that `config` describes it.
    """

    inputs: ClassVar[Literal["window", "flat"]] = "window"
    cross_section: ClassVar[bool] = False
    extras: ClassVar[tuple[str, ...]] = ()

    num_outputs: int
    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self: Self = super().__new__(cls)
        # Past nn.Module.__setattr__, which wants __init__ to have run.
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        names = list(bound.signature.parameters)[1:]
        given = {n: bound.arguments[n] for n in names if n in bound.arguments}
        self.__dict__["arguments"] = given
        return self

    def __init__(self, num_outputs: int = 1) -> None:
        super().__init__()
        if num_outputs < 1:
            raise ValueError(f"num_outputs is {num_outputs}; a network gives at least one score.")
        self.num_outputs = num_outputs

    @property
    def config(self) -> dict[str, Any]:
        """The mapping that builds a network of this form: `{"_target_": ..., argument: value}`."""
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}", **self.arguments}

    def scores(self, outputs: Tensor) -> Tensor:
        """`[..., Q]` outputs of the last layer as they are, or `[...]` where Q is one."""
        return outputs[..., 0] if self.num_outputs == 1 else outputs
