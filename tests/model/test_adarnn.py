"""ADARNN's time domains, the distances between their states, and the importance of steps."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from test_own_steps import METHODS, fit_method_model, make_method_model
from toy_training import ToyDataset

from qtorch.core.errors import ConfigError
from qtorch.data.dataset.batch import Batch
from qtorch.model.methods.adarnn import ADARNNModule, _diverse_cuts
from qtorch.nn.temporal.adarnn import ADARNN, step_distances


def make_module(dataset: ToyDataset, **arguments) -> ADARNNModule:
    torch.manual_seed(0)
    network = ADARNN(d_feat=4, hidden_size=5, num_layers=2)
    module = ADARNNModule(network, torch.nn.MSELoss(), torch.optim.Adam, **arguments)
    module.bind(dataset.samples("train", data_key="learn"), None)
    return module


@pytest.mark.parametrize("kind", ["cosine", "mmd", "coral"])
def test_distances_match_hand_computed_values(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    first, second = torch.randn(6, 2, 3, generator=g), torch.randn(6, 2, 3, generator=g) + 1
    distances = step_distances(kind, first, second)
    for step in range(2):
        a, b = first[:, step], second[:, step]
        mean = a.mean(0), b.mean(0)
        expected = {
            "cosine": 1 - mean[0] @ mean[1] / (mean[0].norm() * mean[1].norm()),
            "mmd": (mean[0] - mean[1]).norm() ** 2,
            "coral": (torch.cov(a.T) - torch.cov(b.T)).norm() ** 2 / 36,
        }[kind]
        torch.testing.assert_close(distances[step], expected)
    torch.testing.assert_close(step_distances(kind, first, first), torch.zeros(2))


def test_pairs_have_samples_of_two_domains(dataset: ToyDataset) -> None:
    module = make_module(dataset, num_domains=3)
    days = dataset.samples("train", data_key="learn").date.unique()
    assert module.domain[days].bincount().tolist() == [12, 12, 12]
    date = days[torch.tensor([1, 30, 14, 35, 2, 3])]
    batch = Batch(x=torch.zeros(6, 3, 4), date=date, instrument=torch.zeros(6, dtype=torch.int64))
    pairs = module._pair_samples(batch)
    assert [(a.tolist(), b.tolist(), bool(m)) for a, b, m in pairs] == [
        ([0, 4, 5, 0, 4, 5], [2] * 6, True),
        ([0, 4, 5, 0, 4, 5], [1, 3, 1, 3, 1, 3], True),
        ([2] * 6, [1, 3, 1, 3, 1, 3], True),
    ]
    single_sample = Batch(x=batch.x[:1], date=date[:1], instrument=batch.instrument[:1])
    assert not any(bool(has_both) for *_, has_both in module._pair_samples(single_sample))


def test_diverse_domains_are_cut_where_features_change() -> None:
    means = torch.zeros(10, 2, dtype=torch.float64)
    means[3:7, 0], means[7:, 1] = 3.0, 3.0
    counts = torch.full((10,), 5.0, dtype=torch.float64)
    assert _diverse_cuts(means, counts, 2) == (7,)
    assert _diverse_cuts(means, counts, 3) == (3, 7)


def test_importance_is_learned_and_then_boosted(dataset: ToyDataset, monkeypatch) -> None:
    epochs, original_hook = [], ADARNNModule.on_train_epoch_start

    def record_state(self) -> None:
        old_values = [b.clone() for b in (self.importance, self.distance, self.distance_before)]
        original_hook(self)
        epochs.append((*old_values, self.importance.clone()))

    monkeypatch.setattr(ADARNNModule, "on_train_epoch_start", record_state)
    module = {"pre_epoch": 1, "loss_type": "mmd"}
    make_method_model("ADARNN", module=module, epochs=5).fit(dataset)
    gate_sums, *_, importance = epochs[1]
    torch.testing.assert_close(importance, gate_sums / gate_sums.sum(-1, keepdim=True))
    assert importance.std(-1).min() > 0
    # There is no earlier distance to compare with.
    torch.testing.assert_close(epochs[2][0], epochs[2][3])
    old_importance, new_distance, old_distance, new_importance = epochs[3]
    gain = torch.where(
        new_distance > old_distance + 1e-5, 1 + torch.sigmoid(new_distance - old_distance), 1.0
    )
    expected = old_importance * gain
    torch.testing.assert_close(new_importance, expected / expected.sum(-1, keepdim=True))
    torch.testing.assert_close(new_importance.sum(-1), torch.ones(1, 1))


def test_training_reduces_the_distance_between_domains(dataset: ToyDataset) -> None:
    distances = []
    for dw in (0.0, 20.0):
        module = {"dw": dw, "loss_type": "mmd", "pre_epoch": 3}
        model = fit_method_model(dataset, "ADARNN", module=module, epochs=3, monitor="train_loss")
        samples = dataset.samples("train", data_key="learn")
        half = len(samples) // 2
        x = samples.batch(torch.arange(2 * half)).x
        with torch.no_grad():
            states = model.network_.states(x)[-1]
        distances.append(float(step_distances("mmd", states[:half], states[half:]).sum()))
    assert distances[1] < distances[0]


def test_invalid_arguments_raise(dataset: ToyDataset) -> None:
    for changes, match in (
        ({"num_domains": 1}, "num_domains"),
        ({"loss_type": "adv"}, "loss_type"),
        ({"domains": "odd"}, "domains"),
    ):
        with pytest.raises(ConfigError, match=match):
            make_method_model("ADARNN", module=changes).fit(dataset)
    with pytest.raises(ConfigError, match="order=random"):
        make_method_model("ADARNN", batch={"order": "day"}, **METHODS["ADARNN"]).fit(dataset)


class RateRecorder(pl.Callback):
    """Record learning rates of parameter groups and the gates at the start of each epoch."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.gates: list[torch.Tensor] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        groups = trainer.optimizers[0].param_groups
        self.rates.append([group["lr"] for group in groups])
        self.gates.append(pl_module.gates.gate[0].weight.detach().clone())
        gates = {id(p) for p in pl_module.gates.parameters()}
        assert {id(p) for p in groups[-1]["params"]} == gates  # the gates have their own group


@pytest.mark.slow
def test_gates_learn_at_the_full_rate_with_layer_decay(dataset: ToyDataset) -> None:
    recorder = RateRecorder()
    scheduler = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1, "gamma": 0.5}
    network = {"hidden_size": 8, "num_layers": 2}
    model = fit_method_model(dataset, "ADARNN", network=network, module={"pre_epoch": 2}, epochs=1)
    model.callbacks = [recorder]
    model.finetune(dataset, lr=0.01, layer_decay=0.1, scheduler=scheduler, max_epochs=4)
    # The head, the upper and the lower layer, then the gates; the scheduler scales all of them.
    first = [0.01, 0.001, 0.0001, 0.01]
    for epoch, rates in enumerate(recorder.rates):
        assert rates == pytest.approx([rate * 0.5**epoch for rate in first])
    changes = [
        float((b - a).abs().max()) for a, b in zip(recorder.gates, recorder.gates[1:], strict=False)
    ]
    assert changes[0] > 0.01  # several steps of about the learning rate
    assert 0 < changes[1] < changes[0]
    assert changes[2] == 0  # after `pre_epoch` epochs the gates are not trained any more
