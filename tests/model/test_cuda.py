"""Training on a GPU: the same interface, nothing read back on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_training import model_of, same, state_of
from toy_training import ToyDataset

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_fit_and_predict(dataset: ToyDataset, precision: str) -> None:
    trainer = {"accelerator": "auto", "precision": precision, "gradient_clip_val": 1.0}
    model = model_of("LSTM", trainer={**trainer, "max_epochs": 5})
    model.fit(dataset)
    assert model.fit_report_["device"].startswith("cuda")
    losses = model.evals_result_["train"]["loss"]
    assert losses[-1] < losses[0]
    assert next(model.network_.parameters()).device.type == "cpu"
    on_gpu = model.predict(dataset)
    model.trainer["accelerator"] = "cpu"
    np.testing.assert_allclose(on_gpu, model.predict(dataset), rtol=1e-3, atol=1e-3)


def test_inner_steps_do_not_change_a_bit(dataset: ToyDataset) -> None:
    fits = []
    for inner_steps in (1, 8):
        model = model_of("MLP", trainer={"accelerator": "auto"}, inner_steps=inner_steps)
        model.fit(dataset)
        fits.append(model)
    assert same(state_of(fits[0]), state_of(fits[1]))
    assert fits[0].evals_result_ == fits[1].evals_result_


def test_steps_do_not_wait_for_the_device(dataset: ToyDataset, monkeypatch) -> None:
    from qtorch.model.module import ScoreModule

    step = ScoreModule.training_step

    def watched(self, steps) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(self, steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    model = model_of("MLP", trainer={"accelerator": "auto", "max_epochs": 1})
    model.fit(dataset)  # what is allocated or compiled once
    monkeypatch.setattr(ScoreModule, "training_step", watched)
    model.fit(dataset)
