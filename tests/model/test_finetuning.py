"""What of a fitted network learns on, and from where."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch
from test_training import model_of, same, state_of
from torch import nn
from toy_training import ToyDataset

from qtorch.core.errors import ConfigError, DataError
from qtorch.core.serial import State
from qtorch.model.lightning_model import LightningModel
from qtorch.model.statistics import between
from qtorch.nn import LSTM, MLP, Transformer
from qtorch.nn.layers import layer_groups
from qtorch.nn.lora import LoRA

LSTM_CONFIG = {"_target_": "qtorch.nn.LSTM", "hidden_size": 8, "num_layers": 2}


@pytest.fixture(scope="module")
def fitted() -> LightningModel:
    model = model_of(LSTM_CONFIG, trainer={"max_epochs": 1})
    model.fit(ToyDataset())
    return model


def moved(before: LightningModel, after: LightningModel) -> set[str]:
    a, b = state_of(before), state_of(after)
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_layers_from_the_input_to_the_head() -> None:
    groups = layer_groups(LSTM(d_feat=3, num_layers=2))
    assert [g[0].split(".")[0] for g in groups] == ["rnn", "rnn", "fc_out"]
    assert all(name.endswith("_l0") for name in groups[0])
    transformer = layer_groups(Transformer(d_feat=3, num_layers=2))
    assert len(transformer) == 4
    assert transformer[-1] == ["decoder_layer.weight", "decoder_layer.bias"]
    flat = [name for group in transformer for name in group]
    assert flat == [name for name, _ in Transformer(d_feat=3).named_parameters()]
    assert len(layer_groups(MLP(d_feat=3, layers=(4,)))) == 3


def test_the_head_alone(fitted: LightningModel, dataset: ToyDataset) -> None:
    model = copy.deepcopy(fitted)
    model.finetune(dataset, train="head", max_epochs=1)
    assert moved(fitted, model) == {"fc_out.weight", "fc_out.bias"}
    assert all(p.requires_grad for p in model.network_.parameters())
    assert model.fit_report_["tuning"]["train"] == "head"


def test_patterns_learn_and_freeze(fitted: LightningModel, dataset: ToyDataset) -> None:
    model = copy.deepcopy(fitted)
    model.finetune(dataset, train=["rnn.*"], frozen=["*_l0"], max_epochs=1)
    assert moved(fitted, model) == {n for n in state_of(fitted) if n.endswith("_l1")}
    with pytest.raises(ConfigError, match=r"'rnm\.\*' fits no parameter"):
        model.finetune(dataset, train=["rnm.*"])
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        model.finetune(dataset, frozen=["*"])


def test_rates_by_layer(fitted: LightningModel, dataset: ToyDataset) -> None:
    model = copy.deepcopy(fitted)
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.1}
    batch = {"size": 100_000}
    model.batch = {**model.batch, **batch}
    full = copy.deepcopy(model)
    full.finetune(dataset, optimizer=sgd, max_epochs=1)
    model.finetune(dataset, optimizer=sgd, max_epochs=1, layer_decay=0.5)
    for name, start in state_of(fitted).items():
        share = 1.0 if name.startswith("fc") else 0.5 if name.endswith("_l1") else 0.25
        whole, part = state_of(full)[name] - start, state_of(model)[name] - start
        torch.testing.assert_close(part, share * whole, rtol=1e-3, atol=1e-6)


def test_layers_learn_one_after_another(fitted: LightningModel, dataset: ToyDataset) -> None:
    found = []
    for epochs in (1, 2, 3):
        model = copy.deepcopy(fitted)
        # The last weights, not the best: "train_loss" goes down.
        model.monitor = "train_loss"
        model.finetune(dataset, unfreeze_every=1, max_epochs=epochs)
        found.append({name.split(".")[0] + name[-2:] for name in moved(fitted, model)})
    assert {"fc_outht", "fc_outas"} == found[0]
    assert found[0] | {"rnnl1"} == found[1] | {"rnnl1"}
    assert "rnn_l1"[-2:] in {n[-2:] for n in found[1]}
    assert not any(n.endswith("l0") for n in found[1])
    assert any(n.endswith("l0") for n in found[2])


@pytest.mark.parametrize(
    "network", [LSTM(4, 8, 2), Transformer(4, 8, 2, 1, dim_feedforward=16), MLP(12, layers=(5,))]
)
def test_lora_begins_as_the_network_and_merges_into_it(network: nn.Module) -> None:
    network = copy.deepcopy(network).eval()
    x = torch.randn(6, 12) if isinstance(network, MLP) else torch.randn(6, 3, 4)
    before = network(x)
    lora = LoRA(copy.deepcopy(network), rank=2, alpha=4).eval()
    torch.testing.assert_close(lora(x), before)
    lora(x).square().sum().backward()
    learnt = {n for n, p in lora.named_parameters() if p.grad is not None and p.grad.any()}
    assert learnt
    assert all(n.startswith("high.") for n in learnt)  # A's gradient is zero while B is
    for p in lora.high.values():
        p.data.normal_(generator=torch.Generator().manual_seed(0))
    changed = lora(x)
    assert not torch.allclose(changed, before)
    torch.testing.assert_close(lora.merge()(x), changed, rtol=1e-4, atol=1e-5)


def test_fine_tuning_by_lora(fitted: LightningModel, dataset: ToyDataset) -> None:
    model = copy.deepcopy(fitted)
    model.finetune(dataset, lora={"rank": 2}, max_epochs=2)
    assert isinstance(model.network_, LSTM)
    assert {n for n in moved(fitted, model) if n.endswith("bias")} == {"fc_out.bias"}
    assert not any("bias" in n and "rnn" in n for n in moved(fitted, model))
    change = state_of(model)["rnn.weight_hh_l0"] - state_of(fitted)["rnn.weight_hh_l0"]
    assert torch.linalg.matrix_rank(change, tol=1e-5) <= 2
    with pytest.raises(ConfigError, match="lora"):
        model.finetune(dataset, lora={"rang": 2})
    with pytest.raises(ConfigError, match="fit no weight"):
        model.finetune(dataset, lora={"targets": ["conv.*"]})
    with pytest.raises(ConfigError, match="lora says itself"):
        model.finetune(dataset, lora={"rank": 2}, train="head")


def test_the_optimizer_goes_on_with_its_moments(
    fitted: LightningModel, dataset: ToyDataset
) -> None:
    kept, fresh = copy.deepcopy(fitted), copy.deepcopy(fitted)
    kept.finetune(dataset, keep_optimizer=True, max_epochs=1)
    fresh.finetune(dataset, max_epochs=1)
    assert not same(state_of(kept), state_of(fresh))
    again = LightningModel.from_state(fitted.to_state())
    again.finetune(dataset, keep_optimizer=True, max_epochs=1)
    assert same(state_of(again), state_of(kept))
    with pytest.raises(ConfigError, match="keep_optimizer"):
        kept.finetune(dataset, keep_optimizer=True, train="head")


def test_its_own_rate_and_epochs(fitted: LightningModel, dataset: ToyDataset) -> None:
    model = copy.deepcopy(fitted)
    model.finetune(dataset, lr=0.0, max_epochs=3, early_stop=5)
    assert model.fit_report_["epochs"] == 3
    assert not moved(fitted, model)
    assert model.trainer["max_epochs"] == 1  # its own stay


def test_batch_norms_are_kept_refitted_or_adapted(dataset: ToyDataset) -> None:
    model = model_of(trainer={"max_epochs": 1})
    model.fit(dataset)
    name = next(n for n in state_of(model) if n.endswith("running_mean"))
    found = {}
    for how in ("refit", "adapt"):
        tuned = copy.deepcopy(model)
        tuned.learnt_ = model.learnt_
        from qtorch.model.finetuning import FineTuning

        FineTuning(statistics=how).prepared(tuned.network_)
        found[how] = state_of(tuned)[name].clone()
    assert torch.equal(found["refit"], torch.zeros_like(found["refit"]))
    assert torch.equal(found["adapt"], state_of(model)[name])


def test_features_are_matched_by_name(dataset: ToyDataset) -> None:
    model = model_of(LSTM_CONFIG, trainer={"max_epochs": 1})
    model.fit(dataset)
    expected = model.predict(dataset)
    turned = ToyDataset()
    features = turned.view.groups["feature"]
    turned.view.groups["feature"] = features.keep(tuple(reversed(features.names)))
    pd.testing.assert_series_equal(model.predict(turned), expected)
    longer = ToyDataset(step_len=5)
    with pytest.raises(DataError, match="windows of 5 steps, the model learnt from 3"):
        model.finetune(longer)
    fewer = ToyDataset()
    fewer.view.groups["feature"] = features.keep(["F0", "F1", "F2"])
    with pytest.raises(DataError, match=r"(?s)3 features.*missing: F3"):
        model.predict(fewer)


def test_adapted_statistics_are_matched_by_name() -> None:
    def state(names: str, centre: list[float]) -> State:
        columns = [["feature", name] for name in names]
        tensors = {"processors.1.center_": torch.tensor(centre)}
        return State({"fitted": True, "processors": [None, {"columns": columns}]}, tensors)

    old = state("AB", [1.0, 2.0])
    found = between(old, state("BA", [4.0, 3.0]))
    assert found.tensors["processors.1.center_"].tolist() == [2.0, 3.0]
    assert found.config == old.config
    with pytest.raises(DataError, match="missing are B; new are C"):
        between(old, state("AC", [4.0, 3.0]))
    with pytest.raises(ConfigError, match="are not the model's"):
        between(old, State({"processors": [{}, None]}, old.tensors))
