"""What a user's LightningModule has logged in the running epoch, for an exact continuation.

Lightning keeps it in its trainer and saves none of it: after a stop in mid-epoch an epoch's mean
would be that of the batches still to come.
"""

from __future__ import annotations

import builtins
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultMetric,
    _Sync,
)
from torch import Tensor
from torchmetrics import Metric

PLAIN = (  # of a metric's description, what a checkpoint holds as it is
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


def due(trainer: pl.Trainer) -> list[tuple[dict[str, float], int]]:
    """What Lightning sends to the loggers once the hook at hand has ended, with its step: the
    metrics of a batch whose end it is, or of an epoch."""
    connector, loop = trainer._logger_connector, trainer.fit_loop
    step = loop.epoch_loop._batches_that_stepped
    if _between_epochs(trainer):
        step -= 1
    else:
        waits = trainer.lightning_module.automatic_optimization and loop._should_accumulate()
        if waits or not (connector.should_update_logs or getattr(trainer, "fast_dev_run", False)):
            return []
    values = {k: float(v) for k, v in connector.metrics["log"].items()}
    if not values:
        return []
    step = int(values.pop("step", step))  # Lightning's own name for another step
    return [({"epoch": float(trainer.current_epoch), **values}, step)]


def epoch_state(module: pl.LightningModule) -> dict[str, Any]:
    """Sums, counts and extremes so far, what callbacks see, and the states of the module's
    torchmetrics. At an epoch's end the sums are done with."""
    trainer = module.trainer
    results = {} if _between_epochs(trainer) else trainer.fit_loop.epoch_loop._results
    ended = trainer.fit_loop.epoch_loop._results if not results else {}
    logged = {id(r.value) for r in ended.values() if not r.is_tensor}  # reset with the epoch
    return {
        "results": {k: _of(r) for k, r in results.items() if _is_held(r)},
        "seen": {k: v.detach().cpu() for k, v in trainer.callback_metrics.items()},
        "metrics": {
            name: [_on(m.metric_state, "cpu"), m.update_count]
            for name, m in module.named_modules()
            if isinstance(m, Metric) and id(m) not in logged
        },
    }


def take_up(module: pl.LightningModule, state: dict[str, Any]) -> None:
    """Go on from an `epoch_state`, before the first batch."""
    trainer = module.trainer
    connector, device = trainer._logger_connector, module.device
    for name, (values, count) in state["metrics"].items():
        metric: Any = module.get_submodule(name)
        for key, value in values.items():
            setattr(metric, key, _on(value, device))
        metric._update_count, metric._computed = count, None
    connector._callback_metrics.update(_on(state["seen"], device))
    for key, told in state["results"].items():
        trainer.fit_loop.epoch_loop._results[key] = _restored(module, told)
    if state["results"]:
        connector._first_loop_iter = False  # at a first batch Lightning begins the sums anew


def _between_epochs(trainer: pl.Trainer) -> bool:
    """Whether the epoch's batches are through; in Lightning's words, no batch is at hand."""
    return trainer._logger_connector._first_loop_iter is None


def _is_held(result: _ResultMetric) -> bool:
    """Whether it has a value of this epoch's, and none that is reduced over a group of ranks of
    the user's own, which no checkpoint can name."""
    return not result.has_reset and result.meta.sync.group is None


def _of(result: _ResultMetric) -> dict[str, Any]:
    """A result in plain values and tensors."""
    meta, reduce = result.meta, result.meta.reduce_fx
    found = {
        "meta": {name: getattr(meta, name) for name in PLAIN},
        "reduce": reduce.__name__,
        "builtin": reduce in (sum, min, max),
        "sync": [meta.sync.should, meta.sync.rank_zero_only],
        "is_tensor": result.is_tensor,
        "count": result._update_count,
        "newest": _on(result._forward_cache, "cpu"),
    }
    return found | ({"states": _on(result.metric_state, "cpu")} if result.is_tensor else {})


def _restored(module: pl.LightningModule, told: dict[str, Any]) -> _ResultMetric:
    """The result again, described as the module's next call of `log` will describe it."""
    source: Any = builtins if told["builtin"] else torch
    meta = _Metadata(**told["meta"], reduce_fx=getattr(source, told["reduce"]))
    should, first_only = told["sync"]
    reduce = module.trainer.strategy.reduce
    meta.sync = _Sync(fn=reduce, _should=should, rank_zero_only=first_only)
    result: Any = _ResultMetric(meta, told["is_tensor"])
    if told["is_tensor"]:
        for key, value in told["states"].items():
            setattr(result, key, _on(value, module.device))
    else:
        result.value = module.get_submodule(told["meta"]["metric_attribute"])
    result._update_count = told["count"]
    result._forward_cache = _on(told["newest"], module.device)
    return result.to(module.device)  # type: ignore[no-any-return]  # itself


def _on(state: Any, device: torch.device | str) -> Any:
    """Nested state with its tensors on a device, let go of their graphs."""
    if isinstance(state, Tensor):
        return state.detach().to(device)
    if isinstance(state, dict):
        return {k: _on(v, device) for k, v in state.items()}
    return [_on(v, device) for v in state] if isinstance(state, list) else state
