"""The parts of Lightning that qtorch uses although they are private are where it expects them."""

from __future__ import annotations

import gc
import inspect
import re
import tomllib
import weakref
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import MLFlowLogger
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultMetric,
    _Sync,
)

from qtorch.model.loop import lightning_internals

ROOT = Path(__file__).parents[2]
TESTED_SERIES = "2.6"


def test_pyproject_allows_the_tested_series_only() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = [d for d in project["dependencies"] if d.startswith("pytorch-lightning")]
    assert requirement == "pytorch-lightning>=2.6,<2.7"
    assert pl.__version__.startswith(f"{TESTED_SERIES}.")
    assert f"allows {TESTED_SERIES} only" in (lightning_internals.__doc__ or "")


def test_training_loop_has_the_private_parts() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    assert list(inspect.signature(epoch_loop._broadcast_sigterm_tensor).parameters) == []
    assert list(inspect.signature(epoch_loop._should_check_val_fx).parameters) == ["data_fetcher"]
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop.advance)
    assert "_should_check_val_fx(" in inspect.getsource(_TrainingEpochLoop.on_advance_end)
    assert hasattr(loop, "_data_fetcher")
    assert loop._can_stop_early is True
    assert loop._iteration_based_training() is False
    assert epoch_loop._batches_that_stepped == 0
    assert epoch_loop._should_accumulate() in (True, False)
    lightning_internals.count_optimizer_step(trainer)
    assert epoch_loop.manual_optimization.optim_step_progress.total.completed == 1
    assert ModelParallelStrategy()._data_parallel_size == "auto"


def test_trainer_and_module_can_be_separated() -> None:
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[pl.Callback()],
    )  # fmt: skip
    module = BoringModel()
    trainer.fit(module, torch.zeros(2, 32), torch.zeros(2, 32))
    reference = weakref.ref(module)
    gc.collect()
    gc.disable()
    try:
        lightning_internals.detach_module(trainer, module)
        assert module._trainer is None
        del module
        assert reference() is None, gc.get_referrers(reference())
    finally:
        gc.enable()


def test_logging_has_the_private_parts(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    connector = trainer._logger_connector
    assert connector._first_loop_iter is None
    assert connector.should_update_logs in (True, False)
    assert trainer.callback_metrics is trainer.callback_metrics  # restored in place
    assert lightning_internals.current_batch(trainer) is None
    for name in lightning_internals.PLAIN_FIELDS:
        assert name in inspect.signature(_Metadata).parameters
    assert {"fn", "_should", "rank_zero_only"} <= set(inspect.signature(_Sync).parameters)
    result = _ResultMetric(_Metadata(fx="training_step", name="loss"), is_tensor=True)
    assert result.has_reset is False
    assert result._update_count == 0
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    logger = MLFlowLogger(run_id="run", tracking_uri=uri)
    assert lightning_internals.mlflow_target(logger) == ("run", uri)


def test_no_other_module_uses_a_private_part() -> None:
    pattern = re.compile(r"(trainer|loop|strategy|logger|connector|module)\._[a-z]|import _[A-Z]")
    wrong = [
        f"{path.name}:{number}: {line.strip()}"
        for path in (ROOT / "qtorch" / "model").rglob("*.py")
        if path.name != "lightning_internals.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line) and "self._" not in line and "_BatchNorm" not in line
    ]
    assert not wrong, wrong
