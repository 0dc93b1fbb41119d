"""The small parts of a training, each on its own."""

# ruff: noqa: NPY002 - the global generator is under test

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import MLFlowLogger
from toy_training import ToyDataset, ToyRecorder, resumable_model

from qtorch import R
from qtorch.core.errors import ConfigError
from qtorch.data.dataset.batches import BatchLoader
from qtorch.model.loop.checkpoint import (
    CALLBACK_STATE_KEY,
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    CheckpointError,
    get_generator_states,
    newest_checkpoint,
    preserve_generators,
    read_checkpoint,
    restore_generators,
    save_and_rotate,
)
from qtorch.model.loop.factories import (
    build_loss,
    explain_errors,
    optimizer_factory,
)
from qtorch.model.loop.loader import StepLoader, unpack_batches
from qtorch.model.loop.loggers import RecorderLogger
from qtorch.model.loop.options import (
    build_early_stopping,
    check_monitor,
    limit_batches,
    resolve_monitor,
    trainer_options,
)
from qtorch.model.loop.progress import FitProgress, LossAccumulator, mean_losses
from qtorch.model.loop.schedules import scheduler_plan
from qtorch.tracking.mlflow_store import open_store


def _draws() -> list[float]:
    numbers = [torch.rand(()).item(), random.random(), random.gauss(0, 1)]
    return [*numbers, np.random.rand(), np.random.randn()]


def test_generators_continue_from_restored_states(tmp_path: Path) -> None:
    random.gauss(0, 1)
    np.random.randn()
    torch.save(get_generator_states(), tmp_path / "states.pt")
    expected = _draws()
    restore_generators(torch.load(tmp_path / "states.pt", weights_only=True))
    assert _draws() == expected


def test_generators_are_restored_after_the_block() -> None:
    states = get_generator_states()
    with preserve_generators():
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        _draws()
    numbers = _draws()
    restore_generators(states)
    assert _draws() == numbers


def _loader(**options) -> StepLoader:
    samples = ToyDataset(num_days=10).samples("train", data_key="learn")
    return StepLoader(BatchLoader(samples, batch_size=10, seed=1), lambda: 0, **options)


def _rows(loader: StepLoader) -> list[list[torch.Tensor]]:
    return [[b.instrument + 1000 * b.date for b in unpack_batches(steps)] for steps in loader]


def flatten(parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [batch for part in parts for batch in part]


def test_steps_contain_the_epoch_batches_in_order() -> None:
    single = flatten(_rows(_loader()))
    for inner_steps, cut in ((4, None), (100, None), (4, 3)):
        loader = _loader(inner_steps=inner_steps, cut_every=cut)
        parts = _rows(loader)
        assert len(parts) == len(loader)
        assert all(torch.equal(a, b) for a, b in zip(flatten(parts), single, strict=True))
    ends = np.cumsum([len(part) for part in _rows(_loader(inner_steps=4, cut_every=3))])
    assert set(range(3, len(single), 3)) <= set(ends)


def test_epoch_resumes_in_the_middle_of_a_step() -> None:
    expected = flatten(_rows(_loader()))
    loader = _loader(inner_steps=4)
    # The first step of four batches, and two batches of the second step.
    unfinished_epoch = (batch for steps in loader for batch in steps)
    batches = [b.instrument + 1000 * b.date for b in islice(unfinished_epoch, 6)]
    resumed_loader = _loader(inner_steps=4)
    resumed_loader.load_state_dict(loader.state_dict())
    parts = _rows(resumed_loader)
    assert len(parts) == len(loader) - 2  # Lightning has counted the unfinished step
    batches += flatten(parts)
    assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))
    assert len(_rows(resumed_loader)) == len(loader)  # the next epoch is whole


def test_loss_accumulator_is_a_weighted_mean_in_float64() -> None:
    accumulator = LossAccumulator()
    for _ in range(1000):
        accumulator.add(torch.tensor(0.1) * 3, 3)
        accumulator.add(torch.tensor(0.0), torch.tensor(1.0))
    assert mean_losses(accumulator.sums()) == [pytest.approx(0.1 * 3 / 4, rel=1e-7)]
    second_accumulator = LossAccumulator()
    second_accumulator.load(accumulator.state(), torch.device("cpu"))
    assert torch.equal(second_accumulator.sums(), accumulator.sums())


def test_loss_accumulator_keeps_members_apart() -> None:
    members = LossAccumulator((3,))
    for _ in range(2):
        members.add(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([1.0, 2.0, 1.0]))
        members.add(torch.tensor([3.0, 0.0, 1.0]), 1)
    assert mean_losses(members.sums())[:2] == [2.0, pytest.approx(2 / 3)]
    assert len(members.epoch_metrics) == 3
    second = LossAccumulator((3,))
    second.load(members.state(), torch.device("cpu"))
    assert torch.equal(second.sums()[:, :2], members.sums()[:, :2])


def test_progress_keeps_the_best_epoch_of_each_member() -> None:
    first, second = FitProgress(), FitProgress(history=[{"valid/loss": 1.0}], best_value=0.5)
    assert first.is_improvement(3.0, "min")
    assert not first.is_improvement(float("nan"), "min")
    assert second.is_improvement(0.4, "min")
    assert not second.is_improvement(0.4, "max")
    states = [m.state_dict() for m in (first, second)]
    assert [m.state_dict()["history"] for m in FitProgress.from_states(states)] == [
        [],
        [{"valid/loss": 1.0}],
    ]


def test_checkpoints_rotate_and_damaged_ones_are_skipped(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    for number in range(3):
        content = {CALLBACK_STATE_KEY: {"number": number}}
        save_and_rotate(lambda path, c=content: io.save_checkpoint(c, path), tmp_path)
    assert read_checkpoint(tmp_path / LAST)[CALLBACK_STATE_KEY]["number"] == 2
    assert read_checkpoint(tmp_path / PREVIOUS)[CALLBACK_STATE_KEY]["number"] == 1
    (tmp_path / LAST).write_bytes(b"nothing")
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint[0].name == PREVIOUS
    (tmp_path / LAST).unlink()  # a crash between the two renames
    assert newest_checkpoint(tmp_path) is not None
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint written by qtorch"):
        read_checkpoint(tmp_path / "other.ckpt")


def test_recorder_logger_sends_metrics_and_ends_nothing(recorder: ToyRecorder) -> None:
    logger = RecorderLogger(recorder)  # type: ignore[arg-type]
    logger.log_metrics({"a": torch.tensor(1.5), "epoch": 3}, step=7)
    logger.log_metrics({"epoch": 3}, step=8)
    logger.finalize("success")
    assert recorder.points == [("a", 7, 1.5)]
    assert not hasattr(recorder, "end_run")


def test_monitors_and_limits() -> None:
    assert resolve_monitor("loss") == ("valid/loss", "min")
    assert resolve_monitor("rank_ic") == ("valid/rank_ic", "max")
    assert resolve_monitor("val_rmse") == ("val_rmse", "min")
    assert build_early_stopping(None, "ic")[1:] == ("valid/ic", "max")
    callback, name, mode = build_early_stopping({"patience": 4, "monitor": "ic"}, "loss")
    assert callback is not None
    assert (callback.patience, name, mode) == (4, "valid/ic", "max")
    assert [limit_batches(10, limit) for limit in (None, 3, 30, 0.5, 1.0)] == [10, 3, 10, 5, 10]
    options = trainer_options({"max_epochs": 3, "gradient_clip_val": 2}, ())
    assert options.arguments == {"max_epochs": 3}
    assert options.clip_value == 2.0


def test_unknown_monitor_suggests_the_nearest_name() -> None:
    check_monitor("valid/ic")
    check_monitor("train/loss")
    with pytest.raises(ConfigError, match=r"metric to monitor 'icc'. Did you mean 'ic'"):
        check_monitor("icc")


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_epochs", "abc"), ("max_epochs", 2.5), ("gradient_clip_val", "x"), ("max_steps", True)],
)
def test_non_numeric_trainer_arguments_are_refused(name, value) -> None:
    with pytest.raises(
        ConfigError, match=rf"trainer\.{name} is .*; expected (a number|an integer)"
    ):
        trainer_options({name: value}, ())


def test_optimizer_errors_show_the_arguments() -> None:
    factory = explain_errors(optimizer_factory({"_target_": "torch.optim.SGD", "lr": "abc"}))
    with pytest.raises(ConfigError, match=r"the optimizer SGD does not accept {'lr': 'abc'}"):
        factory([torch.nn.Parameter(torch.zeros(1))])


def test_factories() -> None:
    parameter = [torch.nn.Parameter(torch.zeros(1))]
    for spec, rate in (
        (None, 1e-3),
        ("sgd", 1e-3),
        ({"_target_": "torch.optim.AdamW", "lr": 0.5}, 0.5),
        (lambda p: torch.optim.Adam(p, lr=0.25), 0.25),
    ):
        assert optimizer_factory(spec)(parameter).param_groups[0]["lr"] == rate
    plan = scheduler_plan({"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 2})
    assert plan is not None
    assert plan.factory(optimizer_factory(None)(parameter)).step_size == 2
    assert build_loss({"_target_": "qtorch.metrics.loss.Huber", "delta": 2.0}).delta == 2.0
    with pytest.raises(ConfigError):
        optimizer_factory(3)
    with pytest.raises(ConfigError, match="interval"):
        scheduler_plan({"scheduler": lambda o: None, "interval": "day"})


@pytest.mark.slow
def test_mlflow_logger_of_lightning_starts_no_second_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    logger_config = {"_target_": "pytorch_lightning.loggers.MLFlowLogger"}
    with R.uri_context(uri):
        with R.start(experiment_name="other"):
            other_run_id = R.get_recorder().id
        with R.start(experiment_name="one"):
            run = R.get_recorder()
            other_run_logger = MLFlowLogger(run_id=other_run_id, tracking_uri=uri)
            loggers = [logger_config, MLFlowLogger("one", tracking_uri=uri), other_run_logger]
            trainer = {"max_epochs": 2, "accelerator": "cpu", "logger": loggers}
            resumable_model(trainer=trainer).fit(ToyDataset(), recorder=run)
            assert R.get_recorder(recorder_id=run.id).status == "RUNNING"
        other_run = R.get_recorder(recorder_id=other_run_id)
        assert set(R.list_experiments()) == {"Default", "one", "other"}
        assert set(R.list_recorders(experiment_name="one")) == {run.id}
    points = open_store(uri).client.get_metric_history(run.id, "valid/loss")
    assert [p.step for p in points] == [0, 1]
    assert set(other_run.metric_history("valid/loss")) == {0, 1}  # the user asked for this run
