"""The training step as a CUDA graph: the same numbers, or ordinary steps for a reason."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_training import (
    ADAM,
    NUM_FEATURES,
    ToyDataset,
    fit_model,
    fit_with_and_without_stop,
    make_model,
    model_weights,
    resumable_model,
    same_weights,
)
from user_networks import UserModule

from qtorch.core.errors import ConfigError
from qtorch.model import fit_fleet
from qtorch.model.devices.step_graph import StepGraph
from qtorch.nn import MLP

pytestmark = pytest.mark.gpu

GPU = {"accelerator": "gpu", "deterministic": True}
LSTM = {"_target_": "qtorch.nn.LSTM", "hidden_size": 8, "num_layers": 2, "dropout": 0.3}
TRANSFORMER = {"_target_": "qtorch.nn.Transformer", "d_model": 8, "nhead": 2, "dropout": 0.2}
STEP_LR = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1, "gamma": 0.5}
SGD = {"_target_": "torch.optim.SGD", "lr": 0.01, "momentum": 0.9}


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """The number of samples of each batch that a graph has trained on, two of them to check it."""
    sizes: list[int] = []
    run = StepGraph.run

    def counting_run(self: StepGraph, batch: Any) -> Any:
        sums = run(self, batch)
        if sums is not None:
            sizes.append(len(batch.date))
        return sums

    monkeypatch.setattr(StepGraph, "run", counting_run)
    return sizes


def fit(network: Any, cuda_graph: Any, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"trainer": GPU, "epochs": 3, "batch": {"size": 200}, **changes}
    return fit_model(ToyDataset(), network, cuda_graph=cuda_graph, **arguments)


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        ("MLP", {"trainer": {**GPU, "gradient_clip_val": 1.0}, "scheduler": STEP_LR}),
        (LSTM, {"inner_steps": 4, "optimizer": SGD}),
        (TRANSFORMER, {"loss": {"mse": 1.0, "mae": 0.5}}),
    ],
    ids=["clipping and epoch scheduler", "inner steps and SGD", "dropout and two losses"],
)
def test_a_graph_trains_to_the_weights_of_ordinary_steps(
    network: Any, changes: dict[str, Any], replays: list[int]
) -> None:
    model, ordinary_model = fit(network, True, **changes), fit(network, False, **changes)
    assert model.fit_report_["cuda_graph"] == "used"
    assert ordinary_model.fit_report_["cuda_graph"] == "off"
    num_full_batches = model.fit_report_["samples"] // 200
    assert replays == [200] * (2 + 3 * num_full_batches)
    weights, ordinary_weights = map(model_weights, (model, ordinary_model))
    torch.testing.assert_close(weights, ordinary_weights)
    losses, ordinary_losses = (m.evals_result_["train"]["loss"] for m in (model, ordinary_model))
    assert losses == pytest.approx(ordinary_losses, rel=1e-5)


def test_a_resumed_training_with_a_graph_is_bit_identical(tmp_path, monkeypatch, replays) -> None:
    dataset = ToyDataset()
    trainer = {**GPU, "max_epochs": 2, "enable_progress_bar": False}
    models = [
        resumable_model(trainer=trainer, scheduler=STEP_LR, cuda_graph="auto") for _ in range(3)
    ]
    recorders = fit_with_and_without_stop(models[:2], dataset, tmp_path, monkeypatch)
    before = len(replays)
    models[2].fit(dataset, recorder=recorders[1])
    assert models[2].fit_report_["resumed_from"]
    assert models[2].fit_report_["cuda_graph"] == "used"
    assert len(replays) > before
    assert same_weights(model_weights(models[2]), model_weights(models[0]))
    assert models[2].evals_result_ == models[0].evals_result_


class Bias(torch.nn.Linear):
    """A user's own network."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, -1])[:, 0]


REASONS: dict[str, dict[str, Any]] = {
    "batches of whole days differ in size": {"batch": {"order": "day"}},
    "mixed precision": {"trainer": {**GPU, "precision": "bf16-mixed"}},
    "accumulate_grad_batches": {"trainer": {**GPU, "accumulate_grad_batches": 2}},
    "callbacks": {"callbacks": [{"_target_": "pytorch_lightning.callbacks.Timer"}]},
    "the learning rate changes in each step": {
        "scheduler": {"scheduler": STEP_LR, "interval": "step"}
    },
    "the optimizer Adam is no fused Adam, AdamW or SGD": {"optimizer": {**ADAM, "foreach": True}},
    "the first step with dampening differs from the others": {
        "optimizer": {**SGD, "dampening": 0.1}
    },
    "hooks between backward and optimizer step": {"trainer": {**GPU, "profiler": "simple"}},
    "Bias is not a network of qtorch": {"network": Bias(4, 1)},
    "MSELoss is not a loss of qtorch": {"loss": torch.nn.MSELoss()},
    "UserModule has a training step of its own": {
        "network": UserModule(NUM_FEATURES),
        "monitor": "own_valid_loss",
    },
}


@pytest.mark.parametrize("reason", REASONS)
def test_other_trainings_have_ordinary_steps_for_a_reason(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"network": "MLP", "epochs": 1, **REASONS[reason]}
    caplog.set_level("INFO")
    model = fit(changes.pop("network"), "auto", **changes)
    assert model.fit_report_["cuda_graph"] == f"not used: {reason}"
    assert f"no CUDA graph of the training step: {reason}" in caplog.messages


def test_a_member_of_a_fleet_has_a_graph_only_by_itself(replays: list[int]) -> None:
    models = [make_model(LSTM, seed=seed, trainer=GPU, epochs=1) for seed in (1, 2)]
    models.append(make_model(LSTM, trainer=GPU, epochs=1, cuda_graph=True))
    fit_fleet(models, ToyDataset())
    assert replays
    assert models[2].fit_report_["cuda_graph"] == "used"
    assert [m.fit_report_.get("fleet_members") for m in models] == [2, 2, None]


def test_a_network_of_the_user_has_a_graph_if_they_ask_for_it(replays: list[int]) -> None:
    assert fit(Bias(4, 1), True).fit_report_["cuda_graph"] == "used"
    assert replays


def read_on_host(self: MLP, x: Tensor) -> Tensor:
    return original_forward(self, x) * float(x[0, 0] < 100)


def count_on_host(self: MLP, x: Tensor) -> Tensor:
    if self.training:
        self.num_calls = getattr(self, "num_calls", 0) + 1
    return original_forward(self, x) * (1 + 0.001 * getattr(self, "num_calls", 0))


original_forward = MLP.forward


@pytest.mark.parametrize(
    ("forward", "message"),
    [(read_on_host, "captur"), (count_on_host, "its replay differs from ordinary steps by")],
)
def test_a_step_that_needs_the_host_falls_back_from_the_state_before(
    forward: Any, message: str, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(MLP, "forward", forward)
    caplog.set_level("INFO")
    network = {"_target_": "qtorch.nn.MLP", "dropout": 0.2}
    model = fit(network, "auto", epochs=1)
    assert message in model.fit_report_["cuda_graph"]
    assert any(message in text for text in caplog.messages)
    if forward is read_on_host:
        ordinary_model = fit(network, False, epochs=1)
        assert same_weights(model_weights(model), model_weights(ordinary_model))
    with pytest.raises(ConfigError, match="cuda_graph=true is not possible"):
        fit(network, True, epochs=1)


def test_a_graph_that_cannot_be_recorded_again_ends_with_ordinary_steps(monkeypatch) -> None:
    record = StepGraph._capture

    def capture_once(self: StepGraph) -> None:
        if hasattr(self, "_graph"):
            raise RuntimeError("out of memory")
        record(self)

    monkeypatch.setattr(StepGraph, "_capture", capture_once)
    model, ordinary_model = (fit("MLP", mode, scheduler=STEP_LR) for mode in ("auto", False))
    assert model.fit_report_["cuda_graph"] == "not used: RuntimeError: out of memory"
    torch.testing.assert_close(*map(model_weights, (model, ordinary_model)))


def test_graphs_leave_nothing_on_the_device() -> None:
    fit(LSTM, "auto", epochs=1)  # what torch keeps for itself
    gc.collect()
    gc.disable()  # reference counts alone must free the memory
    try:
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            fit(LSTM, "auto", epochs=1)
            assert torch.cuda.memory_allocated() <= before
    finally:
        gc.enable()
