"""Fine-tuning: which parts of a fitted network are trained, and from which state."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch
from torch import nn
from toy_training import ToyDataset, fit_model, model_weights, same_weights

from qtorch.core.errors import ConfigError, DataError
from qtorch.core.serial import State
from qtorch.model.finetune import FineTuning, interpolate_statistics
from qtorch.model.lightning_model import LightningModel
from qtorch.nn import LSTM, MLP, Transformer
from qtorch.nn.layers import layer_groups
from qtorch.nn.lora import LoRA

LSTM_CONFIG = {"_target_": "qtorch.nn.LSTM", "hidden_size": 8, "num_layers": 2}


@pytest.fixture(scope="module")
def base_model() -> LightningModel:
    model = fit_model(ToyDataset(), LSTM_CONFIG, epochs=1)
    return model


def weight_changes(before: LightningModel, after: LightningModel) -> set[str]:
    a, b = model_weights(before), model_weights(after)
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_layer_groups_from_input_to_head() -> None:
    groups = layer_groups(LSTM(d_feat=3, num_layers=2))
    assert [g[0].split(".")[0] for g in groups] == ["rnn", "rnn", "fc_out"]
    assert all(name.endswith("_l0") for name in groups[0])
    transformer = layer_groups(Transformer(d_feat=3, num_layers=2))
    assert len(transformer) == 4
    assert transformer[-1] == ["decoder_layer.weight", "decoder_layer.bias"]
    flat = [name for group in transformer for name in group]
    assert flat == [name for name, _ in Transformer(d_feat=3).named_parameters()]
    assert len(layer_groups(MLP(d_feat=3, layers=(4,)))) == 3


def test_train_only_the_head(base_model: LightningModel, dataset: ToyDataset) -> None:
    model = copy.deepcopy(base_model)
    model.finetune(dataset, train="head", max_epochs=1)
    assert weight_changes(base_model, model) == {"fc_out.weight", "fc_out.bias"}
    assert all(p.requires_grad for p in model.network_.parameters())
    assert model.fit_report_["tuning"]["train"] == "head"


def test_patterns_select_and_freeze_parameters(
    base_model: LightningModel, dataset: ToyDataset
) -> None:
    model = copy.deepcopy(base_model)
    model.finetune(dataset, train=["rnn.*"], frozen=["*_l0"], max_epochs=1)
    assert weight_changes(base_model, model) == {
        n for n in model_weights(base_model) if n.endswith("_l1")
    }
    with pytest.raises(ConfigError, match=r"'rnm\.\*' matches no parameter"):
        model.finetune(dataset, train=["rnm.*"])
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        model.finetune(dataset, frozen=["*"])


def test_layer_decay_scales_learning_rates(base_model: LightningModel, dataset: ToyDataset) -> None:
    model = copy.deepcopy(base_model)
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.1}
    model.batch = {**model.batch, "size": 100_000}
    full = copy.deepcopy(model)
    full.finetune(dataset, optimizer=sgd, max_epochs=1)
    model.finetune(dataset, optimizer=sgd, max_epochs=1, layer_decay=0.5)
    for name, start in model_weights(base_model).items():
        factor = 1.0 if name.startswith("fc") else 0.5 if name.endswith("_l1") else 0.25
        full_change, scaled_change = (model_weights(m)[name] - start for m in (full, model))
        torch.testing.assert_close(scaled_change, factor * full_change, rtol=1e-3, atol=1e-6)


def test_layers_are_unfrozen_one_after_another(
    base_model: LightningModel, dataset: ToyDataset
) -> None:
    changed_layers = []
    for epochs in (1, 2, 3):
        model = copy.deepcopy(base_model)
        # Keep the last weights: "train_loss" falls in every epoch.
        model.monitor = "train_loss"
        model.finetune(dataset, unfreeze_every=1, max_epochs=epochs)
        names = weight_changes(base_model, model)
        changed_layers.append({"head" if n.startswith("fc") else n[-2:] for n in names})
    assert changed_layers == [{"head"}, {"head", "l1"}, {"head", "l1", "l0"}]


@pytest.mark.parametrize(
    "network", [LSTM(4, 8, 2), Transformer(4, 8, 2, 1, dim_feedforward=16), MLP(12, layers=(5,))]
)
def test_lora_starts_as_the_network_and_merges_into_it(network: nn.Module) -> None:
    network = copy.deepcopy(network).eval()
    x = torch.randn(6, 12) if isinstance(network, MLP) else torch.randn(6, 3, 4)
    expected = network(x)
    lora = LoRA(copy.deepcopy(network), rank=2, alpha=4).eval()
    torch.testing.assert_close(lora(x), expected)
    lora(x).square().sum().backward()
    trainable = {n for n, p in lora.named_parameters() if p.grad is not None and p.grad.any()}
    assert trainable
    # The gradient of A is zero as long as B is zero.
    assert all(n.startswith("high.") for n in trainable)
    for p in lora.high.values():
        p.data.normal_(generator=torch.Generator().manual_seed(0))
    changed_scores = lora(x)
    assert not torch.allclose(changed_scores, expected)
    torch.testing.assert_close(lora.merge()(x), changed_scores, rtol=1e-4, atol=1e-5)


def test_finetuning_with_lora(base_model: LightningModel, dataset: ToyDataset) -> None:
    model = copy.deepcopy(base_model)
    model.finetune(dataset, lora={"rank": 2}, max_epochs=2)
    assert isinstance(model.network_, LSTM)
    assert {n for n in weight_changes(base_model, model) if "bias" in n} == {"fc_out.bias"}
    old, new = (model_weights(m)["rnn.weight_hh_l0"] for m in (base_model, model))
    change = new - old
    assert torch.linalg.matrix_rank(change, tol=1e-5) <= 2
    with pytest.raises(ConfigError, match="lora"):
        model.finetune(dataset, lora={"rang": 2})
    with pytest.raises(ConfigError, match="match no weight"):
        model.finetune(dataset, lora={"targets": ["conv.*"]})
    with pytest.raises(ConfigError, match="lora defines which weights"):
        model.finetune(dataset, lora={"rank": 2}, train="head")


def test_keep_optimizer_continues_with_its_moments(
    base_model: LightningModel, dataset: ToyDataset
) -> None:
    resumed_model, fresh = copy.deepcopy(base_model), copy.deepcopy(base_model)
    resumed_model.finetune(dataset, keep_optimizer=True, max_epochs=1)
    fresh.finetune(dataset, max_epochs=1)
    assert not same_weights(model_weights(resumed_model), model_weights(fresh))
    loaded_model = LightningModel.from_state(base_model.to_state())
    loaded_model.finetune(dataset, keep_optimizer=True, max_epochs=1)
    assert same_weights(model_weights(loaded_model), model_weights(resumed_model))
    with pytest.raises(ConfigError, match="keep_optimizer"):
        resumed_model.finetune(dataset, keep_optimizer=True, train="head")


def test_finetune_overrides_rate_and_epochs(
    base_model: LightningModel, dataset: ToyDataset
) -> None:
    model = copy.deepcopy(base_model)
    model.finetune(dataset, lr=0.0, max_epochs=3, early_stop=5)
    assert model.fit_report_["epochs"] == 3
    assert not weight_changes(base_model, model)
    assert model.trainer["max_epochs"] == 1  # the model's own settings are unchanged


def test_batch_norm_statistics_are_reset_or_kept(dataset: ToyDataset) -> None:
    model = fit_model(dataset, epochs=1)
    name = next(n for n in model_weights(model) if n.endswith("running_mean"))
    running_means = {}
    for mode in ("refit", "adapt"):
        network = FineTuning(statistics=mode).prepare_network(copy.deepcopy(model.network_))
        running_means[mode] = network.state_dict()[name]
    assert torch.equal(running_means["refit"], torch.zeros_like(running_means["refit"]))
    assert torch.equal(running_means["adapt"], model_weights(model)[name])


def test_features_are_matched_by_name(dataset: ToyDataset) -> None:
    model = fit_model(dataset, LSTM_CONFIG, epochs=1)
    expected = model.predict(dataset)
    reordered_dataset = ToyDataset()
    features = reordered_dataset.view.groups["feature"]
    reordered_dataset.view.groups["feature"] = features.keep(tuple(reversed(features.names)))
    pd.testing.assert_series_equal(model.predict(reordered_dataset), expected)
    longer = ToyDataset(step_len=5)
    with pytest.raises(DataError, match="windows of 5 steps, but the model was trained on 3"):
        model.finetune(longer)
    fewer = ToyDataset()
    fewer.view.groups["feature"] = features.keep(["F0", "F1", "F2"])
    with pytest.raises(DataError, match=r"(?s)3 features.*missing features: F3"):
        model.predict(fewer)


def test_adapted_statistics_are_matched_by_column_name() -> None:
    def state(names: str, center: list[float]) -> State:
        columns = [["feature", name] for name in names]
        tensors = {"processors.1.center_": torch.tensor(center)}
        return State({"fitted": True, "processors": [None, {"columns": columns}]}, tensors)

    old = state("AB", [1.0, 2.0])
    new_state = interpolate_statistics(old, state("BA", [4.0, 3.0]))
    assert new_state.tensors["processors.1.center_"].tolist() == [2.0, 3.0]
    assert new_state.config == old.config
    with pytest.raises(DataError, match="missing: B; additional: C"):
        interpolate_statistics(old, state("AC", [4.0, 3.0]))
    with pytest.raises(ConfigError, match="differ from the model's"):
        interpolate_statistics(old, State({"processors": [{}, None]}, old.tensors))
