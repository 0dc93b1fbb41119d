"""What of a fitted network learns on, and how fast: the choices of `finetune`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from typing import Any, Literal

import pytorch_lightning as pl
from torch import nn
from torch.optim import Optimizer

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.model.factories import OptimizerFactory
from qtorch.nn.layers import layer_groups
from qtorch.nn.lora import LoRA

Statistics = Literal["keep", "refit", "adapt"]
STATISTICS: tuple[str, ...] = ("keep", "refit", "adapt")
LORA_OPTIONS = ("rank", "alpha", "targets", "trained")


@dataclass(frozen=True)
class FineTuning:
    """Which parameters learn on.

    `train`: "all", "head" (the last layer), or patterns of parameter names (`["fc_out.*"]`).
    `frozen`: patterns that do not learn. `layer_decay`: each layer's rate is this share of the
    one above it; the head has the full rate. `unfreeze_every`: the head alone learns at first,
    and one layer more every so many epochs. `lora`: `rank`, `alpha`, `targets`, `trained` (see
    `qtorch.nn.LoRA`); its products are merged into the weights at the end. `keep_optimizer`: the
    optimizer goes on with the state of the training before, where that is of the whole network
    and of nothing beside it. `statistics`: of batch norms: "keep" leaves the running ones and
    normalises by them, "refit" begins them anew, "adapt" moves them on; None is "adapt".
    """

    train: str | Sequence[str] = "all"
    frozen: Sequence[str] = ()
    layer_decay: float = 1.0
    unfreeze_every: int | None = None
    lora: Mapping[str, Any] | None = None
    keep_optimizer: bool = False
    statistics: str | None = None
    description: dict[str, Any] = field(init=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay is {self.layer_decay}; expected above 0, at most 1.")
        if self.unfreeze_every is not None and self.unfreeze_every < 1:
            raise ConfigError(
                f"unfreeze_every is {self.unfreeze_every}; expected an epoch or more."
            )
        if self.statistics is not None and self.statistics not in STATISTICS:
            raise ConfigError(unknown_name("statistics", str(self.statistics), STATISTICS))
        for name in self.lora or {}:
            if name not in LORA_OPTIONS:
                raise ConfigError(unknown_name("option of lora", str(name), LORA_OPTIONS))
        partial = self.lora is not None or self.train != "all" or bool(self.frozen)
        if self.lora is not None and (self.train != "all" or self.unfreeze_every or self.frozen):
            raise ConfigError("lora says itself what learns; leave out train, frozen and unfreeze.")
        if self.keep_optimizer and (partial or self.layer_decay != 1):
            raise ConfigError(
                "the optimizer's state fits the training of all weights at one rate alone: "
                "leave out keep_optimizer, or lora, train, frozen and layer_decay."
            )
        said = {f.name: (getattr(self, f.name), f.default) for f in fields(self) if f.init}
        unsaid = {k for k, (value, default) in said.items() if value in (default, [])}
        kept = {k: value for k, (value, _) in said.items() if k not in unsaid or k == "train"}
        self.description.update(kept)

    # -- before and after ----------------------------------------------------------------------

    def check(self, network: nn.Module) -> None:
        """ConfigError where a LightningModule that trains itself is told what learns on."""
        if isinstance(network, pl.LightningModule) and self != FineTuning():
            raise ConfigError(
                "a LightningModule that trains itself says itself what learns on; leave out "
                f"{', '.join(self.description)}."
            )

    def optimizer_state(
        self, network: nn.Module, state: dict[str, Any] | None, report: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Where the optimizer goes on: the `state` that the training of `report` left; None where
        it begins anew. ConfigError where that state is of more than the network."""
        if not self.keep_optimizer:
            return None
        if state is None:
            raise ConfigError("keep_optimizer: this model was saved without its optimizer's state.")
        moved = sum(len(group["params"]) for group in state["param_groups"])
        kind = type(network).__name__
        if parts := _parts(report.get("tuning") or {}):
            raise ConfigError(
                f"keep_optimizer: this {kind} was last trained with {', '.join(parts)}, and its "
                "optimizer's state fits no other training; leave keep_optimizer out."
            )
        if moved > (own := len(list(network.parameters()))):
            raise ConfigError(
                f"keep_optimizer: the optimizer of this {kind} has moved {moved} tensors, {own} "
                "of them the network's; the others taught it (a decoder, an adversary, gates) and "
                "a training begins them anew: leave keep_optimizer out."
            )
        return state

    def prepared(self, network: nn.Module) -> nn.Module:
        """The network with what learns marked; with `lora`, wrapped."""
        if self.statistics == "refit":
            for norm in _batch_norms(network):
                norm.reset_running_stats()
        if self.lora is not None:
            options = {"trained": [f"{n}" for n in layer_groups(network)[-1]], **self.lora}
            try:
                return LoRA(network, **options)
            except ValueError as error:
                raise ConfigError(f"lora: {error}") from error
        chosen = self._chosen(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in chosen)
        return network

    def finished(self, network: nn.Module) -> nn.Module:
        """The network as it is predicted with: products merged, nothing frozen."""
        return network.merge() if isinstance(network, LoRA) else network.requires_grad_(True)

    def _chosen(self, network: nn.Module) -> set[str]:
        names = [name for name, _ in network.named_parameters()]
        if self.train == "all":
            chosen = set(names)
        elif self.train == "head":
            chosen = set(layer_groups(network)[-1])
        else:
            patterns = [self.train] if isinstance(self.train, str) else list(self.train)
            chosen = _fitting(names, patterns, "train")
        chosen -= _fitting(names, self.frozen, "frozen")
        if not chosen:
            raise ConfigError("nothing is left to learn: every parameter is frozen.")
        return chosen

    # -- rates and callbacks -------------------------------------------------------------------

    def optimizer(self, factory: OptimizerFactory, network: nn.Module) -> OptimizerFactory:
        """A factory that gives each layer its own rate, where `layer_decay` asks for it."""
        if self.layer_decay == 1:
            return factory
        layers = layer_groups(network)
        own = dict(network.named_parameters())

        def build(parameters: Iterable[nn.Parameter]) -> Optimizer:
            given = list(parameters)
            learnt, inner = {id(p) for p in given}, {id(p) for p in own.values()}
            groups, shares = [], []
            for depth, names in enumerate(reversed(layers)):
                kept = [own[n] for n in names if id(own[n]) in learnt]
                if kept:
                    groups.append({"params": kept})
                    shares.append(self.layer_decay**depth)
            # What a module teaches the network with is no layer of it.
            if beside := [p for p in given if id(p) not in inner]:
                groups.append({"params": beside})
                shares.append(1.0)
            optimizer = factory(groups)  # type: ignore[arg-type]  # groups, as torch takes them
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = group["lr"] * share
            return optimizer

        return build

    def callbacks(self, network: nn.Module) -> list[pl.Callback]:
        """What acts while it trains."""
        found: list[pl.Callback] = []
        if self.unfreeze_every is not None:
            found.append(Unfreezing(network, self._chosen(network), self.unfreeze_every))
        if self.statistics == "keep":
            found.append(FrozenNorms())
        return found


class Unfreezing(pl.Callback):
    """Layer by layer from the head down, one more every so many epochs.

    Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018.
    """

    def __init__(self, network: nn.Module, chosen: set[str], every: int) -> None:
        own = dict(network.named_parameters())
        layers = [[own[n] for n in names if n in chosen] for names in layer_groups(network)]
        self.layers = [layer for layer in reversed(layers) if layer]
        self.every = every

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """By the epoch alone, so that a training that is resumed is where it was."""
        open_layers = 1 + trainer.current_epoch // self.every
        for depth, layer in enumerate(self.layers):
            for parameter in layer:
                parameter.requires_grad_(depth < open_layers)


class FrozenNorms(pl.Callback):
    """Batch norms normalise by the running statistics they have, and leave them."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for norm in _batch_norms(pl_module):
            norm.eval()


def _parts(tuning: Mapping[str, Any]) -> list[str]:
    """The options of a fine-tuning by which its optimizer knew parts, or layers, apart."""
    whole = {"train": "all", "frozen": (), "layer_decay": 1.0, "lora": None}
    return [name for name in whole if tuning.get(name, whole[name]) != whole[name]]


def _batch_norms(network: nn.Module) -> list[Any]:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return [m for m in network.modules() if isinstance(m, kinds)]


def _fitting(names: Sequence[str], patterns: Sequence[str], what: str) -> set[str]:
    """The names that fit a pattern; ConfigError for a pattern that fits none."""
    found: set[str] = set()
    for pattern in patterns:
        own = {name for name in names if fnmatch(name, pattern)}
        if not own:
            raise ConfigError(f"{what}: {pattern!r} fits no parameter; there are {list(names)}.")
        found |= own
    return found
