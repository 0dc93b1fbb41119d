"""The two levels of TCTS: what a label's gain is, and that the weights learn it."""

from __future__ import annotations

import pytest
import torch
from test_own_steps import own
from torch import Tensor
from toy_training import ToyDataset

from qtorch.core.errors import ConfigError
from qtorch.metrics.loss import MSE
from qtorch.model.tcts_module import TCTSModule
from qtorch.nn.tcts import TCTS, TaskWeights


@pytest.fixture(scope="module")
def horizons() -> ToyDataset:
    return ToyDataset(num_labels=3)


def module_of(data: ToyDataset) -> TCTSModule:
    torch.manual_seed(0)
    network = TCTS(d_feat=4, hidden_size=6, num_layers=1, dropout=0.0, num_outputs=3)
    module = TCTSModule(network, MSE(), torch.optim.Adam)
    module.bind(data.samples("train", data_key="learn"), data.samples("valid", data_key="learn"))
    return module


def test_a_gain_is_the_slope_of_a_loss_along_the_valid_gradient(horizons: ToyDataset) -> None:
    module = module_of(horizons)
    batch = horizons.samples("train", data_key="learn").batch(torch.arange(5))
    above = horizons.samples("valid", data_key="learn").batch(torch.arange(40))
    batch.y[1, 2] = torch.nan
    learnt = module.learnt()
    assert sum(p.numel() for p in learnt) == sum(p.numel() for p in module.network.parameters())
    before = [p.clone() for p in learnt]
    total, share, _ = module.loss_sums(above)
    slope = torch.autograd.grad(total / share, learnt)
    gain, score = module._gains(batch, learnt, slope)
    assert all(torch.equal(a, b) for a, b in zip(before, learnt, strict=True))
    length = torch.cat([s.flatten() for s in slope]).norm()
    losses = module._losses(batch, module.feeder(batch))
    torch.testing.assert_close(score, module.feeder(batch))
    for sample in range(5):
        for task in range(3):
            own_slope = torch.autograd.grad(losses[sample, task], learnt, retain_graph=True)
            expected = sum((a * b).sum() for a, b in zip(own_slope, slope, strict=True)) / length
            torch.testing.assert_close(gain[sample, task], expected, rtol=1e-2, atol=1e-4)
    assert gain[1, 2] == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_labels_that_oppose_the_main_task_come_to_weigh_little(
    horizons: ToyDataset, monkeypatch, mode: str
) -> None:
    kept, bind = [], TCTSModule.bind

    def watched(self, train, valid) -> None:
        kept.append(self)
        bind(self, train, valid)

    monkeypatch.setattr(TCTSModule, "bind", watched)
    model = own(
        "TCTS",
        module={"steps": 1, "weight_lr": 0.02, "mode": mode},
        trainer={"max_epochs": 6},
        batch={"size": 100},
    )
    model.fit(horizons)
    (module,) = kept
    batch = horizons.samples("train", data_key="learn").batch(torch.arange(900))
    with torch.no_grad():
        share = module._weights(batch, module.feeder(batch)).mean(0)
    assert share[2] < 0.2
    assert max(model.evals_result_["valid"]["ic"]) > 0.5
    # The valid loss is of the main task alone.
    samples = horizons.samples("valid", data_key="learn")
    scores = torch.tensor(model.predict(horizons, "valid").values)
    expected = float((scores - samples.target[:, 0]).square().mean())
    assert min(model.evals_result_["valid"]["loss"]) == pytest.approx(expected, rel=1e-5)


def test_both_optimizers_are_in_a_checkpoint(horizons: ToyDataset, tmp_path) -> None:
    model = own("TCTS", checkpoint={"dir": str(tmp_path)}, trainer={"max_epochs": 1})
    model.fit(horizons)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    forecast, weights = saved["optimizer_states"]
    assert len(forecast["state"]) == len(list(model.network_.parameters()))
    assert len(weights["state"]) == len([k for k in saved["state_dict"] if k[:5] == "task_"])


def test_weights_are_shares_of_the_labels_that_are_there() -> None:
    torch.manual_seed(0)
    weights = TaskWeights(4 * 3, 2, hidden_size=5)
    label = torch.tensor([[0.1, torch.nan], [torch.nan, torch.nan], [1.0, 2.0]])
    share: Tensor = weights(torch.randn(3, 3, 4), torch.randn(3, 2), label)
    torch.testing.assert_close(share.sum(1), torch.tensor([1.0, 0.0, 1.0]))
    assert share[0, 1] == 0
    assert 0 < share[2, 0] < 1


def test_one_label_or_no_valid_segment_is_refused(
    dataset: ToyDataset, horizons: ToyDataset
) -> None:
    with pytest.raises(ConfigError, match="several labels"):
        own("TCTS").fit(dataset)
    with pytest.raises(ConfigError, match="single labels"):
        own("TCTS", loss="ic").fit(horizons)
    module = module_of(horizons)
    with pytest.raises(ConfigError, match="'valid'"):
        module.bind(horizons.samples("train", data_key="learn"), None)
