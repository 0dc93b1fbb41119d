"""The numbers of a training match a hand-written loop, for any number of batches per step."""

from __future__ import annotations

import copy
import gc
import weakref

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from toy_training import (
    NUM_FEATURES,
    ToyDataset,
    ToyRecorder,
    fit_model,
    make_model,
    model_weights,
    same_weights,
)
from user_networks import UserModule

from qtorch.core.errors import ConfigError
from qtorch.data.dataset.batches import BatchLoader
from qtorch.data.dataset.reweighter import Reweighter
from qtorch.data.dataset.samples import Samples
from qtorch.metrics.loss import MSE
from qtorch.metrics.signal import calc_ic
from qtorch.model.loop.module import ScoreModule
from qtorch.nn import LSTM, MLP


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (3, 0.1)])
def test_training_matches_a_hand_written_loop(
    dataset: ToyDataset, accumulate: int, clip: float | None
) -> None:
    trainer = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    # "train/loss" falls in both epochs, so that the best weights are the last ones.
    model = fit_model(dataset, trainer=trainer, monitor="train_loss")

    samples = dataset.samples("train", data_key="learn")
    torch.manual_seed(3)
    network = MLP(d_feat=12, layers=[8], dropout=0.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    loader = BatchLoader(samples, batch_size=64, seed=3)
    for epoch in range(2):
        total = count = 0.0
        for number, batch in enumerate(loader.batches(epoch), 1):
            x = batch.x.transpose(1, 2).flatten(1)
            loss = (network(x) - batch.y[:, 0]).square().mean()
            (loss / accumulate).backward()
            total += loss.item() * len(x)
            count += len(x)
            if number % accumulate == 0 or number == len(loader):
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        assert model.evals_result_["train"]["loss"][epoch] == pytest.approx(total / count, rel=1e-5)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(model_weights(model)[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_inner_steps_give_bit_identical_results(dataset: ToyDataset, precision: str) -> None:
    fits = []
    for inner_steps in (1, 3, "auto"):
        model = fit_model(
            dataset,
            {"_target_": "qtorch.nn.GRU", "hidden_size": 8, "dropout": 0.3},
            scheduler={
                "scheduler": {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.9},
                "interval": "step",
                "frequency": 2,
            },
            trainer={
                "accumulate_grad_batches": 2,
                "gradient_clip_val": 0.5,
                "gradient_clip_algorithm": "value",
                "precision": precision,
            },
            inner_steps=inner_steps,
        )
        fits.append(model)
    assert fits[2].fit_report_["inner_steps"] > 3
    for fit in fits[1:]:
        assert same_weights(model_weights(fits[0]), model_weights(fit))
        assert fits[0].evals_result_ == fit.evals_result_


class _BackwardCounter(pl.Callback):
    def __init__(self) -> None:
        self.num_calls = 0

    def on_after_backward(self, trainer, pl_module) -> None:
        self.num_calls += 1
        assert all(p.grad is not None for p in pl_module.parameters())


def test_callback_between_backward_and_step_is_called_and_changes_nothing(
    dataset: ToyDataset,
) -> None:
    counter = _BackwardCounter()
    model_with_callback, plain_model = fit_model(dataset, callbacks=[counter]), fit_model(dataset)
    assert model_with_callback.fit_report_["inner_steps"] == 1
    assert counter.num_calls == 2 * 16
    assert same_weights(model_weights(model_with_callback), model_weights(plain_model))
    larger_steps = fit_model(dataset, callbacks=[counter], inner_steps=5)
    assert counter.num_calls == 4 * 16
    assert same_weights(model_weights(larger_steps), model_weights(plain_model))


def test_validation_metrics_match_the_predicted_scores(
    dataset: ToyDataset, recorder: ToyRecorder
) -> None:
    model = fit_model(dataset, epochs=1, recorder=recorder)
    samples = dataset.samples("valid", data_key="learn")
    pred = model.predict(dataset, "valid").reindex(samples.index)
    raw = pd.Series(samples.raw_label[:, 0].numpy(), index=samples.index)
    label = pd.Series(samples.target[:, 0].numpy(), index=samples.index)
    valid = {k: v[0] for k, v in model.evals_result_["valid"].items()}
    ic, rank_ic = (series.mean() for series in calc_ic(pred, raw))
    assert valid["ic"] == pytest.approx(ic, abs=1e-6)
    assert valid["rank_ic"] == pytest.approx(rank_ic, abs=1e-6)
    assert valid["loss"] == pytest.approx(((pred - label) ** 2).mean(), rel=1e-5)
    assert recorder.history() == {
        ("train/loss", 0): model.evals_result_["train"]["loss"][0],
        ("lr", 0): 0.01,
        **{(f"valid/{k}", 0): v for k, v in valid.items()},
    }


class _FirstHalfReweighter(Reweighter):
    def reweight(self, data: pd.DataFrame) -> pd.Series:
        weight = pd.Series(2.0, index=data.index)
        weight.iloc[len(data) // 2 :] = 0.0
        return weight


def test_sample_weights_change_training_and_logged_loss(dataset: ToyDataset) -> None:
    zero_rate = {"_target_": "torch.optim.SGD", "lr": 0.0}
    model = fit_model(dataset, optimizer=zero_rate, epochs=1, reweighter=_FirstHalfReweighter())
    samples = dataset.samples("train", data_key="learn")
    pred = model.predict(dataset, "train").to_numpy()
    half = len(samples) // 2
    expected = ((pred - samples.target[:, 0].numpy())[:half] ** 2).mean()
    # Only approximate: training uses the batch's statistics, prediction the running ones.
    assert model.evals_result_["train"]["loss"][0] == pytest.approx(expected, rel=0.2)
    weighted_model = fit_model(dataset, reweighter=_FirstHalfReweighter())
    unweighted_model = fit_model(dataset)
    assert not same_weights(model_weights(weighted_model), model_weights(unweighted_model))


def test_weighted_epoch_loss_is_exact(dataset: ToyDataset) -> None:
    zero_rate = {"_target_": "torch.optim.SGD", "lr": 0.0}
    network = {"_target_": "qtorch.nn.LSTM", "hidden_size": 4, "num_layers": 1}
    model = fit_model(
        dataset, network, optimizer=zero_rate, epochs=1, reweighter=_FirstHalfReweighter()
    )
    samples = dataset.samples("train", data_key="learn")
    pred = model.predict(dataset, "train").to_numpy()
    half = len(samples) // 2
    expected = ((pred - samples.target[:, 0].numpy())[:half] ** 2).mean()
    assert model.evals_result_["train"]["loss"][0] == pytest.approx(expected, rel=1e-5)


def test_loss_sums_are_a_pure_function_of_parameters_and_batch(dataset: ToyDataset) -> None:
    network = LSTM(d_feat=4, hidden_size=4)
    module = ScoreModule(network, MSE(), torch.optim.Adam)
    batch = dataset.samples("train", data_key="learn").batch(torch.arange(10))
    total, weight, _ = module.loss_sums(batch)
    (total / weight).backward()
    state = {k: v.detach().clone() for k, v in network.named_parameters()}

    def loss(state):
        total, weight, _ = module.loss_sums(batch, state)
        return total / weight

    gradients = torch.func.grad(loss)(state)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_best_epoch_weights_are_kept(dataset: ToyDataset) -> None:
    optimizer = {"_target_": "torch.optim.SGD", "lr": 0.05}
    scheduler = {
        "_target_": "torch.optim.lr_scheduler.LambdaLR",
        "lr_lambda": lambda epoch: 1.0 if epoch == 0 else 40.0,
    }
    model = fit_model(dataset, optimizer=optimizer, scheduler=scheduler, epochs=3)
    losses = model.evals_result_["valid"]["loss"]
    assert min(losses) == losses[0]
    one_epoch_model = fit_model(dataset, optimizer=optimizer, epochs=1)
    assert same_weights(model_weights(model), model_weights(one_epoch_model))
    assert model.fit_report_["best_epoch"] == 0
    assert model.fit_report_["best_value"] == losses[0]


def test_early_stop_with_each_monitor(dataset: ToyDataset) -> None:
    zero_rate = {"_target_": "torch.optim.SGD", "lr": 0.0}
    network = {"_target_": "qtorch.nn.LSTM", "hidden_size": 4}
    for spec in (2, {"monitor": "ic", "patience": 2}, {"monitor": "rank_ic", "patience": 2}):
        model = fit_model(dataset, network, optimizer=zero_rate, early_stop=spec, epochs=9)
        assert model.fit_report_["epochs"] == 3, spec


def test_plateau_scheduler_receives_the_monitored_metric(dataset: ToyDataset) -> None:
    model = fit_model(
        dataset,
        {"_target_": "qtorch.nn.LSTM", "hidden_size": 4},
        optimizer={"_target_": "torch.optim.SGD", "lr": 1e-12},
        scheduler={
            "scheduler": {
                "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau",
                "mode": "max",
                "factor": 0.5,
                "patience": 0,
                "threshold": 0.1,
            },
            "monitor": "rank_ic",
        },
        epochs=3,
    )
    assert model.evals_result_["train"]["lr"] == pytest.approx([1e-12, 1e-12, 5e-13], rel=1e-6)


def test_lightning_limits_count_batches(dataset: ToyDataset) -> None:
    class StepCounter(pl.Callback):
        steps = 0

        def on_train_end(self, trainer, pl_module) -> None:
            StepCounter.steps = trainer.global_step

    for trainer, expected in (
        ({"limit_train_batches": 5}, 10),
        ({"limit_train_batches": 0.5}, 16),
        ({"max_steps": 21}, 21),
        ({"fast_dev_run": True}, 1),
        ({"val_check_interval": 0.5}, 32),
    ):
        make_model(callbacks=[StepCounter()], trainer=trainer).fit(dataset)
        assert StepCounter.steps == expected, trainer
    with pytest.raises(ConfigError, match="inner_steps=1"):
        make_model(inner_steps=4, trainer={"val_check_interval": 0.5}).fit(dataset)


def test_day_batches_train_without_padding_effects(dataset: ToyDataset) -> None:
    model = fit_model(dataset, batch={"order": "day", "days_per_batch": 2}, epochs=3)
    losses = model.evals_result_["train"]["loss"]
    assert losses[-1] < losses[0]
    # Padding does not count in any loss: the metrics are those of the samples alone.
    samples = dataset.samples("valid", data_key="learn")
    pred = model.predict(dataset, "valid").reindex(samples.index).to_numpy()
    best = model.fit_report_["best_epoch"]
    expected = ((pred - samples.target[:, 0].numpy()) ** 2).mean()
    assert model.evals_result_["valid"]["loss"][best] == pytest.approx(expected, rel=1e-5)


def test_seed_determines_training_and_global_generators_are_restored(dataset: ToyDataset) -> None:
    network = {"_target_": "qtorch.nn.LSTM", "hidden_size": 4, "dropout": 0.5}
    torch.manual_seed(11)
    rng_state = torch.get_rng_state()
    first = fit_model(dataset, network)
    assert torch.equal(torch.get_rng_state(), rng_state)
    torch.manual_seed(12)
    second, third = fit_model(dataset, network), fit_model(dataset, network, seed=4)
    assert same_weights(model_weights(first), model_weights(second))
    assert not same_weights(model_weights(first), model_weights(third))


def test_any_callable_works_as_loss(dataset: ToyDataset) -> None:
    torch_losses, qtorch_losses = (
        fit_model(dataset, loss=loss).evals_result_["train"]["loss"]
        for loss in (torch.nn.MSELoss(), "mse")
    )
    assert torch_losses == pytest.approx(qtorch_losses, rel=1e-5)
    with pytest.raises(ConfigError, match="takes no weights"):
        make_model(loss=torch.nn.MSELoss()).fit(dataset, _FirstHalfReweighter())


@pytest.mark.slow
def test_compiled_network_trains_the_same(dataset: ToyDataset) -> None:
    compiled_model = fit_model(dataset, compile={"backend": "eager"})
    plain_model = fit_model(dataset)
    for key, value in model_weights(plain_model).items():
        torch.testing.assert_close(model_weights(compiled_model)[key], value)
    copy.deepcopy(compiled_model.network_)


def test_last_weights_are_kept_without_a_valid_segment(dataset: ToyDataset) -> None:
    dataset_without_valid = ToyDataset()
    del dataset_without_valid.segments["valid"]
    model = fit_model(dataset_without_valid)
    assert model.fit_report_["best_epoch"] is None
    assert "valid" not in model.evals_result_
    with pytest.raises(ConfigError, match="no segment 'valid'"):
        make_model(early_stop=3).fit(dataset_without_valid)


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        ("MLP", {}),
        (UserModule(NUM_FEATURES), {"monitor": "own_valid_loss"}),
        (
            {"_target_": "qtorch.nn.TRA", "hidden_size": 8},
            {"module": {"_target_": "qtorch.model.TRAModule"}},
        ),
    ],
    ids=["MLP", "LightningModule", "TRA"],
)
def test_a_fit_leaves_no_features_in_memory(network, changes) -> None:
    packs, original_pack = [], Samples._pack

    def recording_pack(self, device):
        pack = original_pack(self, device)
        packs.append(weakref.ref(pack))
        return pack

    gc.collect()
    gc.disable()  # reference counts alone must free the memory
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Samples, "_pack", recording_pack)
            models = [fit_model(ToyDataset(), network, **changes) for _ in range(2)]
        assert len(packs) >= 4
        assert not any(reference() for reference in packs)
        assert all(model.network_ is not None for model in models)
    finally:
        gc.enable()


def test_without_a_gpu_there_is_no_graph_of_the_training_step() -> None:
    model = fit_model(ToyDataset(), "MLP", epochs=1, cuda_graph="auto")
    assert model.fit_report_["cuda_graph"] == "not used: there is no GPU"
    with pytest.raises(ConfigError, match="cuda_graph=true is not possible: there is no GPU"):
        fit_model(ToyDataset(), "MLP", epochs=1, cuda_graph=True)
