"""The `trainer` mapping: any argument of pl.Trainer, those that the module itself follows apart."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy, ParallelStrategy

from qtorch.core.errors import ArgumentError, ConfigError, unknown_name
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.runtime import resolve_device
from qtorch.model.checkpoint import AtomicCheckpointIO
from qtorch.model.module import METRICS, MONITORS, ScoreModule
from qtorch.model.progress_bar import BatchBar
from qtorch.model.rank_environment import RankEnvironment, RankPlace
from qtorch.model.recorder_logger import RecorderLogger, with_recorders
from qtorch.model.step_loader import StepLoader

MAX_EPOCHS = 100
INNER_STEPS = 16
FORKING = ("spawn", "fork", "notebook")
# A callback that looks at single batches sees each of them only where a step holds one.
BATCH_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_backward",
    "on_after_backward",
    "on_before_zero_grad",
)

NUMBERS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("max_epochs", "min_epochs", "max_steps", "min_steps"), (int,)),
    **dict.fromkeys(("accumulate_grad_batches", "check_val_every_n_epoch"), (int,)),
    **dict.fromkeys(("limit_train_batches", "limit_val_batches"), (int, float)),
    "gradient_clip_val": (int, float),
}


@dataclass(frozen=True)
class TrainerOptions:
    """`given` is what the user said; `rest` goes to pl.Trainer, the others to the module."""

    given: dict[str, Any]
    rest: dict[str, Any]
    accumulate: int = 1
    clip_value: float | None = None
    clip_algorithm: str | None = None
    limit_train: int | float | None = None
    limit_valid: int | float | None = None
    callbacks: list[Callback] = field(default_factory=list)

    @property
    def num_local(self) -> int:
        """Devices of one node."""
        devices = devices_of(self.rest)
        return devices if isinstance(devices, int) else len(devices)

    @property
    def num_devices(self) -> int:
        """Devices of all nodes."""
        return self.num_local * int(self.rest.get("num_nodes", 1))

    @property
    def counts_batches(self) -> bool:
        """Whether an argument counts training batches one by one."""
        rest = self.rest
        whole = rest.get("val_check_interval") in (None, 1.0)
        return bool(not whole or rest.get("fast_dev_run") or rest.get("overfit_batches"))


def trainer_options(given: Mapping[str, Any] | None, callbacks: Sequence[Any]) -> TrainerOptions:
    """Checked arguments. An unknown one is an ArgumentError with the nearest name."""
    given = dict(given or {})
    valid = list(inspect.signature(pl.Trainer.__init__).parameters)[1:]
    for name in given:
        if name not in valid:
            raise ArgumentError(unknown_name("argument of the trainer", name, valid, limit=60))
    rest = dict(given)
    _check_devices(given)
    _check_numbers(given)
    clip = rest.pop("gradient_clip_val", None)
    extra = rest.pop("callbacks", None) or []
    listed = [*(extra if isinstance(extra, list | tuple) else [extra]), *callbacks]
    built = [init_instance_by_config(c, accept_types=Callback) for c in listed]
    refuse_averaging(built)
    return TrainerOptions(
        given=given,
        rest=rest,
        accumulate=int(rest.pop("accumulate_grad_batches", None) or 1),
        clip_value=None if clip is None else float(clip),
        clip_algorithm=rest.pop("gradient_clip_algorithm", None),
        limit_train=rest.pop("limit_train_batches", None),
        limit_valid=rest.pop("limit_val_batches", None),
        callbacks=built,
    )


def _check_devices(given: Mapping[str, Any]) -> None:
    strategy, nodes = given.get("strategy"), given.get("num_nodes", 1)
    if isinstance(strategy, str) and any(word in strategy for word in FORKING):
        raise ConfigError(
            f"trainer.strategy is {strategy!r}, which copies the running program; a fit starts its "
            "processes itself: strategy=ddp."
        )
    if isinstance(strategy, FSDPStrategy) or (isinstance(strategy, str) and "fsdp" in strategy):
        raise ConfigError(
            "Lightning's FSDPStrategy gathers weights around one forward of a whole module, and a "
            "step here is the forward and backward of several batches. Shard by trainer=fsdp: "
            "strategy={'_target_': 'qtorch.model.sharding.Sharded'}."
        )
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
        raise ConfigError(f"trainer.num_nodes is {nodes!r}; expected a whole number from 1.")
    devices_of(given)


def devices_of(given: Mapping[str, Any]) -> int | list[int]:
    """What `devices` means on one node: a number of them, or which ones.

    "auto" is one device, -1 all GPUs. Raises ConfigError for what is neither.
    """
    devices = given.get("devices", 1)
    if devices in (None, "auto"):
        return 1
    if isinstance(devices, str):
        devices = [d for d in devices.split(",") if d.strip()] if "," in devices else [devices]
        devices = devices if len(devices) > 1 else devices[0]
    try:
        if isinstance(devices, list | tuple):
            found = [int(d) for d in devices]
            if found and len(set(found)) == len(found) and min(found) >= 0:
                return found
        elif not isinstance(devices, bool):
            number = int(devices)
            if number == -1:
                return max(1, torch.cuda.device_count())
            if number >= 1:
                return number
    except (TypeError, ValueError):
        pass
    raise ConfigError(
        f"trainer.devices is {given['devices']!r}; expected a number of devices (2), a list of "
        "them ([0, 1]), -1 for all GPUs, or 'auto' for one."
    )


def _check_numbers(given: Mapping[str, Any]) -> None:
    """Lightning answers a word in a number's place with an empty assertion."""
    for name, kinds in NUMBERS.items():
        value = given.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            what = "a number" if float in kinds else "a whole number"
            raise ConfigError(f"trainer.{name} is {value!r}; expected {what}.")


def refuse_averaging(callbacks: Sequence[Callback]) -> None:
    """ConfigError for callbacks that put other weights in place of those that were judged."""
    for callback in callbacks:
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise ConfigError(
                f"{type(callback).__name__} puts averaged weights in place at the end, but a fit "
                "keeps the weights of the best epoch: the two do not go together."
            )


def device_name(options: TrainerOptions) -> str:
    """The device that the trainer's `accelerator` and `devices` mean, as torch names it."""
    accelerator = options.rest.get("accelerator") or "auto"
    if accelerator not in ("auto", "gpu", "cuda"):
        return str(accelerator)
    devices = devices_of(options.rest)
    number = devices[0] if isinstance(devices, list) else 0
    if accelerator == "auto" and resolve_device("auto").type == "cpu":
        return "cpu"
    return f"cuda:{number}"


def inner_steps_of(asked: int | str, options: TrainerOptions, num_batches: int) -> int:
    """How many batches one training_step runs: "auto" is one where something counts them."""
    looking = options.counts_batches or any(_looks_at_batches(c) for c in options.callbacks)
    if asked == "auto":
        return 1 if looking else max(1, min(INNER_STEPS, num_batches))
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
        raise ConfigError(f"inner_steps is {asked!r}; expected 'auto' or a number from 1.")
    if asked > 1 and options.counts_batches:
        raise ConfigError(
            "val_check_interval, overfit_batches and fast_dev_run count single batches: they need "
            "inner_steps=1 (or 'auto')."
        )
    return asked


def _looks_at_batches(callback: Callback) -> bool:
    return any(getattr(type(callback), h) is not getattr(Callback, h) for h in BATCH_HOOKS)


def limited(num_batches: int, limit: int | float | None) -> int:
    """The number of batches that Lightning's limit_*_batches leaves: a count, or a share."""
    if limit is None:
        return num_batches
    return min(num_batches, limit if isinstance(limit, int) else int(num_batches * limit))


def monitored(monitor: str, mode: str | None = None) -> tuple[str, str]:
    """The metric's full name and "min" or "max"; short names are loss, ic, rank_ic."""
    name = MONITORS.get(monitor, monitor)
    if mode not in (None, "min", "max"):
        raise ConfigError(unknown_name("mode of the monitor", str(mode), ("min", "max")))
    lesser = any(word in name.lower() for word in ("loss", "error", "mse", "mae", "rmse"))
    return name, mode or ("min" if lesser else "max")


def check_monitor(*names: str) -> None:
    """ConfigError, with the nearest name, for a metric that no training of ours gives."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(unknown_name("metric to monitor", name, (*MONITORS, *METRICS)))


class Stopper(EarlyStopping):
    """An early stop that does not count epochs of pretraining: they have no score to watch."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _pretrains(pl_module):
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _pretrains(pl_module):
            super().on_train_epoch_end(trainer, pl_module)


def _pretrains(module: pl.LightningModule) -> bool:
    return isinstance(module, ScoreModule) and module.pretrains


def early_stopping(spec: Any, monitor: str) -> tuple[EarlyStopping | None, str, str]:
    """`(callback or None, metric, mode)`; `spec` is None, a patience, or a mapping with
    `patience` and any of `monitor`, `mode`, `min_delta`."""
    if spec is None or spec is False:
        return (None, *monitored(monitor))
    options: dict[str, Any] = {"patience": spec} if isinstance(spec, int) else dict(spec)
    valid = ("monitor", "patience", "mode", "min_delta")
    for name in options:
        if name not in valid:
            raise ConfigError(unknown_name("option of early_stop", name, valid))
    name, mode = monitored(options.pop("monitor", monitor), options.pop("mode", None))
    patience = int(options.pop("patience", 10))
    stopper = Stopper(monitor=name, mode=mode, patience=patience, check_finite=False, **options)
    return stopper, name, mode


def build_trainer(
    options: TrainerOptions,
    *,
    own: Sequence[Callback],
    logger: RecorderLogger | None,
    folder: Path | None,
    loader: StepLoader,
    automatic: bool,
    place: RankPlace | None = None,
) -> pl.Trainer:
    """The pl.Trainer of one fit. `automatic`: the module's optimization is Lightning's own.
    `place`: of the rank that this process is, where several devices share the training.

    Raises ConfigError for what Lightning does not take.
    """
    arguments: dict[str, Any] = {
        "max_epochs": MAX_EPOCHS if options.rest.get("max_steps", -1) == -1 else -1,
        "num_sanity_val_steps": 0,  # would draw from generators before the first step
        "enable_model_summary": False,
        "enable_progress_bar": sys.stderr.isatty(),
        "log_every_n_steps": 1,
        "default_root_dir": str(folder) if folder is not None else None,
        **options.rest,
    }
    arguments |= _devices(options, place)
    if automatic:
        arguments["accumulate_grad_batches"] = options.accumulate
        arguments["gradient_clip_val"] = options.clip_value
        arguments["gradient_clip_algorithm"] = options.clip_algorithm
    arguments["enable_checkpointing"] = True  # the keeper is one of Lightning's checkpointers
    loggers = arguments.get("logger") if place is None or place.rank == 0 else None
    wanted = [] if loggers in (None, True, False) else loggers
    wanted = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
    arguments["logger"] = with_recorders(wanted, logger) or False
    plugins = arguments.get("plugins") or []
    listed = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    # Else Lightning takes a job of a scheduler for a job of its own.
    environment = LightningEnvironment() if place is None else RankEnvironment(place)
    arguments["plugins"] = [*listed, AtomicCheckpointIO(), environment]
    callbacks = [*options.callbacks, *own]
    if arguments["enable_progress_bar"] and not _has_bar(callbacks):
        callbacks.append(BatchBar(loader))
    try:
        return pl.Trainer(**{**arguments, "callbacks": callbacks})
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ConfigError(f"Lightning does not take these trainer arguments: {error}") from error


def _devices(options: TrainerOptions, place: RankPlace | None) -> dict[str, Any]:
    """Lightning's arguments of the devices: of one, or of all that share the training."""
    given, cpu = options.rest, device_name(options) == "cpu"
    found: dict[str, Any] = {
        "accelerator": "cpu" if cpu else given.get("accelerator", "auto"),
        "devices": devices_of(given),
    }
    strategy = given.get("strategy") or "auto"
    if isinstance(strategy, Mapping):
        strategy = init_instance_by_config(strategy)
    if place is None:
        # A strategy for several devices has nothing to do for one.
        return {**found, "strategy": "auto" if _is_for_several(strategy) else strategy}
    found |= {"strategy": "ddp" if strategy == "auto" else strategy}
    found |= {"use_distributed_sampler": False}
    if place.rank > 0:
        found["enable_progress_bar"] = False
    return found


def _is_for_several(strategy: Any) -> bool:
    return isinstance(strategy, str | ParallelStrategy)


def shards_weights(options: TrainerOptions) -> bool:
    """Whether the strategy leaves each device a part of the weights alone."""
    strategy = options.rest.get("strategy")
    if isinstance(strategy, Mapping):
        strategy = init_instance_by_config(strategy)
    return isinstance(strategy, ModelParallelStrategy)


def _has_bar(callbacks: Sequence[Callback]) -> bool:
    return any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks)
