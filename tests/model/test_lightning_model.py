"""The model as its user sees it: arguments, scores, saving, fine-tuning, networks of one's own."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from test_training import model_of, same, state_of
from toy_training import ToyDataset, ToyRecorder

from qtorch.core.errors import (
    ArgumentError,
    ConfigError,
    DataError,
    NotFittedError,
    TrustError,
)
from qtorch.core.serial import State
from qtorch.core.session import init
from qtorch.model import BaseModel, LightningModel, Model, ModelFT
from qtorch.model.progress_bar import BatchBar
from qtorch.nn import LSTM, MLP


@pytest.fixture(scope="module")
def fitted(dataset: ToyDataset) -> LightningModel:
    model = model_of(trainer={"max_epochs": 1})
    model.fit(dataset)
    return model


def test_every_sample_once_in_any_batch_size(dataset: ToyDataset, fitted: LightningModel) -> None:
    samples = dataset.samples("test")
    whole = fitted.predict(dataset)
    assert whole.name == "score"
    assert whole.dtype == np.float32
    assert whole.index.equals(samples.index)
    assert whole.index.names == ["datetime", "instrument"]
    assert whole.index.is_unique
    batch = samples.batch(torch.arange(len(samples)))
    with torch.no_grad():
        by_hand = fitted.network_.eval()(batch.x.transpose(1, 2).flatten(1))
    np.testing.assert_allclose(whole, by_hand.numpy(), rtol=1e-6, atol=1e-7)
    for size in (1, 7, len(samples) - 1, len(samples)):
        fitted.batch["eval_size"] = size
        pd.testing.assert_series_equal(fitted.predict(dataset), whole, rtol=1e-5, atol=1e-6)
    fitted.batch["eval_size"] = None


def test_one_instrument_a_day_is_a_time_series(caplog: pytest.LogCaptureFixture) -> None:
    alone = ToyDataset(num_instruments=1)
    model = model_of(trainer={"max_epochs": 1})
    model.fit(alone)
    assert "every day of 'train' has one instrument alone" in caplog.text
    assert len(model.predict(alone)) == len(alone.samples("test"))
    for compared in ({"monitor": "rank_ic"}, {"day_label": {"zscore": True}}):
        with pytest.raises(DataError, match="compares the instruments of a day"):
            model_of(**compared).fit(alone)


def test_calling_is_predicting_and_a_slice_is_dates(
    dataset: ToyDataset, fitted: LightningModel
) -> None:
    start, end = dataset.segments["test"]
    named = fitted(dataset, "test")
    pd.testing.assert_series_equal(named, fitted.predict(dataset, slice(start, end)))
    one_day = fitted.predict(dataset, slice(end, end))
    assert set(one_day.index.get_level_values("datetime")) == {end}


def test_prediction_makes_no_gradients_and_leaves_the_mode(
    dataset: ToyDataset, fitted: LightningModel
) -> None:
    fitted.network_.train()
    before = {k: v.clone() for k, v in state_of(fitted).items()}
    first, second = fitted.predict(dataset), fitted.predict(dataset)
    assert fitted.network_.training
    pd.testing.assert_series_equal(first, second)
    assert same(before, state_of(fitted))
    fitted.network_.eval()


def test_before_fit(dataset: ToyDataset) -> None:
    for call in (LightningModel.predict, LightningModel.finetune):
        with pytest.raises(NotFittedError, match="call fit"):
            call(model_of(), dataset)


def test_the_family() -> None:
    assert issubclass(LightningModel, ModelFT)
    assert issubclass(ModelFT, Model)
    assert issubclass(Model, BaseModel)
    with pytest.raises(TypeError):
        Model()  # type: ignore[abstract]


def test_wrong_names_say_the_nearest_one(dataset: ToyDataset) -> None:
    with pytest.raises(ArgumentError, match="Did you mean 'max_epochs'"):
        model_of(trainer={"max_epoch": 3})
    with pytest.raises(ArgumentError, match="Did you mean 'early_stop'"):
        LightningModel("LSTM", early_stopp=3)
    with pytest.raises(ConfigError, match="Did you mean 'size'"):
        model_of(batch={"sise": 3})
    with pytest.raises(ConfigError, match="Did you mean 'every_n_steps'"):
        model_of(checkpoint={"every_n_step": 3})
    for changes, text in (
        ({"network": {"_target_": "qtorch.nn.LSTM", "hiden_size": 4}}, "'hidden_size'"),
        ({"network": "LSTMM"}, "'LSTM'"),
        ({"loss": "mes"}, "'mse'"),
        ({"optimizer": "adamm"}, "'Adam'"),
        ({"early_stop": {"patient": 3}}, "'patience'"),
        ({"batch": {"order": "rando"}}, "'random'"),
        ({"inner_steps": 0}, "inner_steps"),
        ({"scheduler": {"scheduler": "torch.optim.lr_scheduler.StepLR", "interva": 1}}, "interval"),
        ({"trainer": {"devices": 0}}, "number of devices"),
        ({"trainer": {"precision": "12-bit"}}, "does not take these trainer arguments"),
        ({"network": {"_target_": "qtorch.nn.Transformer", "nhead": 3}}, "multiple of nhead"),
        ({"callbacks": [pl.callbacks.EMAWeightAveraging()]}, "best epoch"),
    ):
        with pytest.raises(ConfigError, match=text):
            model_of(**changes).fit(dataset)


def test_the_progress_bar_counts_batches(dataset: ToyDataset, monkeypatch) -> None:
    seen = []

    def update(self, number, current, *rest, **more) -> None:
        seen.append((current, self.total_train_batches))

    monkeypatch.setattr(BatchBar, "_update", update)
    model_of(trainer={"max_epochs": 1, "enable_progress_bar": True}, inner_steps=5).fit(dataset)
    assert [pair for pair in seen if pair[0] > 4] == [(5, 16), (10, 16), (15, 16), (16, 16)]


def test_a_login_node_of_a_cluster_is_no_reason_for_a_warning(
    dataset: ToyDataset, tmp_path, monkeypatch, recwarn
) -> None:
    """Lightning's advice to start each command with srun is for another way of working."""
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    model = model_of(trainer={"max_epochs": 1})
    model.fit(dataset)
    model.predict(dataset)
    assert not [w for w in recwarn if "srun" in str(w.message)]


def test_a_trainer_without_checkpoints(dataset: ToyDataset, recorder: ToyRecorder) -> None:
    model_of(checkpoint={}, trainer={"enable_checkpointing": False}).fit(dataset, recorder=recorder)
    assert not list(recorder.checkpoint_dir().glob("*"))


def test_names_in_short(dataset: ToyDataset) -> None:
    model = model_of("GRU", optimizer="adamw", loss="huber", trainer={"max_epochs": 1})
    model.fit(dataset)
    assert type(model.network_).__name__ == "GRU"


def test_what_the_data_know_is_filled_in(dataset: ToyDataset) -> None:
    model = model_of({"_target_": "user_networks.LastStep"}, trainer={"max_epochs": 1})
    model.fit(dataset)
    assert model.network_.linear.in_features == 4
    assert model.network_.step_len == 3
    flat = model_of("MLP", trainer={"max_epochs": 1})
    flat.fit(dataset)
    assert flat.network_config_["d_feat"] == 12
    with pytest.raises(ConfigError, match="d_feat of LSTM is 6, but the data have 4"):
        model_of({"_target_": "qtorch.nn.LSTM", "d_feat": 6}).fit(dataset)


def test_a_live_network_is_copied(dataset: ToyDataset) -> None:
    network = LSTM(d_feat=4, hidden_size=4)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    model = model_of(network, trainer={"max_epochs": 1})
    model.fit(dataset)
    assert same(before, network.state_dict())
    assert not same(before, state_of(model))


def test_a_lightning_module_of_ones_own(dataset: ToyDataset, recorder: ToyRecorder) -> None:
    config = {"_target_": "user_networks.OwnModule"}
    model = model_of(
        config,
        monitor="own_valid_loss",
        trainer={"max_epochs": 3, "gradient_clip_val": 1.0, "accumulate_grad_batches": 2},
        checkpoint={},
    )
    model.fit(dataset, recorder=recorder)
    losses = model.evals_result_["train"]["own_loss"]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert model.fit_report_["best_epoch"] is not None
    scores = model.predict(dataset)
    assert scores.index.equals(dataset.samples("test").index)
    assert {key for key, _ in recorder.history()} == {"own_loss", "own_valid_loss"}
    finer = model.fit_report_["best_value"]
    model.finetune(dataset, trainer={"max_epochs": 2})
    assert model.fit_report_["best_value"] < finer + 0.05


def test_a_module_that_does_not_log_what_is_watched(dataset: ToyDataset) -> None:
    epochs = []

    class Epochs(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            epochs.append(trainer.current_epoch)

    told = r"'valid/loss'.*has logged own_loss, own_valid_loss\. Set monitor"
    model = model_of({"_target_": "user_networks.OwnModule"}, callbacks=[Epochs()])
    with pytest.raises(ConfigError, match=told):
        model.fit(dataset)
    assert epochs == [0]  # it is said after one epoch, not after all of them
    model.monitor = "own_los"
    with pytest.raises(ConfigError, match="best 'own_los'"):
        model.fit(dataset)
    model.monitor = "own_loss"
    model.fit(dataset)
    assert model.fit_report_["best_epoch"] is not None


def test_a_network_that_gives_no_scores(dataset: ToyDataset) -> None:
    with pytest.raises((ValueError, IndexError)):
        model_of({"_target_": "user_networks.Nonsense"}).fit(dataset)


def test_finetune_starts_at_the_fitted_weights(dataset: ToyDataset) -> None:
    model = model_of("LSTM", trainer={"max_epochs": 2})
    model.fit(dataset)
    before = {k: v.clone() for k, v in state_of(model).items()}
    still = {"_target_": "torch.optim.SGD", "lr": 0.0}
    model.finetune(dataset, optimizer=still, trainer={"max_epochs": 1})
    assert same(before, state_of(model))
    assert model.fit_report_["epochs"] == 1
    model.finetune(dataset)
    assert not same(before, state_of(model))


def test_finetune_trains_in_training_mode(dataset: ToyDataset) -> None:
    class Mode(pl.Callback):
        modes: ClassVar[list[bool]] = []

        def on_train_batch_end(self, trainer, pl_module, *rest) -> None:
            self.modes += [m.training for m in pl_module.network.modules()]

    model = model_of("LSTM", callbacks=[Mode()], trainer={"max_epochs": 1})
    model.fit(dataset)
    model.finetune(dataset)
    assert all(Mode.modes)


def test_finetune_in_the_run_of_the_fit_is_a_training_of_its_own(
    dataset: ToyDataset, recorder: ToyRecorder
) -> None:
    model = model_of(checkpoint={}, trainer={"max_epochs": 1})
    model.fit(dataset, recorder=recorder)
    before = {k: v.clone() for k, v in state_of(model).items()}
    model.finetune(dataset, recorder=recorder)
    assert model.fit_report_["resumed_from"] is None
    assert not same(before, state_of(model))


def test_pickle_and_state_keep_everything(dataset: ToyDataset, fitted, tmp_path) -> None:
    expected = fitted.predict(dataset)
    fitted.to_pickle(tmp_path / "model.pkl")
    state = fitted.to_state()
    for copy in (LightningModel.load(tmp_path / "model.pkl"), LightningModel.from_state(state)):
        pd.testing.assert_series_equal(copy.predict(dataset), expected)
        assert copy.evals_result_ == fitted.evals_result_
        assert copy.fit_report_["epochs"] == 1
        copy.finetune(dataset, trainer={"max_epochs": 1})
    unfitted = LightningModel.from_state(model_of().to_state())
    with pytest.raises(NotFittedError):
        unfitted.predict(dataset)


def test_the_state_is_json_and_tensors(dataset: ToyDataset) -> None:
    import json

    model = model_of(MLP(d_feat=12, layers=(8,)), trainer={"max_epochs": 1})
    model.fit(dataset)
    state = model.to_state()
    again = LightningModel.from_state(
        State(json.loads(json.dumps(state.config, allow_nan=False)), state.tensors)
    )
    pd.testing.assert_series_equal(again.predict(dataset), model.predict(dataset))
    assert again.to_config()["network"]["d_feat"] == 12


def test_a_stored_network_of_the_users_needs_their_word(dataset: ToyDataset) -> None:
    model = model_of({"_target_": "user_networks.LastStep"}, trainer={"max_epochs": 1})
    model.fit(dataset)
    state = model.to_state()
    with pytest.raises(TrustError, match="user_networks"):
        LightningModel.from_state(state)
    init(trusted=["user_networks"])
    again = LightningModel.from_state(state)
    pd.testing.assert_series_equal(again.predict(dataset), model.predict(dataset))


def test_a_live_module_of_the_users_has_no_configuration() -> None:
    with pytest.raises(ConfigError, match="live"):
        model_of(torch.nn.Linear(4, 1)).to_config()


def test_config_builds_the_same_model() -> None:
    from qtorch.core.instantiate import init_instance_by_config

    model = model_of(early_stop=3)
    config = model.to_config()
    assert config["_target_"] == "qtorch.model.lightning_model.LightningModel"
    assert init_instance_by_config(config).to_config() == config


def test_nan_features_are_one_clear_error() -> None:
    broken = ToyDataset()
    values = broken.view.groups["feature"]._panel.values
    values[:, 3, 0] = float("nan")
    with pytest.raises(DataError, match=r"training loss of epoch 0 is nan.*Fillna"):
        model_of().fit(broken)


def test_another_number_of_features_is_an_error(fitted: LightningModel) -> None:
    other = ToyDataset()
    columns = other.view.groups["feature"]
    other.view = other.view.with_group("feature", columns.keep(columns.names[:2]))
    with pytest.raises(DataError, match="2 features, the model learnt from 4"):
        fitted.predict(other)
