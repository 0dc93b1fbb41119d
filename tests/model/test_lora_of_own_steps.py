"""LoRA fine-tuning of networks whose training step calls more than `forward`."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from test_own_steps import METHODS, NUM_LABELS, fit_method_model
from toy_training import ToyDataset, model_weights, same_weights

from qtorch.model.lightning_model import LightningModel
from qtorch.model.loop.module import get_module_class
from qtorch.model.loop.scoring import score_series
from qtorch.nn.lora import LoRA, use_effective_weights
from qtorch.nn.recurrent import GRULayers

pytestmark = pytest.mark.slow

RANK = 2
TABNET_METHOD = {**METHODS["TabNet"], "module": {"pretrain_epochs": 1, "lambda_sparse": 0.1}}
LORA_METHODS = {**METHODS, "TabNet": TABNET_METHOD}


def fit_small_model(name: str, **changes) -> tuple[LightningModel, ToyDataset]:
    data = ToyDataset(40, 16, num_labels=NUM_LABELS.get(name, 1))
    model = fit_method_model(data, name, epochs=1, **{**LORA_METHODS[name], **changes})
    return model, data


class NetworkRecorder(pl.Callback):
    """Keep a copy of the LoRA network at the end of training."""

    def on_train_end(self, trainer, pl_module) -> None:
        self.lora = copy.deepcopy(pl_module.network)


@pytest.mark.parametrize("name", LORA_METHODS)
def test_merged_weights_give_the_scores_of_the_lora_network(name: str) -> None:
    model, data = fit_small_model(name)
    old_weights, recorder = model_weights(copy.deepcopy(model)), NetworkRecorder()
    model.callbacks = [recorder]
    model.finetune(data, lora={"rank": RANK}, max_epochs=1)
    network = model.network_
    assert isinstance(recorder.lora, LoRA)
    assert type(network) is type(recorder.lora.network)
    samples = model.input_schema_.match_features(data.samples("test"))
    samples = get_module_class(model.module).prepare_prediction(
        network, samples, lambda dates: model._load_labeled_samples(data, dates)
    )
    scores = [
        score_series(n.eval(), samples, device=torch.device("cpu"), batch_size=64)
        for n in (recorder.lora, network)
    ]
    torch.testing.assert_close(*(torch.tensor(s.to_numpy()) for s in scores), rtol=1e-4, atol=1e-5)
    # Adapted weights have changed by a matrix of LoRA's rank; otherwise only the head has changed.
    new_weights, all_names = model_weights(model), {n for n, p in network.named_parameters()}
    adapted_names = {n.replace("/", ".") for n in recorder.lora.low}
    trained_names = {n for n, p in recorder.lora.network.named_parameters() if p.requires_grad}
    assert adapted_names
    for tensor in all_names - trained_names - adapted_names:
        assert torch.equal(old_weights[tensor], new_weights[tensor]), tensor
    for tensor in adapted_names - trained_names:
        assert (
            0
            < torch.linalg.matrix_rank(new_weights[tensor] - old_weights[tensor], tol=1e-5)
            <= RANK
        )
    loaded_model = LightningModel.from_state(model.to_state())
    assert loaded_model.predict(data).equals(model.predict(data))


class LossRecorder(pl.Callback):
    """Compute a batch's loss with separate low-rank products, and with the products merged in."""

    def __init__(self, data: ToyDataset) -> None:
        self.samples = data.samples("train", data_key="learn")
        self.losses: list[torch.Tensor] = []

    def compute_loss(self, module) -> torch.Tensor:
        # Bank (IGMTF) and error memory (TRA) are recomputed with the effective weights.
        module.on_train_epoch_start()
        uses_days = module.network.cross_section
        batch = (
            self.samples.day_batch(torch.arange(3))
            if uses_days
            else self.samples.batch(torch.arange(0, len(self.samples), 5))
        )
        torch.manual_seed(0)
        total, weight = module.training_sums(batch)
        return total / weight

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.losses:
            return
        lora = pl_module.network
        torch.manual_seed(1)
        for product in lora.high.values():
            product.data.normal_(std=0.3)
        loss = self.compute_loss(pl_module)
        loss.backward()
        names_with_gradients = {n for n, p in lora.named_parameters() if p.grad is not None}
        assert {n for n, p in lora.named_parameters() if p.requires_grad} >= names_with_gradients
        assert any(p.grad is not None and p.grad.any() for p in lora.low.values())
        pl_module.zero_grad()
        trainable_names = {n for n, p in lora.named_parameters() if p.requires_grad}
        self.losses = [loss.detach()]
        lora.merge()
        self.losses.append(self.compute_loss(pl_module).detach())
        for n, p in lora.named_parameters():
            p.requires_grad_(n in trainable_names)


# TCTS only calls forward, and its slopes depend on which weights are trainable.
@pytest.mark.parametrize("name", [n for n in LORA_METHODS if n != "TCTS"])
def test_training_step_uses_the_adapted_weights(name: str) -> None:
    model, data = fit_small_model(name)
    recorder = LossRecorder(data)
    model.callbacks = [recorder]
    model.finetune(data, lora={"rank": RANK}, max_epochs=1)
    torch.testing.assert_close(*recorder.losses, rtol=1e-4, atol=1e-5)


def test_original_weights_are_restored_after_an_exception() -> None:
    class SmallNetwork(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = GRULayers(3, 4), torch.nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    network, x = SmallNetwork(), torch.randn(5, 2, 3)
    old_weights, lora = copy.deepcopy(network.state_dict()), LoRA(network, rank=1)
    for product in lora.high.values():
        product.data.normal_()
    expected = lora(x)
    with use_effective_weights(lora) as inner:
        torch.testing.assert_close(inner(x), expected)
        torch.testing.assert_close(lora(x), expected)  # the products are added once, not twice
    with pytest.raises(ZeroDivisionError), use_effective_weights(lora):
        raise ZeroDivisionError
    assert same_weights(network.state_dict(), old_weights)
    assert all(isinstance(p, torch.nn.Parameter) for p in network._parameters.values())
    torch.testing.assert_close(lora(x), expected)
