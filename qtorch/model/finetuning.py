"""The options of `finetune`: which parts of a fitted network are trained, and how fast."""

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

StatisticsMode = Literal["keep", "refit", "adapt"]
STATISTICS: tuple[str, ...] = ("keep", "refit", "adapt")
LORA_OPTIONS = ("rank", "alpha", "targets", "trained")


@dataclass(frozen=True)
class FineTuning:
    """Which parameters are trained in a fine-tuning, and how.

    `train`: "all", "head" (the last layer), or patterns of parameter names (`["fc_out.*"]`).
    `frozen`: patterns of parameters that are not trained.
    `layer_decay`: each layer's learning rate is this fraction of the one above it; the head has the
    full rate.
    `unfreeze_every`: train only the head at first, and unfreeze one more layer every so many
    epochs.
    `lora`: `rank`, `alpha`, `targets`, `trained` (see `qtorch.nn.LoRA`); the low-rank products are
    merged into the weights at the end.
    `keep_optimizer`: start from the optimizer state of the previous training; it must belong to the
    whole network and nothing else.
    `statistics`: batch norm statistics: "keep" normalizes with the running statistics and leaves
    them unchanged, "refit" resets them, "adapt" continues updating them; None means "adapt".
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
                f"unfreeze_every is {self.unfreeze_every}; expected at least 1 epoch."
            )
        if self.statistics is not None and self.statistics not in STATISTICS:
            raise ConfigError(unknown_name("statistics", str(self.statistics), STATISTICS))
        for name in self.lora or {}:
            if name not in LORA_OPTIONS:
                raise ConfigError(unknown_name("option of lora", str(name), LORA_OPTIONS))
        is_partial = self.lora is not None or self.train != "all" or bool(self.frozen)
        if self.lora is not None and (self.train != "all" or self.unfreeze_every or self.frozen):
            raise ConfigError(
                "lora defines which weights are trained: remove train, frozen and unfreeze_every."
            )
        if self.keep_optimizer and (is_partial or self.layer_decay != 1):
            raise ConfigError(
                "keep_optimizer only works when all weights are trained at one rate: "
                "remove keep_optimizer, or lora, train, frozen and layer_decay."
            )
        options = {f.name: (getattr(self, f.name), f.default) for f in fields(self) if f.init}
        defaults = {k for k, (value, default) in options.items() if value in (default, [])}
        description = {
            k: value for k, (value, _) in options.items() if k not in defaults or k == "train"
        }
        self.description.update(description)

    # -- before and after ----------------------------------------------------------------------

    def check(self, network: nn.Module) -> None:
        """Raise ConfigError if fine-tuning options are set for a user's LightningModule."""
        if isinstance(network, pl.LightningModule) and self != FineTuning():
            raise ConfigError(
                "a LightningModule with its own training loop decides what is trained: remove "
                f"{', '.join(self.description)}."
            )

    def optimizer_state(
        self, network: nn.Module, state: dict[str, Any] | None, report: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Return the optimizer state to start from, or None for a new optimizer.

        `state` is what the training of `report` has left. Raises ConfigError if it contains more
        than the network's parameters.
        """
        if not self.keep_optimizer:
            return None
        if state is None:
            raise ConfigError("keep_optimizer: this model was saved without optimizer state.")
        num_tensors = sum(len(group["params"]) for group in state["param_groups"])
        kind = type(network).__name__
        if options := _partial_options(report.get("tuning") or {}):
            raise ConfigError(
                f"keep_optimizer: this {kind} was last trained with {', '.join(options)}, so its "
                "optimizer state does not match this training: remove keep_optimizer."
            )
        if num_tensors > (num_parameters := len(list(network.parameters()))):
            raise ConfigError(
                f"keep_optimizer: the optimizer of this {kind} has updated {num_tensors} tensors, "
                f"but only {num_parameters} belong to the network. The others (a decoder, an "
                "adversary, gates) are created again by each training: remove keep_optimizer."
            )
        return state

    def prepare_network(self, network: nn.Module) -> nn.Module:
        """Mark the trainable parameters of the network; with `lora`, wrap it."""
        if self.statistics == "refit":
            for norm in _batch_norms(network):
                norm.reset_running_stats()
        if self.lora is not None:
            options = {"trained": [f"{n}" for n in layer_groups(network)[-1]], **self.lora}
            try:
                return LoRA(network, **options)
            except ValueError as error:
                raise ConfigError(f"lora: {error}") from error
        trainable_names = self._trainable_names(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in trainable_names)
        return network

    def finalize_network(self, network: nn.Module) -> nn.Module:
        """Return the network for prediction: LoRA merged, nothing frozen."""
        return network.merge() if isinstance(network, LoRA) else network.requires_grad_(True)

    def _trainable_names(self, network: nn.Module) -> set[str]:
        names = [name for name, _ in network.named_parameters()]
        if self.train == "all":
            trainable = set(names)
        elif self.train == "head":
            trainable = set(layer_groups(network)[-1])
        else:
            patterns = [self.train] if isinstance(self.train, str) else list(self.train)
            trainable = _match_patterns(names, patterns, "train")
        trainable -= _match_patterns(names, self.frozen, "frozen")
        if not trainable:
            raise ConfigError("nothing to train: every parameter is frozen.")
        return trainable

    # -- rates and callbacks -------------------------------------------------------------------

    def scale_layer_rates(self, factory: OptimizerFactory, network: nn.Module) -> OptimizerFactory:
        """Return an optimizer factory with a rate for each layer, if `layer_decay` is set."""
        if self.layer_decay == 1:
            return factory
        layers = layer_groups(network)
        network_parameters = dict(network.named_parameters())

        def build(parameters: Iterable[nn.Parameter]) -> Optimizer:
            parameter_list = list(parameters)
            trainable_ids, network_ids = (
                {id(p) for p in parameter_list},
                {id(p) for p in network_parameters.values()},
            )
            groups, rate_factors = [], []
            for depth, names in enumerate(reversed(layers)):
                layer_parameters = [
                    network_parameters[n]
                    for n in names
                    if id(network_parameters[n]) in trainable_ids
                ]
                if layer_parameters:
                    groups.append({"params": layer_parameters})
                    rate_factors.append(self.layer_decay**depth)
            # Auxiliary parameters of the training module are not part of any layer.
            if other_parameters := [p for p in parameter_list if id(p) not in network_ids]:
                groups.append({"params": other_parameters})
                rate_factors.append(1.0)
            optimizer = factory(groups)  # type: ignore[arg-type]  # parameter groups
            for group, rate_factor in zip(optimizer.param_groups, rate_factors, strict=True):
                group["lr"] = group["lr"] * rate_factor
            return optimizer

        return build

    def callbacks(self, network: nn.Module) -> list[pl.Callback]:
        """Return the callbacks that act during training."""
        active: list[pl.Callback] = []
        if self.unfreeze_every is not None:
            active.append(
                GradualUnfreezing(network, self._trainable_names(network), self.unfreeze_every)
            )
        if self.statistics == "keep":
            active.append(FrozenBatchNorms())
        return active


class GradualUnfreezing(pl.Callback):
    """Unfreeze layers from the head down, one more every so many epochs.

    Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018.
    """

    def __init__(self, network: nn.Module, trainable_names: set[str], every: int) -> None:
        parameters = dict(network.named_parameters())
        layers = [
            [parameters[n] for n in names if n in trainable_names]
            for names in layer_groups(network)
        ]
        self.layers = [layer for layer in reversed(layers) if layer]
        self.every = every

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze and unfreeze by the epoch number alone, so that a resumed training agrees."""
        num_trainable = 1 + trainer.current_epoch // self.every
        for depth, layer in enumerate(self.layers):
            for parameter in layer:
                parameter.requires_grad_(depth < num_trainable)


class FrozenBatchNorms(pl.Callback):
    """Keep batch norms in evaluation mode: they use their running statistics unchanged."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for norm in _batch_norms(pl_module):
            norm.eval()


def _partial_options(tuning: Mapping[str, Any]) -> list[str]:
    """Return the options that gave an earlier optimizer a subset or groups of the parameters."""
    defaults = {"train": "all", "frozen": (), "layer_decay": 1.0, "lora": None}
    return [name for name in defaults if tuning.get(name, defaults[name]) != defaults[name]]


def _batch_norms(network: nn.Module) -> list[Any]:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return [m for m in network.modules() if isinstance(m, kinds)]


def _match_patterns(names: Sequence[str], patterns: Sequence[str], option: str) -> set[str]:
    """Return the names that match a pattern; raise ConfigError for a pattern without a match."""
    matches: set[str] = set()
    for pattern in patterns:
        new_matches = {name for name in names if fnmatch(name, pattern)}
        if not new_matches:
            raise ConfigError(
                f"{option}: {pattern!r} matches no parameter; the names are {list(names)}."
            )
        matches |= new_matches
    return matches
