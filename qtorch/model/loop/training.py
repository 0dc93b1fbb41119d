"""One training in this process, alone or as one rank: samples, module, trainer, checkpoints."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from torch import nn

from qtorch.core.configured import plain_value
from qtorch.core.errors import ConfigError
from qtorch.core.identity import digest
from qtorch.data.dataset.batches import BatchLoader, BlockLoader, ShardedLoader
from qtorch.data.dataset.samples import Samples
from qtorch.metrics.loss import BaseLoss, Combined
from qtorch.model.devices.numerics import describe_numerics
from qtorch.model.devices.step_graph import GraphedStep
from qtorch.model.finetune import FineTuning
from qtorch.model.loop.callbacks import pruning_callbacks
from qtorch.model.loop.checkpoint import CALLBACK_STATE_KEY, CheckpointCallback, get_network
from qtorch.model.loop.day_label import build_day_label
from qtorch.model.loop.factories import (
    OptimizerFactory,
    build_factory,
    build_loss,
    explain_errors,
    fuse_on_gpu,
    group_parameters,
)
from qtorch.model.loop.lightning_internals import (
    detach_module,
    move_tensors,
    resume_by_epochs,
    skip_sigterm_broadcast,
)
from qtorch.model.loop.loader import (
    StepLoader,
    count_batches,
    has_batch_norms,
    training_arguments,
    validation_arguments,
)
from qtorch.model.loop.loggers import RecorderLogger
from qtorch.model.loop.module import ScoreModule, never_stop
from qtorch.model.loop.options import (
    TrainerOptions,
    build_early_stopping,
    build_trainer,
    check_callbacks,
    check_monitor,
    check_valid_segment,
    is_sharding,
    limit_batches,
    resolve_inner_steps,
)
from qtorch.model.loop.progress import FitProgress
from qtorch.model.loop.rank_group import RankGroup, RankInfo
from qtorch.model.loop.schedules import (
    SchedulerPlan,
    TrainingLength,
    complete_plan,
    depends_on_length,
    scheduler_plan,
)
from qtorch.model.loop.sharding import gather_weights, is_sharded
from qtorch.model.loop.user_module import UserModuleRescaler
from qtorch.model.recipe import FitResult, Recipe
from qtorch.process.stops import StopRequest
from qtorch.tracking.recorder import MetricRecorder

log = logging.getLogger(__name__)

LIGHTNING_LOGGERS = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric")
SHOWN_LOGGERS = ("pytorch_lightning.callbacks", "pytorch_lightning.profilers")
DDP_STRATEGIES = (None, "auto", "ddp")
FLOAT32 = ("32", "32-true")
IGNORED_WARNINGS = (
    r".*LeafSpec.*is deprecated",
    r".*`validation_step` but have no `val_dataloader`",
    r".*`srun` command is available",  # qtorch starts its rank processes itself
    r".*WeightAveraging callback with a model that overrides the configure_model",
    r".*self\.log\('(train/|valid/|lr).*sync_dist=True",  # already summed over ranks
    # A ScoreModule steps its optimizer itself; of another module the state is the same.
    r".*ModelCheckpoint with manual optimization and every_n_train_steps",
    r".*FSDP2-wrapped module.* returned a view",  # scores are never modified in place
)


class Training:
    """Build the parts of one training and run Lightning over them.

    `rank_info`: which of several ranks this process is; its loaders then return its share of each
    batch. None: the only process. `keeps_folder`: the checkpoint folder outlives the training.
    """

    def __init__(
        self,
        network: nn.Module,
        train: Samples,
        valid: Samples | None,
        recipe: Recipe,
        tuning: FineTuning | None,
        optimizer_state: dict[str, Any] | None,
        rank_info: RankInfo | None = None,
        *,
        keeps_folder: bool = True,
    ) -> None:
        self.keeps_folder = keeps_folder
        self.rank_info = rank_info
        self.ranks = RankGroup() if rank_info is None else RankGroup(rank_info.rank, rank_info.size)
        self.recipe, self.train, self.valid = recipe, train, valid
        self.tuning, self.optimizer_state = tuning, optimizer_state
        self.is_user_module = isinstance(network, pl.LightningModule)
        self.loaders: list[StepLoader] = []
        self.num_parameters = sum(p.numel() for p in network.parameters())
        self.num_weight_bytes = sum(p.nbytes for p in network.parameters())
        self.network = network
        # An unsharded copy that receives the gathered weights at the end.
        shards_network = rank_info is not None and is_sharding(recipe.trainer)
        self.unsharded_network = (
            copy.deepcopy(network) if shards_network and self.ranks.is_first else None
        )

    def prepare(
        self,
        folder: Path | None,
        identity: str,
        interruption: StopRequest,
        recorder: MetricRecorder | None,
    ) -> CheckpointCallback:
        """Build module, loader, checkpoint callback and trainer."""
        recipe, options = self.recipe, self._trainer_options()
        early_stopping, monitor, mode = build_early_stopping(recipe.early_stop, recipe.monitor)
        if not self.is_user_module:
            check_monitor(monitor)
            check_callbacks(recipe.trainer)
        if self.valid is None:
            check_valid_segment(recipe.early_stop, recipe.monitor, ("train",))
        self._check_callbacks_of_validation()
        every_n_steps = recipe.checkpoint.get("every_n_steps")
        if every_n_steps is not None:
            every_n_steps = -(-int(every_n_steps) // options.accumulate) * options.accumulate
        self.loader = self._build_loader(self.train, True, options.limit_train, every_n_steps)
        self.module = self._build_module(interruption)
        self._check_manual_optimization()
        checkpoint_callback = CheckpointCallback(
            self.loader,
            folder=folder,
            identity=identity,
            monitor=monitor,
            mode=mode,
            interruption=interruption,
            every_n_steps=every_n_steps,
            ranks=self.ranks,
        )
        self.checkpoint_callback = checkpoint_callback
        internal_callbacks: list[pl.Callback] = []
        if self.rank_info is not None and self.is_user_module:
            internal_callbacks.append(UserModuleRescaler(self.ranks))
        internal_callbacks += pruning_callbacks(recorder)
        if self.tuning is not None:
            internal_callbacks += self.tuning.callbacks(self.network)
        if early_stopping is not None:
            internal_callbacks.append(early_stopping)
        internal_callbacks.append(checkpoint_callback.progress_callback)
        internal_callbacks.append(checkpoint_callback)  # it sees an epoch's end last
        self.trainer = build_trainer(
            options,
            internal_callbacks=internal_callbacks,
            logger=None if recorder is None else RecorderLogger(recorder, folder),
            root=folder if self.keeps_folder else None,
            loader=self.loader,
            automatic_optimization=self.module.automatic_optimization,
            rank_info=self.rank_info,
        )
        self.graphed_step = GraphedStep(recipe.cuda_graph, self._find_graph_obstacle())
        if isinstance(self.module, ScoreModule):
            self.module.graphed_step = self.graphed_step
            if (epochs := self.trainer.max_epochs or -1) > 0:
                self.trainer.fit_loop.max_epochs = epochs + self.module.pretraining_epochs
        self._check_validation_interval()
        checkpoint_callback.log_epochs = not self.trainer.progress_bar_callback
        resume_by_epochs(self.trainer)
        if self.rank_info is not None:
            skip_sigterm_broadcast(self.trainer)
        return checkpoint_callback

    @property
    def has_validation(self) -> bool:
        """Whether there is something to validate on."""
        return self.valid is not None and self.recipe.trainer.limit_valid != 0

    def _check_callbacks_of_validation(self) -> None:
        """Raise ConfigError for early stopping by a metric that no validation computes."""
        for callback in self.recipe.trainer.callbacks:
            if (
                isinstance(callback, EarlyStopping)
                and callback.strict
                and callback.monitor.startswith("valid/")
                and not self.has_validation
            ):
                raise ConfigError(
                    f"the callback {type(callback).__name__} monitors {callback.monitor!r}, but "
                    "there is no validation: remove it, or add a segment 'valid' (and remove "
                    "limit_val_batches=0)."
                )

    def _check_manual_optimization(self) -> None:
        """Raise ConfigError for arguments that a module with an optimization of its own ignores."""
        if not self.is_user_module or self.module.automatic_optimization:
            return
        options = self.recipe.trainer
        for name, is_set in {
            "accumulate_grad_batches": options.accumulate > 1,
            "gradient_clip_val": options.clip_value is not None,
        }.items():
            if is_set:
                raise ConfigError(
                    f"trainer.{name} has no effect on {type(self.module).__name__}, whose "
                    "automatic_optimization is False: remove it, and do the same in training_step."
                )

    def _check_validation_interval(self) -> None:
        """Raise ConfigError if an epoch ends before its first validation."""
        interval = getattr(self.trainer, "val_check_interval", None)  # Lightning sets no time there
        if (
            isinstance(interval, int)
            and self.trainer.check_val_every_n_epoch is not None
            and interval > self.loader.num_batches
        ):
            raise ConfigError(
                f"trainer.val_check_interval is {interval}, but an epoch has "
                f"{self.loader.num_batches} batches: set a smaller number, or "
                "check_val_every_n_epoch to null, which counts the batches of all epochs."
            )

    def _trainer_options(self) -> TrainerOptions:
        """Return the trainer options.

        If layers are unfrozen later, DDP has to look for parameters without gradients.
        """
        options = self.recipe.trainer
        unfreezes_layers = self.tuning is not None and self.tuning.unfreeze_every is not None
        if (
            self.rank_info is None
            or not unfreezes_layers
            or options.arguments.get("strategy") not in DDP_STRATEGIES
        ):
            return options
        arguments = {**options.arguments, "strategy": "ddp_find_unused_parameters_true"}
        return replace(options, arguments=arguments)

    def _build_module(self, interruption: StopRequest) -> pl.LightningModule:
        if isinstance(self.network, pl.LightningModule):
            return self.network
        recipe, options = self.recipe, self.recipe.trainer
        loss = build_loss(recipe.loss)
        if self.train.weight is not None and not isinstance(loss, BaseLoss):
            raise ConfigError(
                f"a reweighter is set, but the loss {type(loss).__name__} takes no weights: "
                "give it an argument `weight`, or derive it from qtorch.metrics.Loss (single "
                "samples) or qtorch.metrics.DayLoss (whole days)."
            )
        if self.rank_info is not None and isinstance(loss, Combined):
            loss.sum_over_ranks = self.ranks.sum
        if recipe.compile:
            self.network.compile(**(recipe.compile if isinstance(recipe.compile, dict) else {}))
        module_factory = ScoreModule
        if recipe.module is not None:
            module_factory = build_factory(recipe.module, "module")  # type: ignore[assignment]  # checked below
        module = module_factory(
            self.network,
            loss,
            self._build_optimizer_factory(),
            self._build_scheduler_plan(),
            num_days=len(self.train.calendar if self.valid is None else self.valid.calendar),
            accumulate=options.accumulate,
            clip_value=options.clip_value,
            clip_algorithm=options.clip_algorithm,
            complete=self._has_all_labels(loss),
            day_label=build_day_label(recipe.day_label),
            # Several ranks must stop together, which the checkpoint callback ensures.
            is_stop_requested=interruption.is_requested if self.rank_info is None else never_stop,
            ranks=self.ranks,
        )
        if not isinstance(module, ScoreModule):
            raise ConfigError(
                f"the module is a {type(module).__name__}; expected a qtorch.model.ScoreModule. "
                "(Pass a LightningModule with its own training_step as the network.)"
            )
        if self.tuning is not None:
            module.pretraining_epochs = 0  # fitted weights need no pretraining
        module.bind(self.train, self.valid)
        self.train.raw_label = None  # a copy of the caller's samples; the training step only uses y
        return module

    def _has_all_labels(self, loss: Any) -> bool:
        """Whether no training label is missing, so that losses can skip masking.

        A Combined loss that sums over the ranks cannot: every rank has to take part in its sums,
        a rank with a dummy batch too. A `day_label` may drop labels.
        """
        if self.recipe.day_label is not None:
            return False
        if isinstance(loss, Combined) and loss.sum_over_ranks is not None:
            return False
        return self.train.target is not None and not bool(self.train.target.isnan().any())

    def _find_graph_obstacle(self) -> str | None:
        """Return why the training step cannot be a CUDA graph, None if it may be one."""
        recipe, options = self.recipe, self.recipe.trainer
        network, loss = type(self.network), type(getattr(self.module, "loss", None))
        plan = getattr(self.module, "plan", None)
        is_trusted = recipe.cuda_graph is True  # the user knows that nothing depends on the host
        obstacles = {
            "there is no GPU": self.train.device.type != "cuda",
            "several devices share each batch": self.rank_info is not None,
            f"{type(self.module).__name__} has a training step of its own": (
                type(self.module) is not ScoreModule
            ),
            "the network is compiled": bool(recipe.compile),
            "batches of whole days differ in size": recipe.batch["order"].startswith("day"),
            "mixed precision": str(options.arguments.get("precision") or "32-true") not in FLOAT32,
            "accumulate_grad_batches": options.accumulate > 1,
            "callbacks": bool(options.callbacks),
            "fine-tuning": self.tuning is not None,
            "the learning rate changes in each step": (
                plan is not None and plan.interval == "step"
            ),
            f"{network.__name__} is not a network of qtorch": not (
                is_trusted or is_of_qtorch(network)
            ),
            f"{loss.__name__} is not a loss of qtorch": not (is_trusted or is_of_qtorch(loss)),
        }
        return next((text for text, is_met in obstacles.items() if is_met), None)

    def _build_optimizer_factory(self) -> OptimizerFactory:
        factory, state = group_parameters(self.recipe.optimizer, self.network), self.optimizer_state
        factory = explain_errors(factory)
        if not is_sharding(self.recipe.trainer):
            factory = fuse_on_gpu(factory)
        if self.tuning is not None:
            has_groups = isinstance(self.recipe.optimizer, Mapping) and (
                "groups" in self.recipe.optimizer
            )
            if has_groups and self.tuning.layer_decay != 1:
                raise ConfigError("layer_decay sets the rates itself: remove optimizer.groups.")
            factory = self.tuning.scale_layer_rates(factory, self.network)
        return factory if state is None else partial(_restore_optimizer, factory, state)

    def _build_scheduler_plan(self) -> SchedulerPlan | None:
        options = self.recipe.trainer
        length = TrainingLength(
            steps_per_epoch=-(-self.loader.num_batches // options.accumulate),
            max_epochs=options.max_epochs,
            max_steps=int(options.arguments.get("max_steps", -1)),
        )
        return complete_plan(scheduler_plan(self.recipe.scheduler), length)

    def _build_loader(
        self, samples: Samples, training: bool, limit: int | float | None, cut_every: int | None
    ) -> StepLoader:
        batch, options = self.recipe.batch, self.recipe.trainer
        loader_arguments: dict[str, Any] = {"seed": self.recipe.seed}
        if training:
            loader_arguments |= training_arguments(batch, self._min_tail())
        else:
            loader_arguments |= validation_arguments(
                batch, samples, getattr(self.module, "loss", None)
            )
        if self.rank_info is None:
            source = BatchLoader(samples, **loader_arguments)
        else:
            source, limit = self._build_sharded_source(samples, training, limit, loader_arguments)
        num_batches = limit_batches(
            count_batches(source, drops_last=training and batch["drop_last"]), limit
        )
        if num_batches == 0 and training:
            raise ConfigError(
                f"limit_train_batches={limit} leaves none of the {len(source)} batches."
            )
        loader = StepLoader(
            source,
            lambda: self.trainer.current_epoch,
            inner_steps=resolve_inner_steps(
                self.recipe.inner_steps, options, num_batches, num_ranks=self.ranks.size
            ),
            limit=num_batches,
            cut_every=cut_every,
            yield_batches=self.is_user_module,
            same_batches=options.overfits_batches,
        )
        self.loaders.append(loader)
        return loader

    def _min_tail(self) -> int:
        """Return the least number of samples that the last batch of an epoch needs."""
        if self.recipe.batch["drop_last"] or (self.is_user_module and self.ranks.size > 1):
            return 1
        return 2 * self.ranks.size if has_batch_norms(self.network) else 1

    def _build_sharded_source(
        self,
        samples: Samples,
        training: bool,
        limit: int | float | None,
        loader_arguments: dict[str, Any],
    ) -> tuple[BatchLoader, int | float | None]:
        """Return this rank's share of the batches, and the limit that still has to be applied."""
        rank_arguments = {
            "rank": self.ranks.rank,
            "world_size": self.ranks.size,
            **loader_arguments,
        }
        if training:
            return ShardedLoader(samples, trim=self.is_user_module, **rank_arguments), limit
        num_batches = limit_batches(len(BatchLoader(samples, **loader_arguments)), limit)
        return BlockLoader(
            samples, limit=num_batches, allow_dummies=not self.is_user_module, **rank_arguments
        ), None

    def run(self, checkpoint: tuple[Path, dict[str, Any]] | None) -> None:
        """Train from the given checkpoint, or from the first step if it is None."""
        path = None if checkpoint is None else checkpoint[0]
        if checkpoint is not None:
            log.info("resuming from %s", path)
            self.checkpoint_callback.resumed_from = path
            self.loader.set_boundaries(
                checkpoint[1][CALLBACK_STATE_KEY]["inner_steps"],
                checkpoint[1][CALLBACK_STATE_KEY]["cut_every"],
            )
        valid_loader, limit = None, self.recipe.trainer.limit_valid
        if self.valid is not None and limit != 0:
            valid_loader = self._build_loader(self.valid, False, limit, None)
            if len(valid_loader) == 0:
                raise ConfigError(f"limit_val_batches={limit} leaves no batch for validation.")
        self.trainer.fit(
            self.module,
            self.loader,
            valid_loader,
            ckpt_path=None if path is None else str(path),
            weights_only=None if path is None else True,
        )
        # If no epoch was left to train, nothing has sent the metrics of the checkpoint yet.
        self.checkpoint_callback.resend_metrics(self.trainer)

    @property
    def num_batches(self) -> int:
        """The number of training batches of an epoch."""
        return self.loader.num_batches

    @property
    def has_best_weights(self) -> bool:
        """Whether there was a validation, whose weights `result` returns."""
        return any(m.best_weights is not None for m in self.checkpoint_callback.members)

    def result(self, checkpoint: tuple[Path, dict[str, Any]] | None) -> FitResult:
        """Return the result after training, with the best weights loaded into the network."""
        self.checkpoint_callback.update_seconds()
        (member,) = self.checkpoint_callback.members
        network, weights = get_network(self.module), member.best_weights
        if is_sharded(network):
            weights = gather_weights(network) if weights is None else weights
            network = self.network if self.unsharded_network is None else self.unsharded_network
        if weights:
            network.load_state_dict(weights)
        self._warn_without_best(member)
        network.cpu()
        if self.tuning is not None:
            network = self.tuning.finalize_network(network)
        if self.recipe.compile:
            network._compiled_call_impl = None  # a compiled call cannot be saved
        report = self._build_report(member, None if checkpoint is None else checkpoint[0])
        names = self.checkpoint_callback.validation_names
        optimizer_state = move_tensors(member.best_optimizer, "cpu")
        return FitResult(network, member.history, report, optimizer_state, names)

    def release_memory(self) -> None:
        """Drop samples, module and optimizer states, so that the device's memory is free again.

        Lightning's objects refer to each other. Without this, what they hold stays in memory until
        the garbage collector runs. A LightningModule of the user's keeps its trainer.
        """
        for loader in self.loaders:
            loader.release_samples()
        self.graphed_step.release()
        if not self.is_user_module:
            detach_module(self.trainer, self.module)
            self.module.__dict__.pop("weight_update", None)
        self.checkpoint_callback.members = []
        self.__dict__.clear()

    def _warn_without_best(self, member: FitProgress) -> None:
        """Warn if a metric was expected to choose the weights, but had no finite value."""
        if member.best_weights is not None or not member.history:
            return
        monitor = self.checkpoint_callback.monitor
        values = [point[monitor] for point in member.history if monitor in point]
        if values:
            problem = "was NaN each time" if all(map(math.isnan, values)) else "was never finite"
        elif self.has_validation or self.recipe.early_stop is not None:
            problem = "was never computed (no validation took place)"
        else:
            return  # the user wants the last weights
        log.warning("%s %s: the weights are the last ones, not the best ones.", monitor, problem)

    def _describe_memory(self) -> dict[str, int]:
        """Return bytes: of the features, of the weights, and the peak of the device."""
        memory = {"features": self.train.num_feature_bytes, "weights": self.num_weight_bytes}
        if self.train.device.type == "cuda":
            memory["peak"] = torch.cuda.max_memory_allocated(self.train.device)
        return memory

    def _build_report(self, member: FitProgress, resumed_from: Path | None) -> dict[str, Any]:
        callback = self.checkpoint_callback
        seconds = callback.train_seconds
        report: dict[str, Any] = {
            "epochs": member.epochs,
            "best_epoch": member.best_epoch,
            "best_step": member.best_step,
            "monitor": callback.monitor,
            "best_value": member.best_value,
            "seconds": callback.seconds,
            "train_seconds": seconds,
            "samples": len(self.train),
            "valid_samples": 0 if self.valid is None else len(self.valid),
            "samples_per_second": callback.num_train_samples / seconds if seconds else 0.0,
            "parameters": self.num_parameters,
            "device": str(self.train.device),
            "devices": self.ranks.size,
            "store": self.train.store,
            "feature_dtype": str(self.train.feature_dtype).removeprefix("torch."),
            "memory": self._describe_memory(),
            **describe_numerics(self.train.device),
            "inner_steps": self.loader.inner_steps,
            "cuda_graph": self.graphed_step.description,
            "seed": self.recipe.seed,
            "resumed_from": None if resumed_from is None else str(resumed_from),
        }
        if self.tuning is not None:
            report["tuning"] = self.tuning.description
        return report


def is_of_qtorch(kind: type) -> bool:
    """Whether a class is one of this package, not a user's own."""
    return kind.__module__.startswith("qtorch.")


def _restore_optimizer(factory: OptimizerFactory, state: dict[str, Any], parameters: Any) -> Any:
    """Build an optimizer with the moments of another one and its own learning rates."""
    optimizer = factory(parameters)
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if count != sum(len(group["params"]) for group in state["param_groups"]):
        raise ConfigError("keep_optimizer: the optimizer's state belongs to other parameters.")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state["state"]})
    return optimizer


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Context manager that silences Lightning's log lines and warnings that do not concern users.

    These are its greetings (devices, why it stopped) and warnings about what is intended here, such
    as a dataset without a valid segment.
    """
    quiet_loggers = [logging.getLogger(n) for n in LIGHTNING_LOGGERS]
    # What the user has asked for: model summaries, verbose callbacks, reports of profilers.
    shown_loggers = [logging.getLogger(n) for n in SHOWN_LOGGERS]
    loggers = [*quiet_loggers, *shown_loggers]
    levels = [logger.level for logger in loggers]
    for logger in quiet_loggers:
        _set_level(logger, max(logging.WARNING, logger.level))
    for logger in shown_loggers:
        _set_level(logger, logging.INFO)
    try:
        with warnings.catch_warnings():
            for pattern in IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", message=pattern)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            _set_level(logger, level)


def _set_level(logger: logging.Logger, level: int) -> None:
    if logger.level != level:  # a change clears the caches of all loggers
        logger.setLevel(level)


def training_identity(
    network: nn.Module, train: Samples, valid: Samples | None, recipe: Recipe, start: str
) -> str:
    """Return a hash of what defines a training: network, data, batches, optimizer, seed, start.

    It does not depend on how progress is displayed, nor on how long the training runs, unless the
    learning rates do.
    """
    options = recipe.trainer
    is_spread = depends_on_length(scheduler_plan(recipe.scheduler))
    parts = {
        "network": [[k, list(v.shape)] for k, v in network.state_dict().items()],
        "class": type(network).__qualname__,
        "data": [None if s is None else data_identity(s) for s in (train, valid)],
        "batch": {
            k: v
            for k, v in recipe.batch.items()
            if k != "eval_size" and (k, v) != ("drop_last", False)
        },
        "rules": [_describe_spec(s) for s in (recipe.loss, recipe.optimizer, recipe.scheduler)],
        "clip": [options.clip_value, options.clip_algorithm, options.accumulate],
        "limit": ["same", options.limit_train] if options.overfits_batches else options.limit_train,
        "precision": str(options.arguments.get("precision")),
        "seed": recipe.seed,
        "start": start,
        **({"length": options.limits} if is_spread else {}),
        **{
            name: _describe_spec(value)
            for name, value in (
                ("module", recipe.module),
                ("day_label", recipe.day_label),
                ("matmul_precision", recipe.matmul_precision),
            )
            if value is not None
        },
    }
    return digest(parts)


def data_identity(samples: Samples) -> list[Any]:
    """Return a short description of samples that is unlikely to be shared by other samples."""
    description = samples.describe()
    sums = [
        None if t is None else float(torch.nan_to_num(t).double().sum())
        for t in (samples.date, samples.instrument, samples.target, samples.weight)
    ]
    names = hashlib.sha256(repr(samples.feature_names).encode()).hexdigest()
    segment = [description[key] for key in ("samples", "start", "end")]
    return [*segment, samples.step_len, names, *sums]


def _describe_spec(spec: Any) -> Any:
    try:
        return plain_value(spec)
    except ConfigError:
        return type(spec).__qualname__
