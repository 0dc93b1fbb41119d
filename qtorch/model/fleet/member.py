"""One member of a fleet: a training whose arithmetic is done together with that of others."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from qtorch.core.errors import ConfigError, DataError
from qtorch.core.identity import canonical_json
from qtorch.core.runtime import seed_everything
from qtorch.data.dataset.batches import BatchLoader
from qtorch.data.dataset.samples import Samples
from qtorch.metrics.loss import BaseLoss, FunctionLoss
from qtorch.model.fleet.optimizers import STACKED, STEPS
from qtorch.model.fleet.stack import Layout
from qtorch.model.loop.checkpoint import preserve_generators
from qtorch.model.loop.day_label import DayLabel, build_day_label
from qtorch.model.loop.factories import build_loss, explain_errors, group_parameters
from qtorch.model.loop.loader import (
    count_batches,
    has_batch_norms,
    training_arguments,
    validation_arguments,
)
from qtorch.model.loop.options import build_early_stopping
from qtorch.model.loop.progress import (
    TRAIN_LOSS,
    FitProgress,
)
from qtorch.model.loop.schedules import (
    SchedulerPlan,
    TrainingLength,
    check_scheduler,
    complete_plan,
    scheduler_plan,
)
from qtorch.model.loop.training import training_identity
from qtorch.model.recipe import FitInputs, Recipe
from qtorch.tracking.recorder import TrainingRecorder

log = logging.getLogger(__name__)

# Arguments of pl.Trainer that a fleet understands, or that do not change the numbers of a member.
TRAINER_ARGUMENTS = (
    "accelerator",
    "deterministic",
    "devices",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "log_every_n_steps",
    "max_epochs",
    "num_sanity_val_steps",
    "precision",
)
PRECISIONS = (None, 32, "32", "32-true", "bf16-mixed")


def find_refusal(inputs: FitInputs, network: nn.Module) -> str | None:
    """Say why a training cannot be a member of any fleet; None if it can."""
    recipe, options = inputs.recipe, inputs.recipe.trainer
    settings = {
        "a LightningModule with its own training loop": hasattr(network, "training_step"),
        "model.module (a training step of its own)": recipe.module is not None,
        "model.compile": bool(recipe.compile),
        "model.cuda_graph=true": recipe.cuda_graph is True,
        "model.callbacks": bool(options.callbacks),
        "checkpoint.every_n_steps": recipe.checkpoint.get("every_n_steps") is not None,
        "several devices": options.num_devices > 1,
    }
    reasons = [name for name, is_set in settings.items() if is_set]
    reasons += [
        f"trainer.{name}"
        for name, value in options.user_arguments.items()
        if name not in TRAINER_ARGUMENTS and value not in (None, (), [], {})
    ]
    if options.arguments.get("precision") not in PRECISIONS:
        reasons.append(f"trainer.precision={options.arguments['precision']}")
    if options.max_epochs == -1:
        reasons.append("a training without a largest number of epochs")
    if not isinstance(build_loss(recipe.loss), BaseLoss) and inputs.train.weight is not None:
        reasons.append("a reweighter with a loss that takes no weights")
    if not reasons:
        template = _build_template(recipe, network)
        stacked = STACKED.get(type(template))
        reason = (
            f"the optimizer {type(template).__name__}"
            if stacked is None
            else stacked.refusal(template)
        )
        reasons = [] if reason is None else [reason]
    return ", ".join(reasons) or None


def _build_template(recipe: Recipe, network: nn.Module) -> Optimizer:
    """Build torch's optimizer of one member; it only holds the hyperparameters."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer: Optimizer = explain_errors(group_parameters(recipe.optimizer, network))(parameters)
    return optimizer


def _architecture_key(
    inputs: FitInputs, network: nn.Module, template: Optimizer
) -> tuple[Any, ...]:
    recipe, options = inputs.recipe, inputs.recipe.trainer
    return (
        repr(network),
        type(network),
        tuple((n, tuple(p.shape), p.requires_grad) for n, p in network.named_parameters()),
        tuple((n, tuple(b.shape), b.dtype) for n, b in network.named_buffers()),
        tuple(sorted(_plain_attributes(network).items(), key=str)),
        _loss_key(recipe.loss),
        tuple(sorted((k, str(v)) for k, v in recipe.batch.items())),
        str(options.arguments.get("precision")),
        str(options.arguments.get("deterministic")),
        options.clip_algorithm,
        recipe.matmul_precision,
        str(inputs.device),
        STACKED[type(template)].signature(template),
        *(_sample_key(samples) for samples in (inputs.train, inputs.valid)),
    )


def _loss_key(spec: Any) -> Any:
    """Return what the losses of all members must have in common: all but their numbers.

    A loss that reads the score from several outputs, or that is a user's own function or module,
    must be equal: the same configuration or the same object.
    """
    loss = build_loss(spec)
    if isinstance(loss, BaseLoss) and type(loss).readout is BaseLoss.readout:
        kinds = tuple(type(part) for part in loss.modules())
        if FunctionLoss not in kinds:
            return kinds
    try:
        return canonical_json(spec)
    except ConfigError:  # it contains an object
        return id(spec)


def _plain_attributes(network: nn.Module) -> dict[str, Any]:
    """Return the numbers and texts that the modules of a network hold beside their weights."""
    return {
        f"{name}.{key}": value
        for name, module in network.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_") and isinstance(value, bool | int | float | str)
    }


def _sample_key(samples: Samples | None) -> Any:
    """Return what the samples of all members of a fleet must have in common."""
    if samples is None:
        return None
    return (
        samples.num_steps,
        samples.num_features,
        len(samples.label_names),
        samples.weight is not None,
        samples.target is not None and not bool(samples.target.isnan().any()),
        tuple(sorted((name, each.width) for name, each in samples.extras.items())),
    )


class MemberStopping:
    """Early stopping of one member, by the rules of Lightning's EarlyStopping."""

    def __init__(self, spec: Any, monitor: str) -> None:
        callback, self.monitor, self.mode = build_early_stopping(spec, monitor)
        self.patience = None if callback is None else callback.patience
        self.min_delta = 0.0 if callback is None else abs(callback.min_delta)
        self.wait_count = 0
        self.best = math.inf if self.mode == "min" else -math.inf

    def should_stop(self, values: Mapping[str, float]) -> bool:
        """Take the metrics of an epoch; return whether the member ends with it."""
        if self.patience is None or self.monitor not in values:
            return False
        value = float(torch.tensor(values[self.monitor]))  # Lightning compares float32 numbers
        gain = self.best - value if self.mode == "min" else value - self.best
        if gain > self.min_delta:
            self.best, self.wait_count = value, 0
            return False
        self.wait_count += 1
        return self.is_exhausted

    @property
    def is_exhausted(self) -> bool:
        """Whether the last epochs, more than the patience allows, were no improvement."""
        return self.patience is not None and 0 < self.wait_count >= self.patience


@dataclass
class Member:
    """One training of a fleet: its inputs, its progress, and what happens on the host for it.

    `number` is that of its job, `key` what the members of its fleet have in common, `folder` where
    its checkpoints are (None: it has none). `network` has the initial weights, and in
    the end the best ones. `train` and `valid` are the samples on the device.
    """

    number: int
    inputs: FitInputs
    network: nn.Module
    template: Optimizer
    train: Samples
    valid: Samples | None
    identity: str
    key: tuple[Any, ...]
    recorder: TrainingRecorder | None = None
    folder: Path | None = None
    progress: FitProgress = field(default_factory=FitProgress)
    error: Exception | None = None
    is_finished: bool = False
    seconds: float = 0.0
    num_samples: int = 0
    resumed_from: str | None = None

    def __post_init__(self) -> None:
        recipe, options = self.inputs.recipe, self.inputs.recipe.trainer
        self.loss = build_loss(recipe.loss)
        self.day_label: DayLabel | None = build_day_label(recipe.day_label)
        self.stopping = MemberStopping(recipe.early_stop, recipe.monitor)
        min_tail = 2 if has_batch_norms(self.network) and not recipe.batch["drop_last"] else 1
        arguments = training_arguments(recipe.batch, min_tail)
        self.loader = BatchLoader(self.train, seed=recipe.seed, **arguments)
        self.num_batches = count_batches(self.loader, drops_last=recipe.batch["drop_last"])
        self.valid_loader: BatchLoader | None = None
        if self.valid is not None:
            arguments = validation_arguments(recipe.batch, self.valid, self.loss)
            self.valid_loader = BatchLoader(self.valid, seed=recipe.seed, **arguments)
        length = TrainingLength(self.num_batches, options.max_epochs, -1)
        self.plan: SchedulerPlan | None = complete_plan(scheduler_plan(recipe.scheduler), length)
        self.scheduler: Any = None
        if self.plan is not None:
            self.scheduler = self.plan.factory(self.template)
            check_scheduler(self.scheduler, self.plan, has_validation=self.valid is not None)
        self.num_steps = 0  # optimizer steps
        self.is_finished = self.is_at_end  # of no epoch

    @staticmethod
    def build_network(inputs: FitInputs) -> nn.Module:
        """Build the network of a training from its seed."""
        with preserve_generators():
            seed_everything(inputs.recipe.seed)
            return inputs.make_network().train()

    @classmethod
    def create(
        cls,
        number: int,
        inputs: FitInputs,
        network: nn.Module,
    ) -> Member:
        """Make a member of a training and its network with initial weights."""
        train, valid = inputs.train, inputs.valid
        identity = training_identity(network, train, valid, inputs.recipe, inputs.start)
        template = _build_template(inputs.recipe, network)
        key = _architecture_key(inputs, network, template)
        return cls(number, inputs, network, template, train, valid, identity, key)

    @property
    def epoch(self) -> int:
        """The number of the running epoch."""
        return self.progress.epochs

    @property
    def loss_text(self) -> str:
        """A text that is equal for members with equal losses."""
        return repr(self.inputs.recipe.loss)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first parameter group."""
        return float(self.template.param_groups[0]["lr"])

    @property
    def needs_step_schedule(self) -> bool:
        """Whether the learning rate may change with each optimizer step."""
        return self.plan is not None and self.plan.interval == "step"

    def count_step(self) -> None:
        """Count an optimizer step, and step a scheduler with the interval "step"."""
        self.num_steps += 1
        if self.needs_step_schedule:
            self._step_scheduler(self.num_steps, {})

    def finish_epoch(self, values: dict[str, float]) -> bool:
        """Take the metrics of an epoch; return whether its weights are the best so far.

        Sets `is_finished` for the last epoch, and `error` for a loss that is not finite before
        there are best weights.
        """
        progress, epoch = self.progress, self.epoch
        progress.epochs += 1
        progress.add_point(values, epoch)
        value = values.get(self.stopping.monitor, math.nan)
        is_best = progress.is_improvement(value, self.stopping.mode)
        if is_best:
            progress.best_epoch, progress.best_value = epoch, value
            progress.best_step = self.num_steps
        if self.recorder is not None:
            self.recorder.log_batch(dict(values), step=epoch)
        self._check_loss(values[TRAIN_LOSS], epoch, has_best=progress.best_epoch is not None)
        self.is_finished = self.is_finished or self.stopping.should_stop(values) or self.is_at_end
        if self.plan is not None and self.plan.interval == "epoch":
            self._step_scheduler(self.epoch, values)
        return is_best

    @property
    def max_epochs(self) -> int:
        """The largest number of epochs."""
        return self.inputs.recipe.trainer.max_epochs

    @property
    def is_at_end(self) -> bool:
        """Whether the member has trained its largest number of epochs."""
        return self.epoch >= self.max_epochs

    def _check_loss(self, loss: float, epoch: int, *, has_best: bool) -> None:
        if math.isfinite(loss):
            return
        self.is_finished = True
        problem = f"training loss of epoch {epoch} is {loss}"
        if has_best:
            log.warning(
                "member %d: %s: stopping early; using the best weights, of epoch %d.",
                self.number,
                problem,
                self.progress.best_epoch,
            )
            self.progress.is_stopped = True
            return
        self.error = DataError(
            f"{problem}. Check for NaN features (add a Fillna processor) and for very large ones "
            "(normalize them), or lower the learning rate or set gradient_clip_val."
        )

    def _step_scheduler(self, count: int, values: Mapping[str, float]) -> None:
        plan, scheduler = self.plan, self.scheduler
        if plan is None or scheduler is None or count % plan.frequency:
            return
        self.template.step()  # without gradients it changes nothing; schedulers ask for it
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
            return
        if plan.metric in values:
            scheduler.step(values[plan.metric])

    # -- state and result ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of this member beside its rows of the stack."""
        return {
            "identity": self.identity,
            "progress": self.progress.state_dict(),
            "wait_count": self.stopping.wait_count,
            "stopping_best": self.stopping.best,
            "num_steps": self.num_steps,
            "seconds": self.seconds,
            "num_samples": self.num_samples,
            "is_finished": self.is_finished,
            "error": None if self.error is None else str(self.error),
            "groups": [_group_values(group) for group in self.template.param_groups],
            "scheduler": None if self.scheduler is None else _scheduler_state(self.scheduler),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`.

        An ended member goes on if there are more epochs now, or more patience, as a fit by itself.
        """
        (self.progress,) = FitProgress.from_states([state["progress"]])
        self.stopping.wait_count = state["wait_count"]
        self.stopping.best = state["stopping_best"]
        self.num_steps, self.seconds = state["num_steps"], state["seconds"]
        self.num_samples = state["num_samples"]
        self.error = None if state["error"] is None else DataError(state["error"])
        has_failed = self.error is not None or self.progress.is_stopped
        self.is_finished = has_failed or self.stopping.is_exhausted or self.is_at_end
        for group, values in zip(self.template.param_groups, state["groups"], strict=True):
            group.update(values)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])

    def optimizer_state(self, moments: Mapping[str, Tensor], layout: Layout) -> dict[str, Any]:
        """Return moments `[P]` as the state of torch's optimizer of the same name."""
        number = {
            id(p): k
            for k, p in enumerate(p for g in self.template.param_groups for p in g["params"])
        }
        parameters = dict(self.network.named_parameters())
        state: dict[int, dict[str, Any]] = {}
        steps = moments[STEPS].reshape(()).float().cpu()
        vectors = {name: m.cpu() for name, m in moments.items() if name != STEPS}
        for name, places in layout.columns().items():
            shape = parameters[name].shape
            entry: dict[str, Any] = {"step": steps.clone()}
            for key, vector in vectors.items():
                entry[key] = vector[places].reshape(shape).clone()
            state[number[id(parameters[name])]] = entry
        return {"state": state, "param_groups": self.template.state_dict()["param_groups"]}


def _group_values(group: Mapping[str, Any]) -> dict[str, Any]:
    values = (bool, int, float, str, tuple, type(None))
    return {k: v for k, v in group.items() if k != "params" and isinstance(v, values)}


def _scheduler_state(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's state as plain values."""
    return copy.deepcopy({k: v for k, v in scheduler.state_dict().items() if not callable(v)})
