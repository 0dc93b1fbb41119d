"""One training in this process: samples, module, trainer, checkpoints; whole or a rank's share."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import nn

from qtorch.core.errors import ConfigError
from qtorch.data.batches import BatchLoader
from qtorch.data.sample_set import Samples
from qtorch.data.shares import BlockLoader, SharedLoader
from qtorch.metrics.loss import Combined, Loss
from qtorch.model.checkpoint import KEEPER
from qtorch.model.day_label import day_label
from qtorch.model.factories import (
    OptimizerFactory,
    configured_factory,
    explained,
    loss_of,
    optimizer_factory,
    scheduler_plan,
)
from qtorch.model.finetuning import FineTuning
from qtorch.model.interruption import Stoppable
from qtorch.model.keeper import Keeper, weights_of
from qtorch.model.module import ScoreModule, no_interruption
from qtorch.model.own_share import OwnShare
from qtorch.model.pruning import pruning_callbacks
from qtorch.model.rank_environment import RankPlace
from qtorch.model.rank_group import RankGroup
from qtorch.model.recorder_logger import RecorderLogger
from qtorch.model.scoring import evaluation_size
from qtorch.model.sharding import is_sharded, whole_weights
from qtorch.model.step_loader import StepLoader
from qtorch.model.trainer_options import (
    TrainerOptions,
    build_trainer,
    check_monitor,
    early_stopping,
    inner_steps_of,
    limited,
    shards_weights,
)

log = logging.getLogger(__name__)

LIGHTNINGS = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric")
DDP = (None, "auto", "ddp")
QUIET = (
    r".*LeafSpec.*is deprecated",
    r".*`validation_step` but have no `val_dataloader`",
    r".*`srun` command is available",  # a fit is one process on any node of a cluster
    r".*self\.log\('(train/|valid/|lr).*sync_dist=True",  # they are summed over ranks already
    r".*FSDP2-wrapped module.* returned a view",  # scores are never changed in place
)


@dataclass
class Recipe:
    """How to train: the model's arguments, checked."""

    loss: Any
    module: Any
    day_label: Any
    optimizer: Any
    scheduler: Any
    batch: dict[str, Any]
    trainer: TrainerOptions
    monitor: str
    early_stop: Any
    checkpoint: dict[str, Any]
    inner_steps: int | str
    compile: bool | dict[str, Any]
    seed: int


@dataclass
class Fitted:
    """What a training leaves: the network with its best weights, its history, its figures."""

    network: nn.Module
    history: list[dict[str, float]]
    report: dict[str, Any] = field(default_factory=dict)
    optimizer_state: dict[str, Any] | None = None


class Training:
    """The parts of one training, and Lightning's run over them.

    `place`: which rank of several this process is; its loaders give it its share of each batch.
    """

    def __init__(
        self,
        network: nn.Module,
        train: Samples,
        valid: Samples | None,
        recipe: Recipe,
        tuning: FineTuning | None,
        optimizer_state: dict[str, Any] | None,
        place: RankPlace | None = None,
    ) -> None:
        self.place = place
        self.ranks = RankGroup() if place is None else RankGroup(place.rank, place.size)
        self.recipe, self.train, self.valid = recipe, train, valid
        self.tuning, self.optimizer_state = tuning, optimizer_state
        self.own_module = isinstance(network, pl.LightningModule)
        self.num_parameters = sum(p.numel() for p in network.parameters())
        self.network = network
        # What a sharded network is put together in, in the end.
        sharded = place is not None and shards_weights(recipe.trainer)
        self.whole = copy.deepcopy(network) if sharded and self.ranks.first else None

    def prepare(
        self, folder: Path | None, identity: str, interruption: Stoppable, recorder: Any
    ) -> Keeper:
        """Build module, loader, keeper and trainer."""
        recipe, options = self.recipe, self._options()
        stopper, monitor, mode = early_stopping(recipe.early_stop, recipe.monitor)
        if not self.own_module:
            check_monitor(monitor)
        if stopper is not None and self.valid is None and monitor.startswith("valid/"):
            raise ConfigError(
                f"early_stop watches {monitor!r}, but the dataset has no segment 'valid'."
            )
        every = recipe.checkpoint.get("every_n_steps")
        if every is not None:
            every = -(-int(every) // options.accumulate) * options.accumulate
        self.module = self._module(interruption)
        self.loader = self._loader(self.train, True, options.limit_train, every)
        keeper = Keeper(
            self.loader,
            folder=folder,
            identity=identity,
            monitor=monitor,
            mode=mode,
            interruption=interruption,
            every_n_steps=every,
            ranks=self.ranks,
        )
        self.keeper = keeper
        own: list[pl.Callback] = [keeper] if stopper is None else [stopper, keeper]
        if self.tuning is not None:
            own = [*self.tuning.callbacks(self.network), *own]
        own = [*pruning_callbacks(recorder), *own]
        if self.place is not None and self.own_module:
            own = [OwnShare(self.ranks), *own]
        self.trainer = build_trainer(
            options,
            own=own,
            logger=None if recorder is None else RecorderLogger(recorder),
            folder=folder,
            loader=self.loader,
            automatic=self.module.automatic_optimization,
            place=self.place,
        )
        if isinstance(self.module, ScoreModule) and (epochs := self.trainer.max_epochs or -1) > 0:
            self.trainer.fit_loop.max_epochs = epochs + self.module.pretraining_epochs
        keeper.show = not self.trainer.progress_bar_callback
        if self.place is not None:
            # Lightning asks the device before each step whether a signal came; ranks hear their
            # parent instead, and agree by the keeper.
            loop: Any = self.trainer.fit_loop.epoch_loop
            loop._broadcast_sigterm_tensor = _nothing_to_ask
        return keeper

    def _options(self) -> TrainerOptions:
        """The trainer's, with DDP told where some weights do not learn yet."""
        options = self.recipe.trainer
        waiting = self.tuning is not None and self.tuning.unfreeze_every is not None
        if self.place is None or not waiting or options.rest.get("strategy") not in DDP:
            return options
        rest = {**options.rest, "strategy": "ddp_find_unused_parameters_true"}
        return replace(options, rest=rest)

    def _module(self, interruption: Stoppable) -> pl.LightningModule:
        if isinstance(self.network, pl.LightningModule):
            return self.network
        recipe, options = self.recipe, self.recipe.trainer
        loss = loss_of(recipe.loss)
        weighted = self.train.weight is not None
        if weighted and not isinstance(loss, Loss):
            raise ConfigError(
                f"a reweighter is given, but the loss {type(loss).__name__} takes no weights; "
                "derive it from qtorch.metrics.loss.Loss."
            )
        if recipe.compile:
            self.network.compile(**(recipe.compile if isinstance(recipe.compile, dict) else {}))
        make = ScoreModule
        if recipe.module is not None:
            make = configured_factory(recipe.module, "module")  # type: ignore[assignment]  # asked below
        module = make(
            self.network,
            loss,
            self._optimizer(),
            scheduler_plan(recipe.scheduler),
            num_days=len(self.train.calendar if self.valid is None else self.valid.calendar),
            accumulate=options.accumulate,
            clip_value=options.clip_value,
            clip_algorithm=options.clip_algorithm,
            complete=self._complete(loss),
            day_label=day_label(recipe.day_label),
            # Ranks stop together, at the end of a training_step.
            interrupted=interruption.is_requested if self.place is None else no_interruption,
            ranks=self.ranks,
        )
        if not isinstance(module, ScoreModule):
            raise ConfigError(
                f"the module is a {type(module).__name__}; expected a qtorch.model.ScoreModule. "
                "(A LightningModule that trains itself is given as the network.)"
            )
        if self.tuning is not None:
            module.pretraining_epochs = 0  # weights that were learnt go on from where they are
        module.bind(self.train, self.valid)
        self.train.raw_label = None  # these samples are a copy of ours; a step learns from y alone
        return module

    def _complete(self, loss: Any) -> bool:
        """Whether no training label is missing; of a sum of losses it does not help the ranks."""
        if self.place is not None and isinstance(loss, Combined):
            loss.whole = self.ranks.sum
            return False
        return self.train.target is not None and not bool(self.train.target.isnan().any())

    def _optimizer(self) -> OptimizerFactory:
        factory, state = explained(optimizer_factory(self.recipe.optimizer)), self.optimizer_state
        if self.tuning is not None:
            factory = self.tuning.optimizer(factory, self.network)
        return factory if state is None else partial(_taken_up, factory, state)

    def _loader(
        self, samples: Samples, training: bool, limit: int | float | None, cut: int | None
    ) -> StepLoader:
        batch, options = self.recipe.batch, self.recipe.trainer
        order = batch["order"]
        if not training:
            order = "day_sequential" if order.startswith("day") else "sequential"
        named: dict[str, Any] = {
            "batch_size": batch["size"] if training else evaluation_size(batch, samples.device),
            "order": order,
            "seed": self.recipe.seed,
            "days_per_batch": batch["days_per_batch"],
        }
        if self.place is None:
            source = BatchLoader(samples, **named)
        else:
            source, limit = self._shared(samples, training, limit, named)
        number = limited(len(source), limit)
        if number == 0 and training:
            raise ConfigError(f"limit_train_batches {limit} leaves no batch of {len(source)}.")
        return StepLoader(
            source,
            lambda: self.trainer.current_epoch,
            inner_steps=inner_steps_of(self.recipe.inner_steps, options, number),
            limit=number,
            cut_every=cut,
            plain=self.own_module,
        )

    def _shared(
        self, samples: Samples, training: bool, limit: int | float | None, named: dict[str, Any]
    ) -> tuple[BatchLoader, int | float | None]:
        """This rank's share of the batches, and the limit that is left to apply to it."""
        own = {"rank": self.ranks.rank, "world": self.ranks.size, **named}
        if training:
            return SharedLoader(samples, trim=self.own_module, **own), limit
        whole = limited(len(BatchLoader(samples, **named)), limit)
        return BlockLoader(samples, limit=whole, blanks=not self.own_module, **own), None

    def run(self, found: tuple[Path, dict[str, Any]] | None) -> None:
        """Train, from the checkpoint that was found or from the first step."""
        checkpoint = None if found is None else found[0]
        if found is not None:
            log.info("resuming from %s", checkpoint)
            self.loader.cut(found[1][KEEPER]["inner_steps"], found[1][KEEPER]["cut_every"])
        loader = None
        if self.valid is not None and self.recipe.trainer.limit_valid != 0:
            loader = self._loader(self.valid, False, self.recipe.trainer.limit_valid, None)
        self.trainer.fit(
            self.module,
            self.loader,
            loader,
            ckpt_path=None if checkpoint is None else str(checkpoint),
            weights_only=None if checkpoint is None else True,
        )
        self.keeper.deliver(self.trainer)  # where nothing was left to train, it is not yet

    def result(self, found: tuple[Path, dict[str, Any]] | None) -> Fitted:
        """What the training leaves."""
        keeper, network = self.keeper, weights_of(self.module)
        keeper._elapse()
        weights = keeper.best_weights
        if is_sharded(network):
            weights = whole_weights(network) if weights is None else weights
            network = self.network if self.whole is None else self.whole
        if weights:
            network.load_state_dict(weights)
        network.cpu()
        if self.tuning is not None:
            network = self.tuning.finished(network)
        if self.recipe.compile:
            network._compiled_call_impl = None  # a compiled call cannot be saved
        rate = keeper.num_trained / keeper.train_seconds if keeper.train_seconds else 0.0
        report: dict[str, Any] = {
            "epochs": len(keeper.history),
            "best_epoch": keeper.best_epoch,
            "monitor": keeper.monitor,
            "best_value": keeper.best_value,
            "seconds": keeper.seconds,
            "train_seconds": keeper.train_seconds,
            "samples": len(self.train),
            "valid_samples": 0 if self.valid is None else len(self.valid),
            "samples_per_second": rate,
            "parameters": self.num_parameters,
            "device": str(self.train.device),
            "devices": self.ranks.size,
            "inner_steps": self.loader.inner_steps,
            "seed": self.recipe.seed,
            "resumed_from": None if found is None else str(found[0]),
        }
        if self.tuning is not None:
            report["tuning"] = self.tuning.description
        return Fitted(network, keeper.history, report, keeper.best_optimizer)


def _nothing_to_ask() -> None:
    """Stands where Lightning would ask."""


def _taken_up(factory: OptimizerFactory, state: dict[str, Any], parameters: Any) -> Any:
    """An optimizer that begins with another's moments, and its own rates."""
    optimizer = factory(parameters)
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if count != sum(len(group["params"]) for group in state["param_groups"]):
        raise ConfigError("keep_optimizer: the optimizer's state is of other parameters.")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state["state"]})
    return optimizer


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's greetings (devices found, why it stopped) are not the user's log, nor are its
    warnings of what is meant here (no valid segment) or is its own affair."""
    loggers = [logging.getLogger(n) for n in LIGHTNINGS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logging.WARNING, logger.level))
    try:
        with warnings.catch_warnings():
            for text in QUIET:
                warnings.filterwarnings("ignore", message=text)
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
