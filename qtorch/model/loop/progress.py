"""What a fit has reached: the sums of the running epoch, the metrics so far, and the best epoch.

A usual fit trains one member. The classes here keep everything by member, so that a fit can train
several members of one architecture (seeds, learning rates, windows) at once: losses and sums then
have a member axis `[M]`, and each member has its own history, best weights and end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

TRAIN_LOSS, VALID_LOSS = "train/loss", "valid/loss"
VALID_IC, VALID_RANK_IC = "valid/ic", "valid/rank_ic"
PRETRAIN_LOSS, PRETRAIN_VALID_LOSS = "train/pretrain_loss", "valid/pretrain_loss"
LEARNING_RATE = "lr"
METRICS = (
    TRAIN_LOSS,
    VALID_LOSS,
    VALID_IC,
    VALID_RANK_IC,
    PRETRAIN_LOSS,
    PRETRAIN_VALID_LOSS,
    LEARNING_RATE,
)
# Short names of the metrics that early stopping and schedulers can monitor.
MONITOR_NAMES = {
    "loss": VALID_LOSS,
    "ic": VALID_IC,
    "rank_ic": VALID_RANK_IC,
    "train_loss": TRAIN_LOSS,
}
# How a user's module may name the segment of a metric: val_loss, validation/loss, train_loss.
SEGMENT_NAMES = {"valid": "valid|val|validation", "train": "train|training"}


def find_metric(name: str, names: Iterable[str]) -> str:
    """Return the one of `names` that `name` stands for: itself, or another spelling of its segment.

    "valid/loss" also stands for "val_loss" and "validation/loss" if exactly one of them is logged.
    Without such a metric `name` is returned.
    """
    names = list(names)
    segment, separator, rest = name.partition("/")
    if name in names or not separator or segment not in SEGMENT_NAMES:
        return name
    pattern = rf"(?:{SEGMENT_NAMES[segment]})[/_.\- ]?{re.escape(rest)}"
    matches = [n for n in names if re.fullmatch(pattern, n, re.IGNORECASE)]
    return matches[0] if len(matches) == 1 else name


def get_mode(name: str) -> str:
    """Return "min" if a smaller value of the metric is better, else "max"."""
    is_lower_better = any(word in name.lower() for word in ("loss", "error", "mse", "mae", "rmse"))
    return "min" if is_lower_better else "max"


class LossAccumulator:
    """Weighted loss sums of an epoch in float64, and the metrics of that epoch.

    `shape` is that of a batch's loss sum: () for a usual fit, `(M,)` for M members.
    `epoch_metrics` holds the metrics of the running epoch, one mapping for each member.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.shape = shape
        self.epoch_metrics: list[dict[str, float]] = [{} for _ in range(math.prod(shape))]
        self.reset(torch.device("cpu"))

    def reset(self, device: torch.device) -> None:
        """Set the sums to zero."""
        self.loss = torch.zeros(self.shape, dtype=torch.float64, device=device)
        self.weight = torch.zeros(self.shape, dtype=torch.float64, device=device)
        self.count = 0  # the part of the weight that is known on the host

    def clear_metrics(self) -> None:
        """Forget the metrics of the last epoch."""
        self.epoch_metrics = [{} for _ in self.epoch_metrics]

    def add(self, total: Tensor, weight: Tensor | int) -> None:
        """Add a batch: its sum of weight x loss, and its sum of weights."""
        self.loss += total
        if isinstance(weight, int):
            self.count += weight
        else:
            self.weight += weight

    def sums(self) -> Tensor:
        """Return the loss sums and the weight sums, `[2]` or `[2, M]` float64 on the device."""
        return torch.stack((self.loss, self.weight + self.count))

    def load_sums(self, sums: Tensor, device: torch.device) -> None:
        """Restore the result of `sums`."""
        self.reset(device)
        self.loss, self.weight = (part.to(device) for part in sums.unbind())

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint in the middle of an epoch holds."""
        return {"sums": self.sums().cpu(), "told": [dict(m) for m in self.epoch_metrics]}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore the state of a checkpoint."""
        self.load_sums(state["sums"], device)
        metrics = state["told"]
        # Checkpoints of format 2 hold a single mapping.
        members = metrics if isinstance(metrics, list) else [metrics]
        self.epoch_metrics = [dict(m) for m in members]


def mean_losses(sums: Tensor) -> list[float]:
    """Return loss sum / weight sum of each member, NaN if the weights sum to zero.

    `sums` is `[2]` or `[2, M]`. Waits for the device.
    """
    return [mean_or_nan(*pair) for pair in zip(*sums.reshape(2, -1).tolist(), strict=True)]


def mean_or_nan(total: float, weight: float) -> float:
    """Return total / weight, or NaN if the weight is zero."""
    return total / weight if weight else math.nan


@dataclass
class FitProgress:
    """The metrics of one member by epoch, and its best epoch with the weights of that epoch.

    `history` has an entry for each epoch, and one for each validation within an epoch; `steps` are
    their places on the curves' axis. `epochs` counts the finished epochs. `best_step` is the number
    of optimizer steps, `best_optimizer` the optimizer state of the best weights. `is_stopped`: the
    member's loss was not finite, so that it is not trained any further.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    epochs: int = 0
    best_epoch: int | None = None
    best_step: int | None = None
    best_value: float = math.nan
    best_weights: dict[str, Tensor] | None = None
    best_optimizer: dict[str, Any] | None = None
    is_stopped: bool = False

    def is_improvement(self, value: float, mode: str) -> bool:
        """Whether a value of the monitored metric is the best so far; `mode` is "min" or "max".

        NaN and infinite values are never the best.
        """
        is_better = value < self.best_value if mode == "min" else value > self.best_value
        return math.isfinite(value) and (is_better or math.isnan(self.best_value))

    def add_point(self, values: dict[str, float], step: int) -> None:
        """Add metrics to the history."""
        self.history.append(values)
        self.steps.append(step)

    def state_dict(self) -> dict[str, Any]:
        """Return the entries of a checkpoint."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "history": [dict(v) for v in self.history], "steps": list(self.steps)}

    @classmethod
    def from_states(cls, states: Sequence[dict[str, Any]]) -> list[Self]:
        """Return the members of a checkpoint; further entries of a state are ignored."""
        names = [f.name for f in fields(cls)]
        members = [cls(**{n: state[n] for n in names if n in state}) for state in states]
        for member, state in zip(members, states, strict=True):
            if "steps" not in state:  # written when every point was an epoch
                member.epochs = len(member.history)
                member.steps = list(range(member.epochs))
        return members
