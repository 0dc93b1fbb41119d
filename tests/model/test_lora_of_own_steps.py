"""LoRA where the training step calls more of the network than `forward`."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from test_own_steps import LABELS, STEPS, own
from test_training import same, state_of
from toy_training import ToyDataset

from qtorch.model.error_memory import recalling
from qtorch.model.lightning_model import LightningModel
from qtorch.model.scoring import score_series
from qtorch.nn import TRA
from qtorch.nn.lora import LoRA, acting
from qtorch.nn.recurrent import GRULayers

RANK = 2
PICKED = {**STEPS["TabNet"], "module": {"pretrain_epochs": 1, "lambda_sparse": 0.1}}
OWN = {**STEPS, "TabNet": PICKED}


def fitted(name: str, **changes) -> tuple[LightningModel, ToyDataset]:
    data = ToyDataset(40, 16, num_labels=LABELS.get(name, 1))
    model = own(name, trainer={"max_epochs": 1}, **{**OWN[name], **changes})
    model.fit(data)
    return model, data


class Kept(pl.Callback):
    """The network of LoRA as the training leaves it."""

    def on_train_end(self, trainer, pl_module) -> None:
        self.lora = copy.deepcopy(pl_module.network)


@pytest.mark.parametrize("name", OWN)
def test_merged_weights_score_as_the_products_did(name: str) -> None:
    model, data = fitted(name)
    before, kept = state_of(copy.deepcopy(model)), Kept()
    model.callbacks = [kept]
    model.finetune(data, lora={"rank": RANK}, max_epochs=1)
    network = model.network_
    assert isinstance(kept.lora, LoRA)
    assert type(network) is type(kept.lora.network)
    samples = model.learnt_.matched(data.samples("test"))
    if isinstance(network, TRA):
        samples = recalling(network, samples, lambda dates: model._past(data, dates))
    scores = [
        score_series(n.eval(), samples, device=torch.device("cpu"), batch_size=64)
        for n in (kept.lora, network)
    ]
    torch.testing.assert_close(*(torch.tensor(s.to_numpy()) for s in scores), rtol=1e-4, atol=1e-5)
    # What LoRA adapts has moved by products of its rank, and nothing else beside the head.
    after, whole = state_of(model), {n for n, p in network.named_parameters()}
    adapted = {n.replace("/", ".") for n in kept.lora.low}
    learnt = {n for n, p in kept.lora.network.named_parameters() if p.requires_grad}
    assert adapted
    for tensor in whole - learnt - adapted:
        assert torch.equal(before[tensor], after[tensor]), tensor
    for tensor in adapted - learnt:
        assert 0 < torch.linalg.matrix_rank(after[tensor] - before[tensor], tol=1e-5) <= RANK
    again = LightningModel.from_state(model.to_state())
    assert again.predict(data).equals(model.predict(data))


class Sums(pl.Callback):
    """What a batch is learnt by with products beside the weights, and with them merged in."""

    def __init__(self, data: ToyDataset) -> None:
        self.samples = data.samples("train", data_key="learn")
        self.found: list[torch.Tensor] = []

    def sums(self, module) -> torch.Tensor:
        # A bank, a memory of errors is written anew with the weights that act.
        module.on_train_epoch_start()
        by_day = module.network.cross_section
        batch = (
            self.samples.day_batch(torch.arange(3))
            if by_day
            else self.samples.batch(torch.arange(0, len(self.samples), 5))
        )
        torch.manual_seed(0)
        total, share = module.training_sums(batch)
        return total / share

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.found:
            return
        lora = pl_module.network
        torch.manual_seed(1)
        for product in lora.high.values():
            product.data.normal_(std=0.3)
        plain = self.sums(pl_module)
        plain.backward()
        grown = {n for n, p in lora.named_parameters() if p.grad is not None}
        assert {n for n, p in lora.named_parameters() if p.requires_grad} >= grown
        assert any(p.grad is not None and p.grad.any() for p in lora.low.values())
        pl_module.zero_grad()
        wanted = {n for n, p in lora.named_parameters() if p.requires_grad}
        self.found = [plain.detach()]
        lora.merge()
        self.found.append(self.sums(pl_module).detach())
        for n, p in lora.named_parameters():
            p.requires_grad_(n in wanted)


# TCTS calls nothing but forward, and looks for other slopes where other weights learn.
@pytest.mark.parametrize("name", [n for n in OWN if n != "TCTS"])
def test_the_step_learns_by_the_adapted_weights(name: str) -> None:
    model, data = fitted(name)
    sums = Sums(data)
    model.callbacks = [sums]
    model.finetune(data, lora={"rank": RANK}, max_epochs=1)
    torch.testing.assert_close(*sums.found, rtol=1e-4, atol=1e-5)


def test_the_networks_own_weights_are_back_whatever_happens() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = GRULayers(3, 4), torch.nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    network, x = Two(), torch.randn(5, 2, 3)
    before, lora = copy.deepcopy(network.state_dict()), LoRA(network, rank=1)
    for product in lora.high.values():
        product.data.normal_()
    expected = lora(x)
    with acting(lora) as inner:
        torch.testing.assert_close(inner(x), expected)
        torch.testing.assert_close(lora(x), expected)  # adapted once, not twice
    with pytest.raises(ZeroDivisionError), acting(lora):
        raise ZeroDivisionError
    assert same(network.state_dict(), before)
    assert all(isinstance(p, torch.nn.Parameter) for p in network._parameters.values())
    torch.testing.assert_close(lora(x), expected)
