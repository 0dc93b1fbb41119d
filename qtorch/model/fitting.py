"""One training: samples, module, trainer, checkpoints; from the first step or from where it was."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from qtorch.core.errors import ConfigError
from qtorch.core.identity import digest
from qtorch.core.runtime import seed_everything
from qtorch.data.batches import BatchLoader
from qtorch.data.sample_set import Samples
from qtorch.metrics.loss import Loss
from qtorch.model.checkpoint import KEEPER, LAST, checkpoint_to_resume
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
from qtorch.model.generators import preserved_generators
from qtorch.model.interruption import Interruption, StopTraining, TrainingInterrupted
from qtorch.model.keeper import Keeper, weights_of
from qtorch.model.module import ScoreModule
from qtorch.model.pruning import pruning_callbacks
from qtorch.model.recorder_logger import RecorderLogger
from qtorch.model.scoring import evaluation_size
from qtorch.model.step_loader import StepLoader
from qtorch.model.trainer_options import (
    TrainerOptions,
    build_trainer,
    check_monitor,
    early_stopping,
    inner_steps_of,
    limited,
)
from qtorch.model.training_identity import training_identity

log = logging.getLogger(__name__)

QUIET = (
    r".*LeafSpec.*is deprecated",
    r".*`validation_step` but have no `val_dataloader`",
    r".*`srun` command is available",  # a fit is one process on any node of a cluster
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


def fit_network(
    make_network: Callable[[], nn.Module],
    train: Samples,
    valid: Samples | None,
    recipe: Recipe,
    *,
    device: torch.device,
    recorder: Any,
    resume: str | Path | None,
    start: str = "fresh",
    tuning: FineTuning | None = None,
    optimizer_state: dict[str, Any] | None = None,
) -> Fitted:
    """Train and give the best weights. Global generators are afterwards as they were before.

    `make_network` is called with the generators seeded. `start` says where the weights come from,
    which tells this training's checkpoints from those of another one. `tuning` says what of a
    fitted network learns on, `optimizer_state` where its optimizer begins.
    """
    with preserved_generators(), _quiet_lightning(), Interruption() as interruption:
        seed_everything(recipe.seed)
        network = make_network().train()  # a fitted one comes in evaluation mode
        if tuning is not None:
            network = tuning.prepared(network)
            start = digest({"start": start, "tuning": tuning.description})
        identity = training_identity(network, train, valid, recipe, start)
        moved = train.to(device), None if valid is None else valid.to(device)
        fit = _Fit(network, *moved, recipe, tuning, optimizer_state)
        with _folder(recipe, recorder) as folder:
            found = checkpoint_to_resume(resume, folder, identity)
            keeper = fit.prepare(folder, identity, interruption, recorder)
            try:
                fit.run(found)
            except (StopTraining, KeyboardInterrupt, SystemExit) as stop:
                if isinstance(stop, SystemExit) and not isinstance(
                    stop.__context__, KeyboardInterrupt
                ):
                    raise
                raise _interrupted(keeper, folder, recorder) from None
        return fit.result(found)


class _Fit:
    """The parts of one training, and Lightning's run over them."""

    def __init__(
        self,
        network: nn.Module,
        train: Samples,
        valid: Samples | None,
        recipe: Recipe,
        tuning: FineTuning | None,
        optimizer_state: dict[str, Any] | None,
    ) -> None:
        self.recipe, self.train, self.valid = recipe, train, valid
        self.tuning, self.optimizer_state = tuning, optimizer_state
        self.own_module = isinstance(network, pl.LightningModule)
        self.num_parameters = sum(p.numel() for p in network.parameters())
        self.network = network

    def prepare(
        self, folder: Path | None, identity: str, interruption: Interruption, recorder: Any
    ) -> Keeper:
        recipe, options = self.recipe, self.recipe.trainer
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
        )
        self.keeper = keeper
        own: list[pl.Callback] = [keeper] if stopper is None else [stopper, keeper]
        if self.tuning is not None:
            own = [*self.tuning.callbacks(self.network), *own]
        own = [*pruning_callbacks(recorder), *own]
        self.trainer = build_trainer(
            options,
            own=own,
            logger=None if recorder is None else RecorderLogger(recorder),
            folder=folder,
            loader=self.loader,
            automatic=self.module.automatic_optimization,
        )
        if isinstance(self.module, ScoreModule) and (epochs := self.trainer.max_epochs or -1) > 0:
            self.trainer.fit_loop.max_epochs = epochs + self.module.pretraining_epochs
        keeper.show = not self.trainer.progress_bar_callback
        return keeper

    def _module(self, interruption: Interruption) -> pl.LightningModule:
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
            complete=self.train.target is not None and not bool(self.train.target.isnan().any()),
            day_label=day_label(recipe.day_label),
            interrupted=lambda: interruption.requested,
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
        source = BatchLoader(
            samples,
            batch_size=batch["size"] if training else evaluation_size(batch, samples.device),
            order=order,
            seed=self.recipe.seed,
            days_per_batch=batch["days_per_batch"],
        )
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

    def run(self, found: tuple[Path, dict[str, Any]] | None) -> None:
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

    def result(self, found: tuple[Path, dict[str, Any]] | None) -> Fitted:
        keeper, network = self.keeper, weights_of(self.module)
        keeper._elapse()
        if keeper.best_weights is not None:
            network.load_state_dict(keeper.best_weights)
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
            "inner_steps": self.loader.inner_steps,
            "seed": self.recipe.seed,
            "resumed_from": None if found is None else str(found[0]),
        }
        if self.tuning is not None:
            report["tuning"] = self.tuning.description
        return Fitted(network, keeper.history, report, keeper.best_optimizer)


def _taken_up(factory: OptimizerFactory, state: dict[str, Any], parameters: Any) -> Any:
    """An optimizer that begins with another's moments, and its own rates."""
    optimizer = factory(parameters)
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if count != sum(len(group["params"]) for group in state["param_groups"]):
        raise ConfigError("keep_optimizer: the optimizer's state is of other parameters.")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state["state"]})
    return optimizer


@contextmanager
def _folder(recipe: Recipe, recorder: Any) -> Iterator[Path | None]:
    """Where checkpoints go: the given folder, the run's, or a temporary one that stays only when
    the training does not end well."""
    if recipe.checkpoint.get("enabled", True) is False:
        yield None
        return
    given = recipe.checkpoint.get("dir")
    if given is not None or recorder is not None:
        folder = Path(given) if given is not None else Path(recorder.checkpoint_dir())
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix="qtorch-fit-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _interrupted(keeper: Keeper, folder: Path | None, recorder: Any) -> TrainingInterrupted:
    path = None if folder is None or not (folder / LAST).exists() else folder / LAST
    where = ""
    if keeper.stopped_at is not None:
        epoch, position = keeper.stopped_at
        where = f" in epoch {epoch} after batch {position} of {keeper.loader.num_batches}"
    if path is None:
        return TrainingInterrupted(f"training interrupted{where}; there is no checkpoint.")
    how = f"fit(..., resume={str(path)!r})"
    if recorder is not None:
        how = f"the same fit in run {recorder.id} (R.start(recorder_id=..., resume=True))"
    return TrainingInterrupted(
        f"training interrupted{where}; the checkpoint {path} is kept. Go on with {how}.", str(path)
    )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's greetings (devices found, why it stopped) are not the user's log, nor are its
    warnings of what is meant here (no valid segment) or is its own affair."""
    loggers = [logging.getLogger(n) for n in ("pytorch_lightning", "lightning.pytorch")]
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
