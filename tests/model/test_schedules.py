"""Tests of learning rate schedules: their length, what they wait for, schedules of schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from toy_training import ToyDataset, fit_model, model_weights, same_weights

from qtorch.core.errors import ConfigError
from qtorch.model.loop.schedules import TrainingLength, complete_plan, scheduler_plan

MODULE = "torch.optim.lr_scheduler"
ONE_CYCLE = {"_target_": f"{MODULE}.OneCycleLR", "max_lr": 0.1}
PLATEAU = {"_target_": f"{MODULE}.ReduceLROnPlateau", "patience": 0, "factor": 0.5}
# Each value counts as no improvement.
STRICT_PLATEAU = {**PLATEAU, "threshold": 10.0}


def build_scheduler(spec: Any, length: TrainingLength) -> tuple[Any, str]:
    """Return the scheduler of a training over one weight, and its interval."""
    plan = complete_plan(scheduler_plan(spec), length)
    assert plan is not None
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    return plan.factory(optimizer), plan.interval


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"total_steps": 20},
        {"total_steps": "total_steps"},
        {"epochs": 4, "steps_per_epoch": 5},
        {"epochs": "max_epochs", "steps_per_epoch": "steps_per_epoch"},
    ],
)
def test_one_cycle_counts_optimizer_steps_however_its_length_is_written(arguments) -> None:
    scheduler, interval = build_scheduler({**ONE_CYCLE, **arguments}, TrainingLength(5, 4, -1))
    assert (scheduler.total_steps, interval) == (20, "step")


@pytest.mark.parametrize("arguments", [{"total_steps": 19}, {"epochs": 3, "steps_per_epoch": 5}])
def test_cycle_shorter_than_the_training_is_refused(arguments) -> None:
    with pytest.raises(ConfigError, match=r"OneCycleLR has 1\d steps, but .* up to 20"):
        build_scheduler({**ONE_CYCLE, **arguments}, TrainingLength(5, 4, -1))


@pytest.mark.parametrize(
    ("monitor", "mode"), [(None, "min"), ("loss", "min"), ("rank_ic", "max"), ("valid/ic", "max")]
)
def test_plateau_has_the_mode_of_its_metric(monitor, mode) -> None:
    spec = {"scheduler": PLATEAU} if monitor is None else {"scheduler": PLATEAU, "monitor": monitor}
    assert build_scheduler(spec, TrainingLength(5, 4, -1))[0].mode == mode
    chosen = {**spec, "scheduler": {**PLATEAU, "mode": "min"}}
    assert build_scheduler(chosen, TrainingLength(5, 4, -1))[0].mode == "min"


def test_unknown_metric_of_a_plateau_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'valid_loss'.*valid/loss"):
        scheduler_plan({"scheduler": PLATEAU, "monitor": "valid_loss"})


@pytest.mark.parametrize("is_callable", [False, True])
@pytest.mark.parametrize("has_segment", [False, True])
def test_plateau_without_a_validation_is_refused_before_training(
    dataset: ToyDataset, has_segment: bool, is_callable: bool
) -> None:
    class Fail(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise AssertionError("it trains")

    trainer = {"limit_val_batches": 0} if has_segment else {}
    if not has_segment:
        dataset = ToyDataset()
        del dataset.segments["valid"]
    scheduler: Any = PLATEAU
    if is_callable:
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau
    with pytest.raises(ConfigError, match="no validation"):
        fit_model(dataset, scheduler=scheduler, trainer=trainer, callbacks=[Fail()])
    fit_model(dataset, scheduler={"scheduler": scheduler, "monitor": "train_loss"}, trainer=trainer)


def test_plateau_judges_each_validation_once(dataset: ToyDataset) -> None:
    model = fit_model(
        dataset, epochs=6, scheduler=STRICT_PLATEAU, trainer={"check_val_every_n_epoch": 2}
    )
    # The rates of the epochs; those of 1, 3 and 5 have a validation.
    assert model.evals_result_["train"]["lr"] == pytest.approx(
        [0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025]
    )


@pytest.mark.parametrize("shows_bar", [False, True])
def test_plateau_resumes_after_a_validation_within_an_epoch(
    dataset: ToyDataset, tmp_path: Path, shows_bar: bool
) -> None:
    class Fail(pl.Callback):
        def on_train_batch_start(
            self, trainer: Any, module: Any, batch: Any, batch_idx: int
        ) -> None:
            if (trainer.current_epoch, batch_idx) == (1, 14):
                raise RuntimeError("killed")

    trainer = {"val_check_interval": 6, "enable_progress_bar": shows_bar}
    arguments: dict[str, Any] = {"epochs": 3, "scheduler": STRICT_PLATEAU, "trainer": trainer}
    checkpoint = {"dir": str(tmp_path / "c"), "every_n_steps": 1}
    with pytest.raises(RuntimeError, match="killed"):
        fit_model(dataset, callbacks=[Fail()], checkpoint=checkpoint, **arguments)
    resumed = fit_model(dataset, checkpoint=checkpoint, **arguments)
    whole = fit_model(dataset, **arguments)
    assert resumed.fit_report_["resumed_from"] is not None
    assert whole.evals_result_["train"]["lr"] == pytest.approx([0.01, 0.005, 0.0025])
    assert resumed.evals_result_ == whole.evals_result_
    assert same_weights(model_weights(resumed), model_weights(whole))


def test_schedules_of_schedules_match_torch() -> None:
    warmup = {"_target_": f"{MODULE}.LinearLR", "total_iters": 3}
    cosine = {"_target_": f"{MODULE}.CosineAnnealingLR", "T_max": "total_steps"}
    sequence = {
        "_target_": f"{MODULE}.SequentialLR",
        "schedulers": [warmup, cosine],
        "milestones": [3],
    }
    scheduler, interval = build_scheduler(sequence, TrainingLength(5, 4, -1))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    parts = [
        torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
    ]
    expected = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [3])
    assert interval == "step"
    for _ in range(8):
        assert scheduler.get_last_lr() == expected.get_last_lr()
        scheduler.optimizer.step()
        scheduler.step()
        optimizer.step()
        expected.step()
    chain = {
        "_target_": f"{MODULE}.ChainedScheduler",
        "schedulers": [warmup, {"_target_": f"{MODULE}.ExponentialLR", "gamma": 0.5}],
    }
    scheduler, interval = build_scheduler(chain, TrainingLength(5, 4, -1))
    assert (interval, scheduler.get_last_lr()) == ("epoch", pytest.approx([1 / 3]))
    broken = {**sequence, "milestones": [3, 4]}
    with pytest.raises(ConfigError, match="does not accept"):
        build_scheduler(broken, TrainingLength(5, 4, -1))


def test_a_sequence_of_schedules_resumes_exactly(dataset: ToyDataset, tmp_path: Path) -> None:
    sequence = {
        "_target_": f"{MODULE}.SequentialLR",
        "schedulers": [
            {"_target_": f"{MODULE}.LinearLR", "total_iters": 2},
            {"_target_": f"{MODULE}.ExponentialLR", "gamma": 0.5},
        ],
        "milestones": [2],
    }
    checkpoint = {"dir": str(tmp_path)}
    fit_model(dataset, epochs=3, scheduler=sequence, checkpoint=checkpoint)
    resumed = fit_model(dataset, epochs=5, scheduler=sequence, checkpoint=checkpoint)
    whole = fit_model(dataset, epochs=5, scheduler=sequence)
    assert resumed.fit_report_["resumed_from"] is not None
    assert resumed.evals_result_ == whole.evals_result_
