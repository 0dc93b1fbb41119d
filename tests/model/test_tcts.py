"""The two levels of TCTS: how a label's gain is computed, and that the task weights learn it."""

from __future__ import annotations

import pytest
import torch
from test_own_steps import fit_method_model, make_method_model
from torch import Tensor
from toy_training import ToyDataset

from qtorch.core.errors import ConfigError
from qtorch.metrics.loss import MSE
from qtorch.model.methods.tcts import TCTSModule
from qtorch.nn.temporal.tcts import TCTS, TaskWeights


@pytest.fixture(scope="module")
def horizons() -> ToyDataset:
    return ToyDataset(num_labels=3)


def make_module(data: ToyDataset) -> TCTSModule:
    torch.manual_seed(0)
    network = TCTS(d_feat=4, hidden_size=6, num_layers=1, dropout=0.0, num_outputs=3)
    module = TCTSModule(network, MSE(), torch.optim.Adam)
    module.bind(data.samples("train", data_key="learn"), data.samples("valid", data_key="learn"))
    return module


def test_loss_slopes_along_the_valid_gradient(horizons: ToyDataset) -> None:
    module = make_module(horizons)
    batch = horizons.samples("train", data_key="learn").batch(torch.arange(5))
    valid_batch = horizons.samples("valid", data_key="learn").batch(torch.arange(40))
    batch.y[1, 2] = torch.nan
    parameters = module.trainable_parameters()
    assert sum(p.numel() for p in parameters) == sum(p.numel() for p in module.network.parameters())
    old_values = [p.clone() for p in parameters]
    total, weight, _ = module.loss_sums(valid_batch)
    valid_gradient = torch.autograd.grad(total / weight, parameters)
    slopes, score = module._loss_slopes(batch, parameters, valid_gradient)
    assert all(torch.equal(a, b) for a, b in zip(old_values, parameters, strict=True))
    norm = torch.cat([s.flatten() for s in valid_gradient]).norm()
    losses = module._task_losses(batch, module.forward_adapter(batch))
    torch.testing.assert_close(score, module.forward_adapter(batch))
    for sample in range(5):
        for task in range(3):
            gradient = torch.autograd.grad(losses[sample, task], parameters, retain_graph=True)
            expected = (
                sum((a * b).sum() for a, b in zip(gradient, valid_gradient, strict=True)) / norm
            )
            torch.testing.assert_close(slopes[sample, task], expected, rtol=1e-2, atol=1e-4)
    assert slopes[1, 2] == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_labels_that_oppose_the_main_task_get_little_weight(
    horizons: ToyDataset, monkeypatch, mode: str
) -> None:
    modules, original_bind = [], TCTSModule.bind

    def record_module(self, train, valid) -> None:
        modules.append(self)
        original_bind(self, train, valid)

    monkeypatch.setattr(TCTSModule, "bind", record_module)
    model = fit_method_model(
        horizons,
        "TCTS",
        module={"steps": 1, "weight_lr": 0.02, "mode": mode},
        epochs=6,
        batch={"size": 100},
    )
    (module,) = modules
    batch = horizons.samples("train", data_key="learn").batch(torch.arange(900))
    with torch.no_grad():
        mean_weights = module._task_weights(batch, module.forward_adapter(batch)).mean(0)
    assert mean_weights[2] < 0.2
    assert max(model.evals_result_["valid"]["ic"]) > 0.5
    # The valid loss is that of the main task only.
    samples = horizons.samples("valid", data_key="learn")
    scores = torch.tensor(model.predict(horizons, "valid").values)
    expected = float((scores - samples.target[:, 0]).square().mean())
    assert min(model.evals_result_["valid"]["loss"]) == pytest.approx(expected, rel=1e-5)


def test_checkpoint_has_both_optimizers(horizons: ToyDataset, tmp_path) -> None:
    model = fit_method_model(horizons, "TCTS", checkpoint={"dir": str(tmp_path)}, epochs=1)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    network_state, weights_state = checkpoint["optimizer_states"]
    assert len(network_state["state"]) == len(list(model.network_.parameters()))
    assert len(weights_state["state"]) == len(
        [k for k in checkpoint["state_dict"] if k[:5] == "task_"]
    )


def test_task_weights_sum_to_one_over_known_labels() -> None:
    torch.manual_seed(0)
    weights = TaskWeights(4 * 3, 2, hidden_size=5)
    label = torch.tensor([[0.1, torch.nan], [torch.nan, torch.nan], [1.0, 2.0]])
    shares: Tensor = weights(torch.randn(3, 3, 4), torch.randn(3, 2), label)
    torch.testing.assert_close(shares.sum(1), torch.tensor([1.0, 0.0, 1.0]))
    assert shares[0, 1] == 0
    assert 0 < shares[2, 0] < 1


def test_one_label_or_no_valid_segment_raises(dataset: ToyDataset, horizons: ToyDataset) -> None:
    with pytest.raises(ConfigError, match="several labels"):
        make_method_model("TCTS").fit(dataset)
    with pytest.raises(ConfigError, match="single labels"):
        make_method_model("TCTS", loss="ic").fit(horizons)
    module = make_module(horizons)
    with pytest.raises(ConfigError, match="'valid'"):
        module.bind(horizons.samples("train", data_key="learn"), None)
