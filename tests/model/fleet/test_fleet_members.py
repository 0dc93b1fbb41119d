"""Each member of a fleet is what its fit by itself would have been."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_training import (
    NUM_FEATURES,
    ToyDataset,
    fit_model,
    make_model,
    model_weights,
    same_weights,
)

from qtorch.data import TimeDecay
from qtorch.data.panel.elementwise import Affine
from qtorch.model import FleetError, fit_fleet
from qtorch.model.lightning_model import LightningModel

NETWORKS: dict[str, dict[str, Any]] = {
    "LSTM": {"hidden_size": 8, "dropout": 0.0},
    "GRU": {"hidden_size": 8, "dropout": 0.0},
    "ALSTM": {"hidden_size": 8, "dropout": 0.0},
    "MLP": {"layers": [8], "dropout": 0.0},
    "TCN": {"num_layers": 2, "n_chans": 8, "dropout": 0.0},
    "Transformer": {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "dropout": 0.0},
    "GATs": {"hidden_size": 8, "dropout": 0.0},
    "StockMixer": {},
    "DLinear": {},
}
DAY_NETWORKS = ("GATs", "StockMixer")
# Networks with parameters that do not matter: a bias before a batch norm, or one of attention keys.
# Their gradient is rounding error, of which Adam makes whole steps.
WITH_IDLE_PARAMETERS = ("MLP", "Transformer", "GATs", "StockMixer")


def network(name: str) -> dict[str, Any]:
    return {"_target_": f"qtorch.nn.{name}", **NETWORKS[name]}


def members(name: str = "LSTM", **changes: Any) -> list[LightningModel]:
    """Return models with two seeds and two learning rates."""
    order = {"order": "day", "days_per_batch": 2} if name in DAY_NETWORKS else {"size": 64}
    options = {"network": network(name), "batch": order, "epochs": 3, **changes}
    optimizer, rate = {}, 1e-2
    if name in WITH_IDLE_PARAMETERS:
        optimizer, rate = {"_target_": "torch.optim.SGD"}, 3e-3
    return [
        make_model(**options, seed=seed, optimizer={**optimizer, "lr": factor * rate})
        for seed, factor in ((1, 1.0), (1, 0.3), (2, 1.0), (3, 0.3))
    ]


def fit_each(models: list[LightningModel], *arguments: Any) -> list[LightningModel]:
    for model in models:
        model.fit(*arguments)
    return models


def largest_difference(first: LightningModel, second: LightningModel) -> float:
    pair = model_weights(first), model_weights(second)
    return max(float((pair[0][n] - pair[1][n]).abs().max()) for n in pair[0])


def assert_equal_fits(fleet: list[LightningModel], single: list[LightningModel]) -> None:
    for member, model in zip(fleet, single, strict=True):
        for name in ("epochs", "best_epoch", "best_step", "monitor", "samples", "valid_samples"):
            assert member.fit_report_[name] == model.fit_report_[name], name
        assert largest_difference(member, model) < 1e-5
        assert member.evals_result_.keys() == model.evals_result_.keys()
        for segment, curves in model.evals_result_.items():
            assert curves.keys() == member.evals_result_[segment].keys()
            for key, values in curves.items():
                assert member.evals_result_[segment][key] == pytest.approx(values, abs=1e-4), key


QUICK_NETWORKS = ("MLP",)


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK_NETWORKS else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS],
)
def test_members_equal_their_fits_alone(name: str) -> None:
    dataset = ToyDataset()
    fleet, single = (members(name, epochs=4)[1:3] for _ in range(2))
    fit_fleet(fleet, dataset)
    assert_equal_fits(fleet, fit_each(single, dataset))
    assert all(m.fit_report_["fleet_members"] == 2 for m in fleet)


@pytest.mark.slow
def test_members_stop_early_each_at_its_own_epoch() -> None:
    dataset = ToyDataset()
    changes = {"epochs": 30, "early_stop": 2, "monitor": "ic"}
    fleet, single = members(**changes), members(**changes)
    fit_fleet(fleet, dataset)
    assert_equal_fits(fleet, fit_each(single, dataset))
    assert len({m.fit_report_["epochs"] for m in fleet}) > 1


OPTIMIZERS: dict[str, Any] = {
    "SGD": {"_target_": "torch.optim.SGD", "lr": 0.05},
    "momentum": {
        "_target_": "torch.optim.SGD",
        "lr": 0.02,
        "momentum": 0.9,
        "dampening": 0.1,
        "weight_decay": 0.01,
    },
    "Nesterov": {"_target_": "torch.optim.SGD", "lr": 0.02, "momentum": 0.9, "nesterov": True},
    "Adam": {
        "_target_": "torch.optim.Adam",
        "lr": 0.01,
        "betas": [0.8, 0.95],
        "weight_decay": 0.01,
    },
    "AMSGrad": {"_target_": "torch.optim.Adam", "lr": 0.01, "amsgrad": True},
    "AdamW": {"_target_": "torch.optim.AdamW", "lr": 0.01, "weight_decay": 0.1},
    "groups": {
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.01, "weight_decay": 0.1},
        "groups": {"*bias*": {"weight_decay": 0.0, "lr": 0.003}},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_equal_those_of_torch(name: str) -> None:
    dataset = ToyDataset()
    models = [
        [
            make_model(network("GRU"), seed=seed, optimizer=OPTIMIZERS[name], epochs=2)
            for seed in (1, 2)
        ]
        for _ in range(2)
    ]
    fit_fleet(models[0], dataset)
    assert_equal_fits(models[0], fit_each(models[1], dataset))


SETTINGS: list[dict[str, Any]] = [
    {"scheduler": {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.7}},
    {"scheduler": {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.01}},
    {"scheduler": {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau", "patience": 0}},
    {"trainer": {"gradient_clip_val": 0.01}},
    {"optimizer": {"_target_": "torch.optim.Adam", "lr": 0.003, "betas": [0.5, 0.9]}},
    {"optimizer": {"_target_": "torch.optim.Adam", "lr": 0.01, "weight_decay": 0.05}},
    {"early_stop": {"patience": 3, "min_delta": 0.001}, "monitor": "ic"},
    {"early_stop": 1, "monitor": "rank_ic"},
    {"epochs": 2},
]


@pytest.mark.slow
def test_every_member_may_have_its_own_settings() -> None:
    dataset = ToyDataset()

    def models() -> list[LightningModel]:
        return [
            make_model(network("GRU"), **{"seed": seed, "epochs": 5, **settings})
            for seed, settings in enumerate(SETTINGS)
        ]

    fleet, single = models(), models()
    fit_fleet(fleet, dataset)
    assert_equal_fits(fleet, fit_each(single, dataset))
    # The last two have ended earlier.
    assert [m.fit_report_["fleet_members"] for m in fleet[:2]] == [len(SETTINGS) - 2] * 2


@pytest.mark.slow
def test_members_may_have_their_own_limit_of_gradient_values() -> None:
    dataset = ToyDataset()

    def models() -> list[LightningModel]:
        trainers = [
            {"gradient_clip_val": limit, "gradient_clip_algorithm": "value"}
            for limit in (0.001, 0.003)
        ]
        return [make_model(network("GRU"), trainer=trainer, epochs=3) for trainer in trainers]

    fleet, single = models(), models()
    fit_fleet(fleet, dataset)
    assert_equal_fits(fleet, fit_each(single, dataset))
    assert [m.fit_report_["fleet_members"] for m in fleet] == [2, 2]
    assert largest_difference(*fleet) > 1e-4


HUBER = "qtorch.metrics.loss.Huber"
LOSSES: dict[str, list[Any]] = {
    "delta": [{"_target_": HUBER, "delta": delta} for delta in (0.2, 1.0, 0.2)],
    "sum": [{"mse": 1.0, "mae": 0.5}, {"mse": 0.2, "mae": 3.0}, {"mse": 1.0, "mae": 0.0}],
    "days": [{"mse": 1.0, "ic": 0.5}, {"mse": 0.2, "ic": 3.0}],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("network_name", ["MLP", "GRU"])
def test_members_may_have_their_own_numbers_of_a_loss(name: str, network_name: str) -> None:
    dataset, losses = ToyDataset(), LOSSES[name]
    batch = {"order": "day", "days_per_batch": 4} if name == "days" else {"size": 64}
    optimizer = {"_target_": "torch.optim.SGD", "lr": 3e-3}

    def models() -> list[LightningModel]:
        options = {"batch": batch, "optimizer": optimizer, "epochs": 3}
        return [make_model(network(network_name), loss=loss, **options) for loss in losses]

    fleet, single = models(), models()
    fit_fleet(fleet, dataset)
    assert_equal_fits(fleet, fit_each(single, dataset))
    assert all(m.fit_report_["fleet_members"] == len(losses) for m in fleet)
    assert largest_difference(*fleet[:2]) > 1e-4


def test_losses_of_other_members_change_no_bit() -> None:
    dataset = ToyDataset()

    def models() -> list[LightningModel]:
        options = {"loss": LOSSES["delta"][0], "epochs": 2}
        return [make_model(network("MLP"), seed=seed, **options) for seed in (1, 2)]

    first, second = models(), models()
    fit_fleet(first, dataset)
    other = make_model(network("MLP"), loss=LOSSES["delta"][1], epochs=2)
    fit_fleet([second[0], other, second[1]], dataset)
    assert other.fit_report_["fleet_members"] == 3
    for a, b in zip(first, second, strict=True):
        assert same_weights(model_weights(a), model_weights(b))


def test_losses_of_other_kinds_make_fleets_of_their_own() -> None:
    models = [make_model(network("GRU"), loss=loss, epochs=1) for loss in ("mse", "mae", "mse")]
    fit_fleet(models, ToyDataset())
    assert [m.fit_report_["fleet_members"] for m in models] == [2, 1, 2]


class PowerError(nn.Module):
    """A user's own loss, which does not print its number."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, score: Tensor, target: Tensor) -> Tensor:
        return ((score - target).abs() ** self.power).mean()


class WeightedPowerError(PowerError):
    def forward(self, score: Tensor, target: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]  # one argument more
        errors = (score - target).abs() ** self.power
        return (weight * errors).sum() / weight.sum()


@pytest.mark.parametrize("kind", [PowerError, WeightedPowerError])
def test_own_losses_are_only_shared_by_members_if_they_are_equal(kind: type[PowerError]) -> None:
    dataset, first, second = ToyDataset(), kind(2.0), kind(3.0)
    in_sums = [{"own": {"loss": loss, "weight": 1.0}} for loss in (first, second)]
    losses = [first, second, first, *(in_sums if kind is WeightedPowerError else [])]

    def models() -> list[LightningModel]:
        optimizer = {"_target_": "torch.optim.SGD", "lr": 3e-3}
        options = {"optimizer": optimizer, "epochs": 2, "seed": 1}
        return [make_model(network("MLP"), loss=loss, **options) for loss in losses]

    fleet, single = models(), models()
    fit_fleet(fleet, dataset)
    assert_equal_fits(fleet, fit_each(single, dataset))
    assert [m.fit_report_["fleet_members"] for m in fleet[:3]] == [2, 1, 2]


def make_dataset(mean: float, scale: float) -> ToyDataset:
    """Return a dataset whose features are normalized with these statistics."""
    dataset = ToyDataset()
    features = dataset.view.groups["feature"]
    names = [f"F{k}" for k in range(NUM_FEATURES)]
    normalized_features = features.with_elementwise(names, Affine(mean, scale))
    dataset.view = dataset.view.with_group("feature", normalized_features)
    return dataset


@pytest.mark.slow
def test_members_may_have_their_own_statistics_of_normalization() -> None:
    datasets = [make_dataset(0.0, 1.0), make_dataset(0.5, 2.0)]
    fleet, single = members("GRU")[:2], members("GRU")[:2]
    fit_fleet(fleet, datasets)
    for model, dataset in zip(single, datasets, strict=True):
        model.fit(dataset)
    assert_equal_fits(fleet, single)
    assert [m.fit_report_["fleet_members"] for m in fleet] == [2, 2]
    assert largest_difference(*fleet) > 1e-4


@pytest.mark.slow
def test_members_may_have_their_own_day_labels() -> None:
    dataset = ToyDataset()
    batch = {"order": "day", "days_per_batch": 2}

    def models() -> list[LightningModel]:
        rules = (None, {"zscore": True}, {"drop_extreme": 0.2, "zscore": True})
        return [make_model(network("GRU"), batch=batch, day_label=rule, epochs=3) for rule in rules]

    fleet, single = models(), models()
    fit_fleet(fleet, dataset)
    assert_equal_fits(fleet, fit_each(single, dataset))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GRU", "MLP", "GATs"])
def test_windows_have_their_own_samples(name: str) -> None:
    """Panels of different lengths: epochs of different length, with last batches of any size."""
    datasets = [ToyDataset(num_days=days) for days in (40, 60, 61, 53)]
    fleet, single = members(name), members(name)
    fit_fleet(fleet, datasets)
    for model, dataset in zip(single, datasets, strict=True):
        model.fit(dataset)
    assert_equal_fits(fleet, single)


@pytest.mark.slow
def test_members_may_have_their_own_weights_of_samples() -> None:
    dataset = ToyDataset()
    reweighters = [TimeDecay(half_life=days) for days in (5, 10, 20, 40)]
    fleet, single = members(), members()
    fit_fleet(fleet, dataset, reweighters)
    for model, reweighter in zip(single, reweighters, strict=True):
        model.fit(dataset, reweighter)
    assert_equal_fits(fleet, single)


@pytest.mark.slow
def test_a_free_place_is_taken_by_the_next_model() -> None:
    dataset = ToyDataset()
    fleet, single = (members(epochs=5, early_stop=1) for _ in range(2))
    order: list[int] = []
    fit_fleet(fleet, dataset, max_members=2, on_fitted=order.append)
    assert_equal_fits(fleet, fit_each(single, dataset))
    assert sorted(order) == [0, 1, 2, 3]
    assert order.index(3) > min(order.index(0), order.index(1))


def bad_neighbors() -> list[LightningModel]:
    """Return two models whose losses become NaN and huge."""
    return [
        make_model(network("LSTM"), epochs=5, seed=7, optimizer={"lr": lr}) for lr in (1e38, 100.0)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_members_do_not_influence_each_other(dropout: float) -> None:
    dataset = ToyDataset()
    changes = {"network": {**network("LSTM"), "dropout": dropout}}
    good, good_beside_bad = members(**changes), members(**changes)
    for model in bad_neighbors():
        model.network = changes["network"]
    bad = bad_neighbors()
    fit_fleet([*good, *members(**changes)[:2]], dataset)
    with pytest.raises(
        FleetError, match="1 of 6 fits failed:\n  model 1: training loss of epoch 0"
    ):
        fit_fleet([good_beside_bad[0], *bad, *good_beside_bad[1:]], dataset)
    for first, second in zip(good, good_beside_bad, strict=True):
        assert same_weights(model_weights(first), model_weights(second))
        assert first.evals_result_ == second.evals_result_


@pytest.mark.slow
def test_the_order_of_members_does_not_matter() -> None:
    dataset = ToyDataset()
    first, second = members(), members()
    fit_fleet(first, dataset)
    fit_fleet(second[::-1], dataset)
    for a, b in zip(first, second, strict=True):
        assert same_weights(model_weights(a), model_weights(b))


def test_dropout_masks_differ_between_members_layers_and_steps() -> None:
    from qtorch.nn.stacked import member_dropout, mix_keys

    def draw(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        with member_dropout(key):
            return torch.stack([torch.nn.functional.dropout(x, 0.25) for _ in range(2)])

    seeds, steps = torch.tensor([1, 1, 2]), torch.tensor([0, 1, 0])
    masks = torch.func.vmap(draw)(torch.ones(3, 400, 50), mix_keys(seeds, steps)) == 0
    masks = masks.flatten(2).flatten(0, 1).double()  # [6, 20000]
    assert masks.mean(1) == pytest.approx([0.25] * 6, abs=0.02)
    correlations = torch.corrcoef(masks) - torch.eye(6)
    assert float(correlations.abs().max()) < 0.04
    repeated_masks = torch.func.vmap(draw)(torch.ones(3, 400, 50), mix_keys(seeds, steps)) == 0
    assert torch.equal(repeated_masks.flatten(2).flatten(0, 1).double(), masks)


def test_dropout_of_attention_is_that_of_its_weights() -> None:
    from qtorch.nn.stacked import member_dropout

    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(q, k, v, is_causal=True)
    with member_dropout(torch.tensor(3, dtype=torch.int32)):
        attend = torch.nn.functional.scaled_dot_product_attention
        drawn = torch.stack([attend(q, k, v, None, 0.2, True) for _ in range(2000)])
        assert torch.equal(attend(q, k, v, is_causal=True), expected)
    assert torch.nn.functional.scaled_dot_product_attention is not attend
    assert drawn.mean(0) == pytest.approx(expected, abs=0.15)
    assert float(drawn.std(0).mean()) > 0.05


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"compile": True}, "model.compile"),
    ({"trainer": {"val_check_interval": 0.5}}, "trainer.val_check_interval"),
    ({"trainer": {"accumulate_grad_batches": 2}}, "trainer.accumulate_grad_batches"),
    ({"callbacks": [{"_target_": "pytorch_lightning.callbacks.Timer"}]}, "model.callbacks"),
    ({"optimizer": "Adagrad"}, "the optimizer Adagrad"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_a_fit_that_cannot_be_a_member_is_done_alone(
    changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = ToyDataset()
    models = [make_model(network("GRU"), seed=seed, epochs=1) for seed in (1, 2)]
    other = make_model(network("GRU"), **{"epochs": 1, **changes})
    caplog.set_level("INFO", "qtorch")
    fit_fleet([models[0], other, models[1]], dataset)
    assert f"job 1 is fitted by itself: a fleet cannot have {reason}" in caplog.text
    assert "fleet_members" not in other.fit_report_
    assert [m.fit_report_["fleet_members"] for m in models] == [2, 2]
    assert math.isfinite(float(other.predict(dataset, "test").mean()))


def test_models_of_two_architectures_make_two_fleets() -> None:
    dataset = ToyDataset()
    models = [make_model(network(name), epochs=1) for name in ("GRU", "LSTM", "GRU", "LSTM")]
    fit_fleet(models, dataset)
    assert [m.fit_report_["fleet_members"] for m in models] == [2, 2, 2, 2]


@pytest.mark.slow
def test_a_fitted_member_can_be_finetuned_with_its_optimizer() -> None:
    dataset = ToyDataset()
    fleet, single = members(), members()
    fit_fleet(fleet, dataset)
    fit_each(single, dataset)
    for model in (fleet[0], single[0]):
        model.finetune(dataset, max_epochs=2, keep_optimizer=True)
    assert largest_difference(fleet[0], single[0]) < 1e-5


def test_two_fits_of_one_job_are_both_members() -> None:
    from qtorch.model.fleet.fleet import Fleet

    dataset = ToyDataset()

    def fit_twice(seed: int) -> list[LightningModel]:
        return [fit_model(dataset, network("GRU"), seed=seed + k) for k in (0, 10)]

    jobs = Fleet().run([lambda seed=seed: fit_twice(seed) for seed in (1, 2)])
    assert all(m.fit_report_["fleet_members"] == 2 for job in jobs for m in job.result)
