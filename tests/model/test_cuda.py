"""Training on a GPU: the same interface, without waiting for the device in training steps."""

from __future__ import annotations

import functools
import gc
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from toy_training import (
    ADAM,
    NUM_FEATURES,
    ToyDataset,
    fit_model,
    fit_with_and_without_stop,
    model_weights,
    resumable_model,
    same_weights,
)
from user_networks import UserModule

from qtorch.data.dataset.reweighter import TimeDecay
from qtorch.metrics.loss import LOSSES
from qtorch.model.loop.module import ScoreModule

pytestmark = pytest.mark.gpu

GPU = {"accelerator": "gpu"}
LSTM = {"_target_": "qtorch.nn.LSTM", "hidden_size": 8, "num_layers": 2}
DAYS = {"order": "day", "days_per_batch": 2}


@contextmanager
def no_waits():
    """Let torch raise where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def without_waits(step: Any) -> Any:
    @functools.wraps(step)  # Lightning looks at the names of the arguments
    def guarding_step(self: Any, batches: Any) -> Any:
        with no_waits():
            return step(self, batches)

    return guarding_step


@pytest.fixture
def no_waits_in_steps(monkeypatch) -> None:
    """Let training and validation steps fail if they wait for the device."""
    for name in ("training_step", "validation_step"):
        monkeypatch.setattr(ScoreModule, name, without_waits(getattr(ScoreModule, name)))


class DatasetWithoutSomeLabels(ToyDataset):
    """A dataset that misses the labels of the first instruments."""

    def samples(self, segment: Any, **options: Any) -> Any:
        samples = super().samples(segment, **options)
        samples.target = samples.target.clone()
        samples.target[samples.instrument < 2] = torch.nan
        return samples


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_fit_and_predict_on_gpu(dataset: ToyDataset, precision: str) -> None:
    trainer = {"accelerator": "auto", "precision": precision, "gradient_clip_val": 1.0}
    model = fit_model(dataset, "LSTM", trainer={**trainer, "max_epochs": 5})
    assert model.fit_report_["device"].startswith("cuda")
    losses = model.evals_result_["train"]["loss"]
    assert losses[-1] < losses[0]
    assert next(model.network_.parameters()).device.type == "cpu"
    gpu_scores = model.predict(dataset)
    model.trainer["accelerator"] = "cpu"
    np.testing.assert_allclose(gpu_scores, model.predict(dataset), rtol=1e-3, atol=1e-3)


def test_inner_steps_give_bit_identical_results_on_gpu(dataset: ToyDataset) -> None:
    fits = []
    for inner_steps in (1, 8):
        model = fit_model(dataset, "MLP", trainer={"accelerator": "auto"}, inner_steps=inner_steps)
        fits.append(model)
    assert same_weights(model_weights(fits[0]), model_weights(fits[1]))
    assert fits[0].evals_result_ == fits[1].evals_result_


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_steps_do_not_wait_for_the_device(dataset, precision, no_waits_in_steps) -> None:
    trainer = {**GPU, "precision": precision, "gradient_clip_val": 1.0}
    for batch in ({"size": 64}, DAYS):
        model = fit_model(dataset, LSTM, trainer=trainer, batch=batch)
        assert model.fit_report_["device"].startswith("cuda")
        losses = model.evals_result_["train"]["loss"]
        assert losses[-1] < losses[0]


def test_optimizers_are_fused_unless_the_user_has_chosen(dataset: ToyDataset) -> None:
    for changes, is_fused in (({}, True), ({"foreach": True}, None), ({"fused": False}, False)):
        model = fit_model(dataset, "MLP", trainer=GPU, optimizer={**ADAM, **changes}, epochs=1)
        assert model.optimizer_state_["param_groups"][0]["fused"] is is_fused


@pytest.mark.parametrize(
    "network",
    [LSTM, {"_target_": "qtorch.nn.GATs", "hidden_size": 8}],
    ids=["windows", "day batches"],
)
def test_features_in_host_memory_give_the_same_weights(network, monkeypatch) -> None:
    changes = {"trainer": {**GPU, "deterministic": True}, "batch": DAYS, "epochs": 1}
    expected = fit_model(ToyDataset(), network, **changes)
    monkeypatch.setattr("qtorch.data.dataset.samples.free_bytes", lambda device: 1)
    model = fit_model(ToyDataset(), network, **changes)
    assert [m.fit_report_["store"] for m in (expected, model)] == ["device", "host"]
    assert same_weights(model_weights(model), model_weights(expected))
    np.testing.assert_array_equal(model.predict(ToyDataset()), expected.predict(ToyDataset()))


@pytest.mark.parametrize(
    "trainer",
    [
        {},
        {"precision": "16-mixed"},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 3},
    ],
    ids=["32-true", "16-mixed", "bf16-mixed"],
)
def test_resumed_training_is_bit_identical(dataset, trainer, tmp_path, monkeypatch) -> None:
    settings = {**GPU, "max_epochs": 2, "enable_progress_bar": False, "deterministic": True}
    models = [resumable_model(trainer={**settings, **trainer}) for _ in range(3)]
    recorders = fit_with_and_without_stop(models[:2], dataset, tmp_path, monkeypatch)
    models[2].fit(dataset, recorder=recorders[1])
    assert models[2].fit_report_["resumed_from"]
    assert same_weights(model_weights(models[2]), model_weights(models[0]))
    assert models[2].evals_result_ == models[0].evals_result_


def test_the_same_training_twice_is_bit_identical() -> None:
    trainer = {**GPU, "deterministic": True}
    models = [fit_model(ToyDataset(), LSTM, trainer=trainer) for _ in range(2)]
    assert same_weights(*map(model_weights, models))
    assert models[0].evals_result_ == models[1].evals_result_
    assert models[0].fit_report_["deterministic"]


def test_a_fit_leaves_nothing_on_the_device(dataset: ToyDataset) -> None:
    model = fit_model(ToyDataset(), LSTM, trainer=GPU, epochs=1)  # what torch keeps for itself
    model.predict(dataset)
    gc.collect()
    gc.disable()  # reference counts alone must free the memory
    try:
        before = torch.cuda.memory_allocated()
        for _ in range(4):
            model = fit_model(ToyDataset(), LSTM, trainer=GPU, epochs=1)
            model.predict(dataset)
            assert torch.cuda.memory_allocated() <= before
    finally:
        gc.enable()
    states = model.optimizer_state_["state"].values()
    assert {v.device.type for state in states for v in state.values()} == {"cpu"}


@pytest.mark.parametrize(
    "method",
    [
        {"lora": {"rank": 2}},
        {"train": "head"},
        {"unfreeze_every": 1},
        {"layer_decay": 0.5},
        {"keep_optimizer": True},
    ],
    ids=lambda method: next(iter(method)),
)
def test_all_forms_of_fine_tuning(dataset: ToyDataset, method, no_waits_in_steps) -> None:
    model = fit_model(dataset, LSTM, trainer=GPU, epochs=1)
    before = {k: v.clone() for k, v in model_weights(model).items()}
    model.finetune(dataset, max_epochs=2, **method)
    assert model.fit_report_["device"].startswith("cuda")
    assert not same_weights(before, model_weights(model))
    assert model.predict(dataset).notna().all()


@pytest.mark.parametrize(
    "loss", [*LOSSES, {"mse": 1.0, "ic": 0.5}], ids=lambda x: x if isinstance(x, str) else "sum"
)
def test_all_losses(loss, no_waits_in_steps) -> None:
    dataset = DatasetWithoutSomeLabels()
    model = fit_model(dataset, "MLP", loss=loss, batch=DAYS, trainer=GPU, epochs=1)
    assert model.fit_report_["device"].startswith("cuda")
    assert model.predict(dataset).notna().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {**ADAM, "foreach": True}},
        {"optimizer": {**ADAM, "capturable": True}},
        {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.01, "momentum": 0.9}},
        {"optimizer": "adamw"},
        {"scheduler": {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1}},
        {"scheduler": {"scheduler": {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau"}}},
        {
            "scheduler": {
                "scheduler": {
                    "_target_": "torch.optim.lr_scheduler.OneCycleLR",
                    "max_lr": 0.01,
                    "total_steps": 200,
                },
                "interval": "step",
            }
        },
    ],
    ids=["foreach", "capturable", "SGD", "AdamW", "StepLR", "plateau", "OneCycleLR"],
)
def test_optimizers_and_schedulers(dataset: ToyDataset, changes, no_waits_in_steps) -> None:
    model = fit_model(dataset, "MLP", trainer={**GPU, "gradient_clip_val": 1.0}, **changes)
    losses = model.evals_result_["train"]["loss"]
    assert losses[-1] < losses[0]


def test_weights_of_a_reweighter(no_waits_in_steps) -> None:
    dataset = DatasetWithoutSomeLabels()
    model = fit_model(dataset, "MLP", reweighter=TimeDecay(20), trainer=GPU)
    assert model.fit_report_["device"].startswith("cuda")


def test_lightning_module_of_a_user(dataset: ToyDataset) -> None:
    model = fit_model(
        dataset, UserModule(NUM_FEATURES), monitor="own_valid_loss", trainer=GPU, epochs=1
    )
    assert model.fit_report_["device"].startswith("cuda")
    assert model.predict(dataset).notna().all()
