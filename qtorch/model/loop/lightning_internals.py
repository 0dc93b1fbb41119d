"""Every use of Lightning's private parts, in one file, each with the reason why no public one does.

Tried with pytorch-lightning 2.6.0 and 2.6.6; pyproject.toml allows 2.6 only. A test
(tests/model/test_lightning_internals.py) fails if a new release moves one of these parts.
"""

from __future__ import annotations

import builtins
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import MLFlowLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultMetric,
    _Sync,
)
from torch import Tensor
from torchmetrics import Metric

# -- the training loop ---------------------------------------------------------------------------


def skip_sigterm_broadcast(trainer: pl.Trainer) -> None:
    """Keep Lightning from broadcasting before each step whether a signal has arrived.

    The broadcast waits for the device. It is not needed: the parent process sends stop requests,
    and CheckpointCallback agrees on them among the ranks. No argument turns it off.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None


def resume_by_epochs(trainer: pl.Trainer) -> None:
    """Resume a training with `max_steps` after a whole epoch as one without.

    Lightning takes it for interrupted in the middle of that epoch, and ends the epoch once more,
    with all hooks. No argument turns it off.
    """
    loop: Any = trainer.fit_loop
    loop._iteration_based_training = lambda: False


def can_stop(trainer: pl.Trainer) -> bool:
    """Whether `min_epochs` and `min_steps` let a training end when `should_stop` is set.

    The public alternative is to repeat how Lightning counts epochs and steps.
    """
    return bool(trainer.fit_loop._can_stop_early)


def validates_next(trainer: pl.Trainer, *, ignore_stop: bool = False) -> bool:
    """Whether Lightning runs a validation between the finished batch and the next one.

    `ignore_stop`: not counting the validation at the end of a training that `should_stop` ends.
    A training that resumed from a checkpoint written here would skip that validation. The public
    alternative is to repeat Lightning's rules for `val_check_interval` and
    `check_val_every_n_epoch` (counts, fractions, times).
    """
    loop: Any = trainer.fit_loop
    should_stop = trainer.should_stop
    try:
        trainer.should_stop = should_stop and not ignore_stop
        return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))
    finally:
        trainer.should_stop = should_stop


def count_optimizer_step(trainer: pl.Trainer) -> None:
    """Count an optimizer step that was made without LightningOptimizer.

    `trainer.global_step` has no setter; checkpoints, loggers and `max_steps` read it.
    """
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    progress.increment_ready()
    progress.increment_completed()


def num_finished_epochs(checkpoint: dict[str, Any]) -> int:
    """Return how many epochs a resumed training does not train again.

    The checkpoint's public entry "epoch" is the same before and after the end of an epoch.
    """
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def shard_over_all_ranks(strategy: ModelParallelStrategy) -> None:
    """Let a strategy shard the weights over all ranks, whose number it knows only now.

    Its argument `data_parallel_size="auto"` means the number of nodes.
    """
    strategy._data_parallel_size = strategy.world_size


# -- loggers and logged metrics ------------------------------------------------------------------


def detach_module(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Separate a module from the trainer that has trained it.

    Trainer, loops and callbacks refer to each other, so that they and what they hold stay in memory
    until the garbage collector runs.
    """
    training: Any = trainer.fit_loop
    loops: list[Any] = [training, training.epoch_loop.val_loop]
    loops += [trainer.validate_loop, trainer.test_loop, trainer.predict_loop]
    for loop in loops:
        source = getattr(loop, "_data_source", None)
        if source is not None:
            source.instance = None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # a list, in spite of its annotation
        for name in ("log", "log_dict"):  # bound methods of the module
            vars(callback).pop(name, None)
    trainer._data_connector._datahook_selector = None
    trainer.strategy._lightning_module = trainer.strategy._model = None
    module.trainer = None
    for optimizer in trainer.optimizers:
        optimizer.state.clear()
    trainer.optimizers = []


def mlflow_target(logger: MLFlowLogger) -> tuple[str | None, str]:
    """Return the run ID, if one is set, and the tracking URI of Lightning's MLflow logger.

    Its public `run_id` creates a run, and the URI is not public.
    """
    return logger._run_id, str(logger._tracking_uri)


def current_batch(trainer: pl.Trainer) -> Any:
    """Return the batch of the running step, or None outside of steps.

    Lightning takes the batch size of a logged metric from it. No hook runs late enough to tell that
    a step is over.
    """
    return getattr(trainer._results, "batch", None)


# A user's module logs to Lightning's result collection, whose sums of the running epoch are in no
# checkpoint of Lightning's. An exact resume needs them.

PLAIN_FIELDS = (  # metadata fields of a logged metric that a checkpoint holds unchanged
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "dataloader_idx",
    "metric_attribute",
)


def unsent_metrics(trainer: pl.Trainer) -> list[tuple[dict[str, float], int]]:
    """Return the metrics, with their step, that Lightning sends to the loggers after this hook.

    These are the metrics of the batch or epoch that has just finished.
    """
    connector, epoch_loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    is_automatic = trainer.lightning_module.automatic_optimization
    is_accumulating = is_automatic and epoch_loop._should_accumulate()
    is_logged = connector.should_update_logs or getattr(trainer, "fast_dev_run", False)
    step = epoch_loop._batches_that_stepped
    if _is_between_epochs(trainer):
        step -= 1
    elif is_accumulating or not is_logged:
        return []
    values = {k: float(v) for k, v in connector.metrics["log"].items()}
    if not values:
        return []
    step = int(values.pop("step", step))  # Lightning's key for a custom step
    return [({"epoch": float(trainer.current_epoch), **values}, step)]


def epoch_state(module: pl.LightningModule) -> dict[str, Any]:
    """Return the module's logging state of the running epoch.

    It holds the sums, counts and extremes so far, the metrics that callbacks see, and the states of
    the module's torchmetrics. At the end of an epoch the sums are no longer needed.
    """
    trainer = module.trainer
    results = {} if _is_between_epochs(trainer) else trainer.fit_loop.epoch_loop._results
    finished_results = trainer.fit_loop.epoch_loop._results if not results else {}
    # Lightning resets logged metrics at the end of the epoch: they have no state to save.
    logged_metric_ids = {id(r.value) for r in finished_results.values() if not r.is_tensor}
    return {
        # A result that is reduced over a user's own process group cannot be saved.
        "results": {
            k: _serialize_result(r)
            for k, r in results.items()
            if not r.has_reset and r.meta.sync.group is None
        },
        "seen": {k: v.detach().cpu() for k, v in trainer.callback_metrics.items()},
        "metrics": {
            name: [move_tensors(m.metric_state, "cpu"), m.update_count]
            for name, m in module.named_modules()
            if isinstance(m, Metric) and id(m) not in logged_metric_ids
        },
    }


def restore_epoch_state(module: pl.LightningModule, state: dict[str, Any]) -> None:
    """Restore an `epoch_state` before the first batch."""
    trainer, device = module.trainer, module.device
    for name, (values, count) in state["metrics"].items():
        metric: Any = module.get_submodule(name)
        for key, value in values.items():
            setattr(metric, key, move_tensors(value, device))
        metric._update_count, metric._computed = count, None
    trainer.callback_metrics.update(move_tensors(state["seen"], device))
    for key, result_state in state["results"].items():
        trainer.fit_loop.epoch_loop._results[key] = _deserialize_result(module, result_state)
    if state["results"]:
        # Lightning would reset the sums at a first batch.
        trainer._logger_connector._first_loop_iter = False


def _is_between_epochs(trainer: pl.Trainer) -> bool:
    """Whether all batches of the epoch and its validation are done."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return bool(progress.processed == progress.ready)


def _serialize_result(result: _ResultMetric) -> dict[str, Any]:
    """Return a logged result as plain values and tensors."""
    meta, reduce = result.meta, result.meta.reduce_fx
    state: dict[str, Any] = {
        "meta": {name: getattr(meta, name) for name in PLAIN_FIELDS},
        "reduce": reduce.__name__,
        "builtin": reduce in (sum, min, max),
        "sync": [meta.sync.should, meta.sync.rank_zero_only],
        "is_tensor": result.is_tensor,
        "count": result._update_count,
        "newest": move_tensors(result._forward_cache, "cpu"),
    }
    if result.is_tensor:
        state["states"] = move_tensors(result.metric_state, "cpu")
    return state


def _deserialize_result(module: pl.LightningModule, state: dict[str, Any]) -> _ResultMetric:
    """Rebuild a logged result, with the metadata that the module's next `log` call will use."""
    source: Any = builtins if state["builtin"] else torch
    meta = _Metadata(**state["meta"], reduce_fx=getattr(source, state["reduce"]))
    should, rank_zero_only = state["sync"]
    reduce = module.trainer.strategy.reduce
    meta.sync = _Sync(fn=reduce, _should=should, rank_zero_only=rank_zero_only)
    result: Any = _ResultMetric(meta, state["is_tensor"])
    if state["is_tensor"]:
        for key, value in state["states"].items():
            setattr(result, key, move_tensors(value, module.device))
    else:
        result.value = module.get_submodule(state["meta"]["metric_attribute"])
    result._update_count = state["count"]
    result._forward_cache = move_tensors(state["newest"], module.device)
    return result.to(module.device)  # type: ignore[no-any-return]  # returns itself


def move_tensors(state: Any, device: torch.device | str) -> Any:
    """Return a nested state with its tensors detached and on a device."""
    if isinstance(state, Tensor):
        return state.detach().to(device)
    if isinstance(state, dict):
        return {k: move_tensors(v, device) for k, v in state.items()}
    return [move_tensors(v, device) for v in state] if isinstance(state, list) else state
