"""A user's LightningModule as one of several ranks."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultMetric,
    _Sync,
)
from pytorch_lightning.utilities.data import extract_batch_size
from torch import Tensor
from torchmetrics import Metric

from qtorch.data.dataset.batch import Batch
from qtorch.model.loop.rank_group import RankGroup

LOG = inspect.signature(pl.LightningModule.log)


class UserModuleRescaler(pl.Callback):
    """Rescale a user module's loss and metrics so that DDP matches one device.

    The loss is taken to be the mean over the rows of the rank's batch. Its backward is scaled by
    the rank's part of the rows, so that the averaged gradients are those of the whole batch. A
    module whose loss is another mean (over days, or over weighted rows) returns the number of items
    that it averages over from a method `batch_weight(batch)`.

    Logged metrics are reduced over the ranks as Lightning reduces them over batches, by `reduce_fx`
    and `batch_size`, so that best epoch, early stopping and schedulers see the same value on every
    rank. Every rank must log a metric, except with `rank_zero_only`.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self.ranks = ranks
        self._loss_scale = torch.ones(())

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.backward = self._scale_backward(pl_module.backward)  # type: ignore[method-assign]
        pl_module.log = self._sync_log(pl_module.log, pl_module)  # type: ignore[method-assign]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        get_weight = getattr(pl_module, "batch_weight", _num_rows)
        weight = torch.as_tensor(get_weight(batch), dtype=torch.float64).to(pl_module.device)
        self._loss_scale = weight * self.ranks.size / self.ranks.sum(weight)

    def _scale_backward(self, backward: Callable[..., None]) -> Callable[..., None]:
        def backward_with_scale(loss: Tensor, *args: Any, **keywords: Any) -> None:
            backward(loss * self._loss_scale.to(loss.dtype), *args, **keywords)

        return backward_with_scale

    def _sync_log(
        self, log: Callable[..., None], module: pl.LightningModule
    ) -> Callable[..., None]:
        def log_with_sync(*args: Any, **keywords: Any) -> None:
            log_arguments = LOG.bind(module, *args, **keywords).arguments
            del log_arguments["self"]
            if not log_arguments.get("rank_zero_only"):
                size = log_arguments.get("batch_size")
                if size is None:
                    batch = getattr(module.trainer._results, "batch", None)
                    size = 1 if batch is None else extract_batch_size(batch)
                # Lightning averages the batch sizes over the ranks too, and truncates the mean.
                log_arguments |= {"sync_dist": True, "batch_size": size * self.ranks.size}
            log(**log_arguments)

        return log_with_sync


def _num_rows(batch: Any) -> int:
    return batch.num_samples if isinstance(batch, Batch) else extract_batch_size(batch)


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
    connector, loop = trainer._logger_connector, trainer.fit_loop
    step = loop.epoch_loop._batches_that_stepped
    if _is_between_epochs(trainer):
        step -= 1
    else:
        is_accumulating = (
            trainer.lightning_module.automatic_optimization and loop._should_accumulate()
        )
        if is_accumulating or not (
            connector.should_update_logs or getattr(trainer, "fast_dev_run", False)
        ):
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
        "results": {k: _serialize_result(r) for k, r in results.items() if _is_current(r)},
        "seen": {k: v.detach().cpu() for k, v in trainer.callback_metrics.items()},
        "metrics": {
            name: [_move_tensors(m.metric_state, "cpu"), m.update_count]
            for name, m in module.named_modules()
            if isinstance(m, Metric) and id(m) not in logged_metric_ids
        },
    }


def restore_epoch_state(module: pl.LightningModule, state: dict[str, Any]) -> None:
    """Restore an `epoch_state` before the first batch."""
    trainer = module.trainer
    connector, device = trainer._logger_connector, module.device
    for name, (values, count) in state["metrics"].items():
        metric: Any = module.get_submodule(name)
        for key, value in values.items():
            setattr(metric, key, _move_tensors(value, device))
        metric._update_count, metric._computed = count, None
    connector._callback_metrics.update(_move_tensors(state["seen"], device))
    for key, result_state in state["results"].items():
        trainer.fit_loop.epoch_loop._results[key] = _deserialize_result(module, result_state)
    if state["results"]:
        connector._first_loop_iter = False  # Lightning would reset the sums at a first batch


def _is_between_epochs(trainer: pl.Trainer) -> bool:
    """Whether all batches of the epoch are done: Lightning has no current batch."""
    return trainer._logger_connector._first_loop_iter is None


def _is_current(result: _ResultMetric) -> bool:
    """Whether a logged result belongs to this epoch and can be saved.

    A result that is reduced over a user-defined process group cannot be saved.
    """
    return not result.has_reset and result.meta.sync.group is None


def _serialize_result(result: _ResultMetric) -> dict[str, Any]:
    """Return a logged result as plain values and tensors."""
    meta, reduce = result.meta, result.meta.reduce_fx
    state = {
        "meta": {name: getattr(meta, name) for name in PLAIN_FIELDS},
        "reduce": reduce.__name__,
        "builtin": reduce in (sum, min, max),
        "sync": [meta.sync.should, meta.sync.rank_zero_only],
        "is_tensor": result.is_tensor,
        "count": result._update_count,
        "newest": _move_tensors(result._forward_cache, "cpu"),
    }
    return state | (
        {"states": _move_tensors(result.metric_state, "cpu")} if result.is_tensor else {}
    )


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
            setattr(result, key, _move_tensors(value, module.device))
    else:
        result.value = module.get_submodule(state["meta"]["metric_attribute"])
    result._update_count = state["count"]
    result._forward_cache = _move_tensors(state["newest"], module.device)
    return result.to(module.device)  # type: ignore[no-any-return]  # returns itself


def _move_tensors(state: Any, device: torch.device | str) -> Any:
    """Return a nested state with its tensors detached and on a device."""
    if isinstance(state, Tensor):
        return state.detach().to(device)
    if isinstance(state, dict):
        return {k: _move_tensors(v, device) for k, v in state.items()}
    return [_move_tensors(v, device) for v in state] if isinstance(state, list) else state
