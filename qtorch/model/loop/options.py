"""The `trainer` mapping: arguments of pl.Trainer, and those that the module implements itself."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    ProgressBar,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from pytorch_lightning.profilers import Profiler
from pytorch_lightning.strategies import (
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from pytorch_lightning.utilities.model_helpers import is_overridden

from qtorch.core.errors import (
    ArgumentError,
    ConfigError,
    check_count,
    check_name,
    unknown_name_message,
)
from qtorch.core.identity import digest
from qtorch.core.instantiate import init_instance_by_config, resolve_config
from qtorch.core.runtime import is_notebook, resolve_device
from qtorch.core.trust import StoredText
from qtorch.data.dataset.samples import require_segment
from qtorch.model.loop.callbacks import BatchProgressBar, NotebookProgressBar
from qtorch.model.loop.checkpoint import (
    CALLBACK_STATE_KEY,
    ENDED_EARLY,
    MAX_STEPS,
    MAX_TIME,
    TIMER,
    AtomicCheckpointIO,
    is_whole_epoch,
    validates_within_epochs,
)
from qtorch.model.loop.factories import component_list
from qtorch.model.loop.loader import StepLoader
from qtorch.model.loop.loggers import RecorderLogger, build_loggers
from qtorch.model.loop.module import ScoreModule
from qtorch.model.loop.progress import METRICS, MONITOR_NAMES, find_metric, get_mode
from qtorch.model.loop.rank_group import RankEnvironment, RankInfo
from qtorch.process.heartbeat import has_listeners

DEFAULT_MAX_EPOCHS = 100
DEFAULT_INNER_STEPS = 64
FREQUENT_INNER_STEPS = 16  # for a progress bar, or ranks that agree on a stop between steps
ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
FORKING_STRATEGIES = ("spawn", "fork", "notebook")
UNSUPPORTED_STRATEGIES = (*FORKING_STRATEGIES, "fsdp", "xla", "tpu")  # parts of their names
# A callback with these hooks sees each batch only if a training step has a single batch.
BATCH_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_backward",
    "on_after_backward",
    "on_before_zero_grad",
)

# Callbacks that cannot work, with the reason and what to do instead.
REJECTED_CALLBACKS: dict[type, str] = {
    StochasticWeightAveraging: "uses averaged weights at the end that no validation has seen: use "
    "pytorch_lightning.callbacks.EMAWeightAveraging or qtorch.model.EpochAveraging, whose averages "
    "are validated.",
    ModelPruning: "replaces the parameters by others, so that the best weights cannot be restored: "
    "prune network_ after the fit.",
    BatchSizeFinder: "cannot change the batches of a running fit: set batch.size, or search for it "
    "in a sweep.",
    LearningRateFinder: "trains inside of the fit that it belongs to: search for the learning rate "
    "in a sweep.",
}
REJECTED_FOR_SCORE_MODULES: dict[type, str] = {
    GradientAccumulationScheduler: "needs a LightningModule of your own: set "
    "trainer.accumulate_grad_batches.",
    BackboneFinetuning: "needs a LightningModule with a `backbone`: use "
    "finetune(unfreeze_every=...).",
}

# Arguments that are a number of batches, as an integer, or a part of all batches; and whether that
# may be none of them.
BATCH_COUNTS = {
    "limit_train_batches": False,
    "limit_val_batches": True,
    "overfit_batches": True,  # 0: off
    "val_check_interval": False,
}
FAST_RUN = "fast_dev_run"
# for wrong arguments; torch raises RuntimeError for a `benchmark` that is no bool
LIGHTNING_ERRORS = (MisconfigurationException, ValueError, TypeError, RuntimeError)

NUMBER_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("max_epochs", "max_steps"), (int,)),
    **dict.fromkeys(("accumulate_grad_batches", "check_val_every_n_epoch"), (int,)),
    **dict.fromkeys(("limit_train_batches", "limit_val_batches", "overfit_batches"), (int, float)),
    "gradient_clip_val": (int, float),
}
# Counts that Lightning does not check, with the smallest that it can use (-1: all or no limit).
COUNTS = {"min_epochs": 0, "min_steps": 0, "log_every_n_steps": 0, "num_sanity_val_steps": -1}
# Lightning takes any text for true, also "no".
SWITCHES = (
    "barebones",
    "benchmark",
    "detect_anomaly",
    "enable_autolog_hparams",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "inference_mode",
    "sync_batchnorm",
    "use_distributed_sampler",
)


@dataclass(frozen=True)
class FitLength:
    """Limits of a fit that can end it inside an epoch; -1 and None are no limit."""

    max_steps: int = -1
    max_seconds: float | None = None

    def exceeds(self, checkpoint: dict[str, Any]) -> bool:
        """Whether a fit goes on after a checkpoint in which one of these limits ended it."""
        if self.max_steps != -1 and self.max_steps <= int(checkpoint["global_step"]):
            return False
        reason = checkpoint[CALLBACK_STATE_KEY][ENDED_EARLY]
        if reason != MAX_TIME or self.max_seconds is None:
            return reason in (MAX_STEPS, MAX_TIME)
        timer = checkpoint["callbacks"].get(TIMER)  # None: a class of the user's
        return timer is not None and self.max_seconds > float(timer["time_elapsed"]["train"])


@dataclass(frozen=True)
class TrainerOptions:
    """Validated trainer options.

    `user_arguments` are the user's arguments; `arguments` are passed to pl.Trainer; the other
    fields go to the module and the loaders.
    """

    user_arguments: dict[str, Any]
    arguments: dict[str, Any]
    accumulate: int = 1
    clip_value: float | None = None
    clip_algorithm: str | None = None
    limit_train: int | float | None = None
    limit_valid: int | float | None = None
    overfits_batches: bool = False
    callbacks: list[Callback] = field(default_factory=list)

    @property
    def num_local(self) -> int:
        """The number of devices on one node."""
        devices = parse_devices(self.arguments)
        return devices if isinstance(devices, int) else len(devices)

    @property
    def num_devices(self) -> int:
        """The number of devices on all nodes."""
        return self.num_local * int(self.arguments.get("num_nodes", 1))

    @property
    def counts_batches(self) -> bool:
        """Whether one of the arguments counts single training batches."""
        interval = self.arguments.get("val_check_interval")
        return interval is not None and not is_whole_epoch(interval)

    @property
    def max_epochs(self) -> int:
        """The largest number of epochs, -1 without a limit."""
        arguments = self.arguments
        if arguments.get(FAST_RUN):
            return 1
        if arguments.get("max_epochs") is not None:
            return int(arguments["max_epochs"])
        return DEFAULT_MAX_EPOCHS if arguments.get("max_steps", -1) == -1 else -1

    @property
    def limits(self) -> dict[str, int]:
        """The largest numbers of epochs and steps, by the names of their arguments."""
        return {"max_epochs": self.max_epochs, "max_steps": self.length.max_steps}

    @property
    def has_progress_bar(self) -> bool:
        """Whether one of the user's callbacks is a progress bar."""
        return any(isinstance(c, ProgressBar) for c in self.callbacks)

    @property
    def shows_progress_bar(self) -> bool:
        """Whether there is a progress bar: of the user, or by default in a terminal or notebook."""
        is_enabled = self.arguments.get("enable_progress_bar")
        if is_enabled is None:
            return sys.stderr.isatty() or is_notebook() or self.has_progress_bar
        return bool(is_enabled)

    @property
    def length(self) -> FitLength:
        """The limits of steps and time, of the arguments and of the timers among the callbacks."""
        timers = [c for c in self.callbacks if isinstance(c, Timer)]
        if self.arguments.get("max_time") is not None:
            try:
                timers.append(Timer(self.arguments["max_time"]))
            except LIGHTNING_ERRORS as error:
                raise _rejection(error) from error
        seconds = [s for s in (timer.time_remaining() for timer in timers) if s is not None]
        max_steps = self.arguments.get("max_steps")
        return FitLength(-1 if max_steps is None else int(max_steps), min(seconds, default=None))

    def build_strategy(self) -> Any:
        """Return the user's strategy: a name, an object, or None. A configured one is built."""
        strategy = self.arguments.get("strategy")
        return init_instance_by_config(strategy) if isinstance(strategy, Mapping) else strategy


def trainer_options(user_arguments: Mapping[str, Any] | None, callbacks: Any) -> TrainerOptions:
    """Validate trainer arguments; an unknown one raises ArgumentError with the nearest name.

    `callbacks` and the argument of that name are a list, or a mapping of names to callbacks.
    """
    user_arguments = dict(resolve_config(user_arguments) or {})
    valid = list(inspect.signature(pl.Trainer.__init__).parameters)[1:]
    for name in user_arguments:
        check_name("argument of the trainer", name, valid, limit=60, error=ArgumentError)
    arguments = dict(user_arguments)
    if isinstance(arguments.get("default_root_dir"), StoredText):
        del arguments["default_root_dir"]  # a stranger must not choose where files are written
    _check_devices(user_arguments)
    _check_switches(user_arguments)
    _check_objects(arguments)
    _check_numbers(user_arguments)
    _check_batch_counts(user_arguments)
    clip = arguments.pop("gradient_clip_val", None)
    callback_specs = component_list(arguments.pop("callbacks", None)) + component_list(callbacks)
    all_callbacks = [_build_callback(spec) for spec in callback_specs]
    reject_callbacks(all_callbacks, REJECTED_CALLBACKS)
    overfit_batches = arguments.pop("overfit_batches", None) or 0
    limits = _batch_limits(arguments, overfit_batches)
    return TrainerOptions(
        user_arguments=user_arguments,
        arguments=arguments,
        accumulate=int(arguments.pop("accumulate_grad_batches", None) or 1),
        clip_value=None if clip is None else float(clip),
        clip_algorithm=arguments.pop("gradient_clip_algorithm", None),
        limit_train=limits[0],
        limit_valid=limits[1],
        overfits_batches=overfit_batches > 0,
        callbacks=all_callbacks,
    )


def _build_callback(spec: Any) -> Any:
    try:
        return init_instance_by_config(spec, accept_types=Callback)
    except (MisconfigurationException, TypeError) as error:
        name = spec.get("_target_", spec.get("class")) if isinstance(spec, Mapping) else spec
        raise ConfigError(f"the callback {name} cannot be built: {error}") from error


def _batch_limits(
    arguments: dict[str, Any], overfit_batches: int | float
) -> tuple[int | float | None, int | float | None]:
    """Take the limits of training and validation batches out of the arguments.

    The loaders apply them, so that an epoch ends where the last batch is, also for Lightning's
    `overfit_batches` (the same batches in every epoch) and `fast_dev_run`.
    """
    limits = arguments.pop("limit_train_batches", None), arguments.pop("limit_val_batches", None)
    if overfit_batches > 0:
        limits = overfit_batches, overfit_batches
    if arguments.get(FAST_RUN):
        count = int(arguments[FAST_RUN])  # True is one batch
        limits = count, count
    return limits


def _check_devices(arguments: Mapping[str, Any]) -> None:
    num_nodes = arguments.get("num_nodes", 1)
    _check_strategy(arguments.get("strategy"))
    if isinstance(num_nodes, bool) or not isinstance(num_nodes, int) or num_nodes < 1:
        raise ConfigError(f"trainer.num_nodes is {num_nodes!r}; expected an integer of at least 1.")
    parse_devices(arguments)
    accelerator = arguments.get("accelerator")
    if isinstance(accelerator, str) and accelerator not in ACCELERATORS:
        reason = " (it has no float64, in which losses are summed)" if accelerator == "mps" else ""
        raise ConfigError(
            f"{unknown_name_message('trainer.accelerator', accelerator, ACCELERATORS)}{reason}"
        )


def _check_strategy(strategy: Any) -> None:
    """Check a strategy, also for one device, which does not use it."""
    if isinstance(strategy, str) and any(word in strategy for word in FORKING_STRATEGIES):
        raise ConfigError(
            f"trainer.strategy is {strategy!r}, which forks or spawns the running program; a fit "
            "starts its processes itself: use strategy=ddp."
        )
    if isinstance(strategy, FSDPStrategy) or (isinstance(strategy, str) and "fsdp" in strategy):
        raise ConfigError(
            "Lightning's FSDPStrategy gathers weights around one forward of the whole module, but "
            "a training step here runs several batches. To shard weights use trainer=fsdp: "
            "strategy={'_target_': 'qtorch.model.Sharded'}."
        )
    if isinstance(strategy, str):
        supported = [
            name
            for name in ("auto", *StrategyRegistry.available_strategies())
            if not any(word in name for word in UNSUPPORTED_STRATEGIES)
        ]
        check_name("trainer.strategy", strategy, supported, limit=5)
        return
    if isinstance(strategy, Mapping):
        strategy = init_instance_by_config(strategy)
    if strategy is not None and not isinstance(strategy, Strategy):
        raise ConfigError(
            f"trainer.strategy is {strategy!r:.80}; expected the name of a strategy of Lightning, "
            "such as ddp, or a Strategy or its configuration."
        )


def parse_devices(arguments: Mapping[str, Any]) -> int | list[int]:
    """Return the devices to use on each node: how many, or a list of indices.

    "auto" means one device, -1 all GPUs. Raises ConfigError for an invalid value.
    """
    devices = arguments.get("devices", 1)
    if devices in (None, "auto"):
        return 1
    if isinstance(devices, str):
        devices = [d for d in devices.split(",") if d.strip()] if "," in devices else [devices]
        devices = devices[0] if len(devices) == 1 else devices
    try:
        if isinstance(devices, list | tuple):
            indices = [int(d) for d in devices]
            if indices and len(set(indices)) == len(indices) and min(indices) >= 0:
                return indices
        elif not isinstance(devices, bool):
            number = int(devices)
            if number == -1:
                return max(1, torch.cuda.device_count())
            if number >= 1:
                return number
    except (TypeError, ValueError):
        pass
    raise ConfigError(
        f"trainer.devices is {arguments['devices']!r}; expected a number of devices (2), a list of "
        "them ([0, 1]), -1 for all GPUs, or 'auto' for one."
    )


def _check_switches(arguments: Mapping[str, Any]) -> None:
    for name in SWITCHES:
        value = arguments.get(name)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"trainer.{name} is {value!r}; expected true or false.")
    if arguments.get("barebones"):
        raise ConfigError(
            "trainer.barebones turns off the checkpoints and metrics that select the best weights: "
            "remove it."
        )
    deterministic = arguments.get("deterministic")
    if deterministic is not None and deterministic not in (True, False, "warn"):
        raise ConfigError(
            f"trainer.deterministic is {deterministic!r}; expected true, false or warn."
        )


def _check_objects(arguments: Mapping[str, Any]) -> None:
    """Check the arguments whose values are objects or their configurations, or text."""
    for plugin in build_plugins(arguments.get("plugins")):
        if isinstance(plugin, CheckpointIO | ClusterEnvironment):
            raise ConfigError(
                f"trainer.plugins has a {type(plugin).__name__}, but a fit has its own: it "
                "replaces a checkpoint at once, and starts the processes of its devices. Remove it."
            )
    profiler = build_profiler(arguments.get("profiler"))
    if profiler is not None and not isinstance(profiler, str | Profiler):
        raise ConfigError(
            f"trainer.profiler is {profiler!r:.80}; expected its name (simple, advanced, pytorch), "
            "or a Profiler or its configuration."
        )
    max_time = arguments.get("max_time")
    if max_time is not None and not isinstance(max_time, str | timedelta | Mapping):
        raise ConfigError(
            f"trainer.max_time is {max_time!r}; expected DD:HH:MM:SS as text, or a mapping such as "
            "{hours: 2}."
        )
    root = arguments.get("default_root_dir")
    if root is not None and not isinstance(root, str | PathLike):
        raise ConfigError(f"trainer.default_root_dir is {root!r}; expected a folder.")


def build_plugins(plugins: Any) -> list[Any]:
    """Return the user's plugins, none, one or several, and build those that are configured."""
    specs = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    return [
        init_instance_by_config(spec) if isinstance(spec, Mapping | str) else spec
        for spec in specs
        if spec is not None
    ]


def build_profiler(profiler: Any) -> Any:
    """Return the user's profiler: a name, an object, or None. A configured one is built."""
    return init_instance_by_config(profiler) if isinstance(profiler, Mapping) else profiler


def _check_numbers(arguments: Mapping[str, Any]) -> None:
    """Check number arguments here because Lightning fails on a string with an empty assertion."""
    for name, types in NUMBER_TYPES.items():
        value = arguments.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, types)):
            type_name = "a number" if float in types else "an integer"
            raise ConfigError(f"trainer.{name} is {value!r}; expected {type_name}.")
    for name, minimum in COUNTS.items():
        if arguments.get(name) is not None:
            check_count(f"trainer.{name}", arguments[name], minimum=minimum)
    clip = arguments.get("gradient_clip_val")
    if clip is not None and clip < 0:
        raise ConfigError(f"trainer.gradient_clip_val is {clip}; expected at least 0, or null.")
    algorithm = arguments.get("gradient_clip_algorithm")
    if algorithm is not None:
        check_name("trainer.gradient_clip_algorithm", str(algorithm), ("norm", "value"))


def _check_batch_counts(arguments: Mapping[str, Any]) -> None:
    """Check the numbers of batches, most of which Lightning does not see."""
    for name, may_be_none in BATCH_COUNTS.items():
        value, minimum = arguments.get(name), int(not may_be_none)
        if isinstance(value, bool) or (isinstance(value, int) and value < minimum):
            is_valid = False
        else:
            is_positive = may_be_none or not isinstance(value, float) or value > 0
            is_valid = is_positive and (not isinstance(value, float) or 0 <= value <= 1)
        if not is_valid:
            part = "from 0.0" if may_be_none else "above 0.0"
            raise ConfigError(
                f"trainer.{name} is {value!r}; expected a number of batches of at least {minimum} "
                f"(an integer), or a part of them {part} to 1.0."
            )
    interval = arguments.get("check_val_every_n_epoch")
    if interval is not None:
        check_count("trainer.check_val_every_n_epoch", interval)
    accumulate, fast_dev_run = arguments.get("accumulate_grad_batches"), arguments.get(FAST_RUN)
    if accumulate is not None:
        check_count("trainer.accumulate_grad_batches", accumulate)
    if fast_dev_run is not None and not isinstance(fast_dev_run, int):
        raise ConfigError(
            f"trainer.fast_dev_run is {fast_dev_run!r}; expected true, false or a number of "
            "batches (an integer)."
        )


def reject_callbacks(callbacks: Sequence[Callback], reasons: Mapping[type, str]) -> None:
    """Raise ConfigError, with the reason, for a callback that cannot work."""
    for callback in callbacks:
        for kind, reason in reasons.items():
            if isinstance(callback, kind):
                raise ConfigError(f"the callback {type(callback).__name__} {reason}")


def check_callbacks(options: TrainerOptions) -> None:
    """Raise ConfigError for callbacks that cannot work with a ScoreModule."""
    reject_callbacks(options.callbacks, REJECTED_FOR_SCORE_MODULES)
    for callback in options.callbacks:
        if isinstance(callback, EarlyStopping | ModelCheckpoint) and callback.monitor is not None:
            check_monitor(callback.monitor, full_name=True)
    if is_sharding(options):
        reason = "keeps a whole copy of the weights, which trainer=fsdp shards: remove one of them."
        reject_callbacks(options.callbacks, {WeightAveraging: reason})


def check_validation(early_stop: Any, monitor: str, options: TrainerOptions) -> None:
    """Raise ConfigError if early stopping needs a validation that is turned off."""
    callback, name, _ = build_early_stopping(early_stop, monitor)
    if callback is not None and name.startswith("valid/") and options.limit_valid == 0:
        raise ConfigError(
            f"early_stop monitors {name!r}, but limit_val_batches=0 turns validation off: set "
            "early_stop to null (callbacks=no_stop), or remove limit_val_batches."
        )


def check_valid_segment(early_stop: Any, monitor: str, segments: Collection[str]) -> None:
    """Raise ConfigError if early stopping needs a segment "valid" that the dataset has not."""
    callback, name, _ = build_early_stopping(early_stop, monitor)
    if callback is not None and name.startswith("valid/"):
        require_segment(
            "valid",
            segments,
            f"whose {name!r} early_stop monitors (callbacks=no_stop does without)",
        )


def device_name(options: TrainerOptions) -> str:
    """Return the torch device name that the trainer's `accelerator` and `devices` stand for."""
    accelerator = options.arguments.get("accelerator") or "auto"
    if accelerator not in ("auto", "gpu", "cuda"):
        return str(accelerator)
    devices = parse_devices(options.arguments)
    number = devices[0] if isinstance(devices, list) else 0
    if accelerator == "auto" and resolve_device("auto").type == "cpu":
        return "cpu"
    return f"cuda:{number}"


def trainer_device(options: TrainerOptions) -> torch.device:
    """Return the device that the trainer's `accelerator` and `devices` stand for."""
    return resolve_device(device_name(options))


def resolve_inner_steps(
    inner_steps: int | str, options: TrainerOptions, num_batches: int, *, num_ranks: int = 1
) -> int:
    """Return the number of batches per training_step.

    "auto" is 1 if an argument or a callback counts single batches. Otherwise Lightning's overhead
    for each training_step, about that of a small batch, becomes negligible.
    """
    needs_single_batches = options.counts_batches or any(
        is_overridden(hook, callback, Callback)
        for callback in options.callbacks
        for hook in BATCH_HOOKS
    )
    if inner_steps == "auto":
        is_watched = num_ranks > 1 or options.shows_progress_bar or has_listeners()
        limit = FREQUENT_INNER_STEPS if is_watched else DEFAULT_INNER_STEPS
        return 1 if needs_single_batches else max(1, min(limit, num_batches))
    if not isinstance(inner_steps, int) or isinstance(inner_steps, bool) or inner_steps < 1:
        raise ConfigError(
            f"inner_steps is {inner_steps!r}; expected 'auto' or an integer of at least 1."
        )
    if inner_steps > 1 and options.counts_batches:
        raise ConfigError(
            "val_check_interval counts single batches: set inner_steps=1 (or 'auto')."
        )
    return inner_steps


def limit_batches(num_batches: int, limit: int | float | None) -> int:
    """Return the number of batches under Lightning's limit_*_batches, a count or a fraction."""
    if limit is None:
        return num_batches
    return min(num_batches, limit if isinstance(limit, int) else int(num_batches * limit))


def resolve_monitor(monitor: str, mode: str | None = None) -> tuple[str, str]:
    """Return a metric's full name and "min" or "max"; short names are loss, ic, rank_ic."""
    name = MONITOR_NAMES.get(monitor, monitor)
    if mode is not None:
        check_name("mode of the monitor", mode, ("min", "max"))
    return name, mode or get_mode(name)


def check_monitor(name: str, *, full_name: bool = False) -> None:
    """Raise ConfigError, with the nearest name, for a metric that a ScoreModule does not log."""
    if name not in METRICS:
        valid = METRICS if full_name else (*MONITOR_NAMES, *METRICS)
        raise ConfigError(unknown_name_message("metric to monitor", name, valid))


class ScoreEarlyStopping(EarlyStopping):
    """Early stopping that ignores epochs without the monitored metric.

    These are pretraining epochs, which have no score, and an epoch that ends before its validation
    (`max_time`, `max_steps`). A user's module may write the metric in another way, see
    `find_metric`.
    """

    def __init__(self, monitor: str, **options: Any) -> None:
        super().__init__(monitor, strict=False, check_finite=False, **options)
        self._state_key = super().state_key

    @property
    def state_key(self) -> str:
        """The key of this callback in checkpoints, which does not depend on the spelling."""
        return self._state_key

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # As Lightning's own, which takes an interval of one batch for an epoch and fails for times.
        is_by_epoch = not validates_within_epochs(trainer) and trainer.check_val_every_n_epoch == 1
        self._check_on_train_epoch_end = is_by_epoch

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state, but keep the patience: a resumed training may have another one."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_due(trainer, pl_module):
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_due(trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)

    def _is_due(self, trainer: pl.Trainer, module: pl.LightningModule) -> bool:
        self.monitor = find_metric(self.monitor, trainer.callback_metrics)
        is_pretraining = isinstance(module, ScoreModule) and module.is_pretraining
        return not is_pretraining and self.monitor in trainer.callback_metrics


def build_early_stopping(spec: Any, monitor: str) -> tuple[EarlyStopping | None, str, str]:
    """Return `(callback or None, metric, mode)`.

    `spec` is None, a patience, or a mapping with `patience` and any of `monitor`, `mode`,
    `min_delta`.
    """
    if not isinstance(monitor, str):
        raise ConfigError(f"monitor is {monitor!r}; expected the name of a metric, such as loss.")
    if spec is None or spec is False:
        return (None, *resolve_monitor(monitor))
    if not isinstance(spec, int | Mapping):
        raise ConfigError(
            f"early_stop is {spec!r}; expected null, a patience in epochs, or a mapping with "
            "patience, monitor, mode or min_delta."
        )
    options: dict[str, Any] = {"patience": spec} if isinstance(spec, int) else dict(spec)
    valid = ("monitor", "patience", "mode", "min_delta")
    for name in options:
        check_name("option of early_stop", name, valid)
    name, mode = resolve_monitor(options.pop("monitor", monitor), options.pop("mode", None))
    patience = options.pop("patience", 10)
    check_count("early_stop.patience", patience, minimum=0)
    min_delta = options.get("min_delta", 0.0)
    if isinstance(min_delta, bool) or not isinstance(min_delta, int | float):
        raise ConfigError(f"early_stop.min_delta is {min_delta!r}; expected a number.")
    callback = ScoreEarlyStopping(name, mode=mode, patience=patience, **options)
    return callback, name, mode


def build_trainer(
    options: TrainerOptions,
    *,
    internal_callbacks: Sequence[Callback],
    logger: RecorderLogger | None,
    root: Path | None,
    loader: StepLoader,
    automatic_optimization: bool,
    rank_info: RankInfo | None = None,
) -> pl.Trainer:
    """Build the pl.Trainer of one fit.

    `automatic_optimization`: the module uses Lightning's own optimization. `rank_info`: which rank
    this process is if several devices share the training. `root` is the folder for files of the
    user's callbacks; None: the working folder. Raises ConfigError for arguments that Lightning
    rejects.
    """
    arguments: dict[str, Any] = {
        "num_sanity_val_steps": 0,  # a sanity check would draw random numbers before training
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": None if root is None else str(root),
        **options.arguments,
        "enable_progress_bar": options.shows_progress_bar,
        "max_epochs": options.max_epochs,
    }
    arguments |= _device_arguments(options, rank_info)
    if automatic_optimization:
        arguments["accumulate_grad_batches"] = options.accumulate
        arguments["gradient_clip_val"] = options.clip_value
        arguments["gradient_clip_algorithm"] = options.clip_algorithm
    arguments["enable_checkpointing"] = True  # CheckpointCallback is a Lightning Checkpoint
    is_first_rank = rank_info is None or rank_info.rank == 0
    arguments["logger"] = _trainer_loggers(arguments.get("logger"), logger, is_first_rank)
    arguments["plugins"] = _plugins(arguments.get("plugins"), rank_info)
    arguments["profiler"] = build_profiler(arguments.get("profiler"))
    user_callbacks = options.callbacks
    if not is_first_rank:
        user_callbacks = [c for c in user_callbacks if not isinstance(c, ProgressBar)]
    callbacks = [*user_callbacks, *internal_callbacks]
    if arguments["enable_progress_bar"] and not options.has_progress_bar:
        bar_class = NotebookProgressBar if is_notebook() else BatchProgressBar
        callbacks.append(bar_class(loader))
    try:
        return pl.Trainer(**arguments, callbacks=callbacks)
    except LIGHTNING_ERRORS as error:
        raise _rejection(error) from error


def _trainer_loggers(value: Any, logger: RecorderLogger | None, is_first_rank: bool) -> Any:
    """Return the argument `logger` of pl.Trainer.

    Lightning's default logger, which `value` True stands for, writes TensorBoard or CSV files into
    `lightning_logs`. In a run, the run takes its place.
    """
    if value is True and logger is None and is_first_rank:
        return True
    user_loggers = component_list(value) if is_first_rank else []
    return build_loggers(user_loggers, logger, disabled=value is False) or False


def check_arguments(options: TrainerOptions, *, check_device: bool) -> None:
    """Raise ConfigError for arguments that Lightning rejects, by building its Trainer once.

    It is built without the parts that have an effect or belong to one fit, and for one device; with
    `check_device=False` for the CPU, because another machine has the device.
    """
    parts = ("callbacks", "logger", "strategy", "default_root_dir", "num_nodes")
    arguments = {k: v for k, v in options.arguments.items() if k not in parts}
    if not isinstance(arguments.get("profiler"), str):
        arguments.pop("profiler", None)
    is_cpu = not check_device or device_name(options) == "cpu"
    arguments |= {"accelerator": "cpu" if is_cpu else arguments.get("accelerator", "auto")}
    arguments |= {"devices": 1, "max_epochs": options.max_epochs, "logger": False}
    arguments |= {"enable_checkpointing": False, "enable_progress_bar": False}
    arguments |= {"enable_model_summary": False}
    try:
        key = digest(arguments)
    except (ConfigError, TypeError):  # a live object
        key = None
    if key in _accepted_arguments:
        return
    try:
        pl.Trainer(**{**arguments, "plugins": _plugins(arguments.get("plugins"), None)})
    except LIGHTNING_ERRORS as error:
        raise _rejection(error) from error
    if key is not None:
        _accepted_arguments.add(key)


# Digests of arguments that Lightning has accepted in this process: building a Trainer takes a
# tenth of a second, and the jobs of a sweep differ in other settings.
_accepted_arguments: set[str] = set()


def _rejection(error: Exception) -> ConfigError:
    return ConfigError(f"Lightning rejects these trainer arguments: {error}")


def _plugins(user_plugins: Any, rank_info: RankInfo | None) -> list[Any]:
    """Return the user's plugins and those of a fit."""
    # Without this, Lightning detects a SLURM job and takes itself for one of its tasks.
    environment = LightningEnvironment() if rank_info is None else RankEnvironment(rank_info)
    return [*build_plugins(user_plugins), AtomicCheckpointIO(), environment]


def _device_arguments(options: TrainerOptions, rank_info: RankInfo | None) -> dict[str, Any]:
    """Return Lightning's device arguments, for one device or for all that share the training."""
    is_cpu = device_name(options) == "cpu"
    arguments: dict[str, Any] = {
        "accelerator": "cpu" if is_cpu else options.arguments.get("accelerator", "auto"),
        "devices": options.num_local if is_cpu else parse_devices(options.arguments),
    }
    strategy = options.build_strategy() or "auto"
    if rank_info is None:
        # Ignore a strategy for several devices when there is only one.
        is_distributed = isinstance(strategy, str | ParallelStrategy)
        return {**arguments, "strategy": "auto" if is_distributed else strategy}
    arguments["strategy"] = "ddp" if strategy == "auto" else strategy
    arguments["use_distributed_sampler"] = False
    if rank_info.rank > 0:
        arguments["enable_progress_bar"] = False
    return arguments


def is_sharding(options: TrainerOptions) -> bool:
    """Whether the strategy shards the weights over the devices."""
    return isinstance(options.build_strategy(), ModelParallelStrategy)
