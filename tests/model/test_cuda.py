"""Training on a GPU: the same interface, without waiting for the device in training steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_training import ToyDataset, fit_model, make_model, model_weights, same_weights

pytestmark = pytest.mark.gpu


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


def test_training_steps_do_not_wait_for_the_device(dataset: ToyDataset, monkeypatch) -> None:
    from qtorch.model.loop.module import ScoreModule

    original_step = ScoreModule.training_step

    def step_without_sync(self, steps) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            original_step(self, steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    model = make_model("MLP", trainer={"accelerator": "auto", "max_epochs": 1})
    model.fit(dataset)  # first allocations and compilations may wait
    monkeypatch.setattr(ScoreModule, "training_step", step_without_sync)
    model.fit(dataset)
