"""LightningModel as users see it: arguments, scores, saving, fine-tuning, custom networks."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from toy_training import ToyDataset, ToyRecorder, fit_model, make_model, model_weights, same_weights
from user_networks import LastStep

from qtorch.core.errors import ArgumentError, ConfigError, DataError, NotFittedError, TrustError
from qtorch.core.serial import State
from qtorch.core.session import set_defaults
from qtorch.core.trust import StoredText, as_stored_text
from qtorch.model import BaseModel, LightningModel, Model, ModelFT
from qtorch.model.finetune import load_weights_file
from qtorch.model.loop.callbacks import BatchProgressBar
from qtorch.model.loop.options import (
    DEFAULT_INNER_STEPS,
    FREQUENT_INNER_STEPS,
    resolve_inner_steps,
    trainer_options,
)
from qtorch.nn import LSTM, MLP
from qtorch.process.heartbeat import listen


@pytest.fixture(scope="module")
def short_model(dataset: ToyDataset) -> LightningModel:
    model = fit_model(dataset, epochs=1)
    return model


def test_predict_scores_every_sample_once_at_any_batch_size(
    dataset: ToyDataset, short_model: LightningModel
) -> None:
    samples = dataset.samples("test")
    scores = short_model.predict(dataset)
    assert scores.name == "score"
    assert scores.dtype == np.float32
    assert scores.index.equals(samples.index)
    assert scores.index.names == ["datetime", "instrument"]
    assert scores.index.is_unique
    batch = samples.batch(torch.arange(len(samples)))
    with torch.no_grad():
        expected_scores = short_model.network_.eval()(batch.x.transpose(1, 2).flatten(1))
    np.testing.assert_allclose(scores, expected_scores.numpy(), rtol=1e-6, atol=1e-7)
    for size in (1, 7, len(samples) - 1, len(samples)):
        short_model.batch["eval_size"] = size
        pd.testing.assert_series_equal(short_model.predict(dataset), scores, rtol=1e-5, atol=1e-6)
    short_model.batch["eval_size"] = None


@pytest.mark.parametrize(("monitor", "sign"), [("loss", -1.0), ("rank_ic", 1.0)])
def test_fit_lists_a_score_per_epoch_and_segment_as_qlibs_networks(
    dataset: ToyDataset, monitor: str, sign: float
) -> None:
    model = make_model(epochs=3, monitor=monitor)
    evals_result: dict[str, list[float]] = {"train": [7.0], "mine": [1.0]}
    model.fit(dataset, evals_result=evals_result)
    curves = model.evals_result_
    assert evals_result == {
        "train": [-value for value in curves["train"]["loss"]],
        "valid": [sign * value for value in curves["valid"][monitor]],
        "mine": [1.0],
    }
    assert len(evals_result["train"]) == len(evals_result["valid"]) == 3
    # The best epoch is the one with the highest score.
    best = max(range(3), key=evals_result["valid"].__getitem__)
    assert model.fit_report_["best_epoch"] == best


def test_fit_writes_the_best_weights_to_a_file(dataset: ToyDataset, tmp_path: Path) -> None:
    file = tmp_path / "new" / "weights.bin"
    model = make_model(epochs=3)
    model.fit(dataset, save_path=file)
    assert model.network_ is not None
    weights = torch.load(file, weights_only=True)
    assert list(weights) == list(model.network_.state_dict())
    for name, value in model.network_.state_dict().items():
        assert torch.equal(weights[name], value)
    # It is a file that another training can start from.
    assert load_weights_file(str(file)).keys() == weights.keys()
    with pytest.raises(ConfigError, match="is a folder"):
        make_model().fit(dataset, save_path=tmp_path)


def test_the_batch_size_of_a_prediction_changes_no_score(
    short_model: LightningModel, dataset: ToyDataset
) -> None:
    scores = short_model.predict(dataset)
    sizes = []
    assert short_model.network_ is not None
    hook = short_model.network_.register_forward_pre_hook(
        lambda _, inputs: sizes.append(len(inputs[0]))
    )
    small = short_model.predict(dataset, batch_size=7)
    hook.remove()
    pd.testing.assert_series_equal(small, scores, rtol=1e-5, atol=1e-6)
    assert max(sizes) == 7


def test_one_instrument_a_day_trains_a_time_series_model(caplog: pytest.LogCaptureFixture) -> None:
    single_instrument = ToyDataset(num_instruments=1)
    model = fit_model(single_instrument, epochs=1)
    assert "every day of 'train' has only one instrument" in caplog.text
    assert len(model.predict(single_instrument)) == len(single_instrument.samples("test"))
    for cross_section_options in ({"monitor": "rank_ic"}, {"day_label": {"zscore": True}}):
        with pytest.raises(DataError, match="compares the instruments of a day"):
            make_model(**cross_section_options).fit(single_instrument)


def test_calling_the_model_predicts_and_a_slice_selects_dates(
    dataset: ToyDataset, short_model: LightningModel
) -> None:
    start, end = dataset.segments["test"]
    by_name = short_model(dataset, "test")
    pd.testing.assert_series_equal(by_name, short_model.predict(dataset, slice(start, end)))
    one_day = short_model.predict(dataset, slice(end, end))
    assert set(one_day.index.get_level_values("datetime")) == {end}


def test_prediction_changes_neither_weights_nor_training_mode(
    dataset: ToyDataset, short_model: LightningModel
) -> None:
    short_model.network_.train()
    weights = {k: v.clone() for k, v in model_weights(short_model).items()}
    first, second = short_model.predict(dataset), short_model.predict(dataset)
    assert short_model.network_.training
    pd.testing.assert_series_equal(first, second)
    assert same_weights(weights, model_weights(short_model))
    short_model.network_.eval()


def test_predict_and_finetune_before_fit_raise(dataset: ToyDataset) -> None:
    for call in (LightningModel.predict, LightningModel.finetune):
        with pytest.raises(NotFittedError, match="call fit"):
            call(make_model(), dataset)


def test_class_hierarchy() -> None:
    assert issubclass(LightningModel, ModelFT)
    assert issubclass(ModelFT, Model)
    assert issubclass(Model, BaseModel)
    with pytest.raises(TypeError):
        Model()  # type: ignore[abstract]


def test_errors_suggest_the_nearest_valid_name(dataset: ToyDataset) -> None:
    with pytest.raises(ArgumentError, match="Did you mean 'max_epochs'"):
        make_model(trainer={"max_epoch": 3})
    with pytest.raises(ArgumentError, match="Did you mean 'early_stop'"):
        LightningModel("LSTM", early_stopp=3)
    with pytest.raises(ConfigError, match="Did you mean 'size'"):
        make_model(batch={"sise": 3})
    with pytest.raises(ConfigError, match="Did you mean 'every_n_steps'"):
        make_model(checkpoint={"every_n_step": 3})
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
        ({"trainer": {"precision": "12-bit"}}, "rejects these trainer arguments"),
        ({"network": {"_target_": "qtorch.nn.Transformer", "nhead": 3}}, "multiple of nhead"),
        ({"callbacks": [pl.callbacks.StochasticWeightAveraging(0.1)]}, "EMAWeightAveraging"),
    ):
        with pytest.raises(ConfigError, match=text):
            make_model(**changes).fit(dataset)


def test_training_steps_have_fewer_batches_where_progress_is_shown() -> None:
    numbers = [
        resolve_inner_steps("auto", trainer_options({"enable_progress_bar": shows}, ()), 1000)
        for shows in (False, True)
    ]
    assert numbers == [DEFAULT_INNER_STEPS, FREQUENT_INNER_STEPS]
    options = trainer_options({"enable_progress_bar": False}, ())
    assert resolve_inner_steps("auto", options, 1000, num_ranks=2) == FREQUENT_INNER_STEPS
    with listen(lambda stage, details: None):
        assert resolve_inner_steps("auto", options, 1000) == FREQUENT_INNER_STEPS


def test_progress_bar_counts_batches(dataset: ToyDataset, monkeypatch) -> None:
    progress = []

    def update(self, number, current, *args, **kwargs) -> None:
        progress.append((current, self.total_train_batches))

    monkeypatch.setattr(BatchProgressBar, "_update", update)
    make_model(trainer={"max_epochs": 1, "enable_progress_bar": True}, inner_steps=5).fit(dataset)
    assert [pair for pair in progress if pair[0] > 4] == [(5, 16), (10, 16), (15, 16), (16, 16)]


def test_no_warning_about_srun_on_a_login_node(
    dataset: ToyDataset, tmp_path, monkeypatch, recwarn
) -> None:
    """Lightning advises to start commands with srun, which does not apply here."""
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    model = fit_model(dataset, epochs=1)
    model.predict(dataset)
    assert not [w for w in recwarn if "srun" in str(w.message)]


def test_checkpoints_can_be_disabled_in_the_trainer(
    dataset: ToyDataset, recorder: ToyRecorder
) -> None:
    make_model(checkpoint={}, trainer={"enable_checkpointing": False}).fit(
        dataset, recorder=recorder
    )
    assert not list(recorder.checkpoint_dir().glob("*"))


def test_short_names_of_network_optimizer_and_loss(dataset: ToyDataset) -> None:
    model = fit_model(dataset, "GRU", optimizer="adamw", loss="huber", epochs=1)
    assert type(model.network_).__name__ == "GRU"


def test_network_dimensions_are_filled_in_from_the_data(dataset: ToyDataset) -> None:
    model = fit_model(dataset, {"_target_": "user_networks.LastStep"}, epochs=1)
    assert model.network_.linear.in_features == 4
    assert model.network_.step_len == 3
    flat = fit_model(dataset, "MLP", epochs=1)
    assert flat.network_config_["d_feat"] == 12
    with pytest.raises(ConfigError, match="d_feat of LSTM is 6, but the data have 4"):
        make_model({"_target_": "qtorch.nn.LSTM", "d_feat": 6}).fit(dataset)


def test_live_network_is_copied(dataset: ToyDataset) -> None:
    network = LSTM(d_feat=4, hidden_size=4)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    model = fit_model(dataset, network, epochs=1)
    assert same_weights(before, network.state_dict())
    assert not same_weights(before, model_weights(model))


def test_user_module_trains_logs_and_predicts(dataset: ToyDataset, recorder: ToyRecorder) -> None:
    config = {"_target_": "user_networks.UserModule"}
    model = fit_model(
        dataset,
        config,
        monitor="own_valid_loss",
        trainer={"max_epochs": 3, "gradient_clip_val": 1.0, "accumulate_grad_batches": 2},
        checkpoint={},
        recorder=recorder,
    )
    losses = model.evals_result_["train"]["own_loss"]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert model.fit_report_["best_epoch"] is not None
    scores = model.predict(dataset)
    assert scores.index.equals(dataset.samples("test").index)
    assert {key for key, _ in recorder.history()} == {"own_loss", "own_valid_loss"}
    best_value = model.fit_report_["best_value"]
    model.finetune(dataset, trainer={"max_epochs": 2})
    assert model.fit_report_["best_value"] < best_value + 0.05


def test_user_module_must_log_the_monitored_metric(dataset: ToyDataset) -> None:
    epochs = []

    class EpochRecorder(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            epochs.append(trainer.current_epoch)

    message = r"'valid/loss'.*logged own_loss, own_valid_loss\. Set monitor"
    model = make_model({"_target_": "user_networks.UserModule"}, callbacks=[EpochRecorder()])
    with pytest.raises(ConfigError, match=message):
        model.fit(dataset)
    assert epochs == [0]  # it raises after one epoch, not after all of them
    model.monitor = "own_los"
    with pytest.raises(ConfigError, match="monitor, 'own_los'"):
        model.fit(dataset)
    model.monitor = "own_loss"
    model.fit(dataset)
    assert model.fit_report_["best_epoch"] is not None


def test_network_without_scores_raises(dataset: ToyDataset) -> None:
    with pytest.raises((ValueError, IndexError)):
        make_model({"_target_": "user_networks.OneScoreNetwork"}).fit(dataset)


def test_finetune_starts_from_the_fitted_weights(dataset: ToyDataset) -> None:
    model = fit_model(dataset, "LSTM", epochs=2)
    weights = {k: v.clone() for k, v in model_weights(model).items()}
    zero_rate = {"_target_": "torch.optim.SGD", "lr": 0.0}
    model.finetune(dataset, optimizer=zero_rate, trainer={"max_epochs": 1})
    assert same_weights(weights, model_weights(model))
    assert model.fit_report_["epochs"] == 1
    model.finetune(dataset)
    assert not same_weights(weights, model_weights(model))


def test_finetune_runs_in_training_mode(dataset: ToyDataset) -> None:
    class ModeRecorder(pl.Callback):
        modes: ClassVar[list[bool]] = []

        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            self.modes += [m.training for m in pl_module.network.modules()]

    model = fit_model(dataset, "LSTM", callbacks=[ModeRecorder()], epochs=1)
    model.finetune(dataset)
    assert all(ModeRecorder.modes)


def test_finetune_in_the_same_run_does_not_resume_the_fit(
    dataset: ToyDataset, recorder: ToyRecorder
) -> None:
    model = fit_model(dataset, checkpoint={}, epochs=1, recorder=recorder)
    weights = {k: v.clone() for k, v in model_weights(model).items()}
    model.finetune(dataset, recorder=recorder)
    assert model.fit_report_["resumed_from"] is None
    assert not same_weights(weights, model_weights(model))


def test_pickle_and_state_round_trip(dataset: ToyDataset, short_model, tmp_path) -> None:
    expected = short_model.predict(dataset)
    short_model.to_pickle(tmp_path / "model.pkl")
    state = short_model.to_state()
    for loaded_model in (
        LightningModel.load(tmp_path / "model.pkl", trusted_pickle=True),
        LightningModel.from_state(state),
    ):
        pd.testing.assert_series_equal(loaded_model.predict(dataset), expected)
        assert loaded_model.evals_result_ == short_model.evals_result_
        assert loaded_model.fit_report_["epochs"] == 1
        loaded_model.finetune(dataset, trainer={"max_epochs": 1})
    unfitted_model = LightningModel.from_state(make_model().to_state())
    with pytest.raises(NotFittedError):
        unfitted_model.predict(dataset)


def test_state_is_json_and_tensors(dataset: ToyDataset) -> None:
    import json

    model = fit_model(dataset, MLP(d_feat=12, layers=(8,)), epochs=1)
    state = model.to_state()
    loaded_model = LightningModel.from_state(
        State(json.loads(json.dumps(state.config, allow_nan=False)), state.tensors)
    )
    pd.testing.assert_series_equal(loaded_model.predict(dataset), model.predict(dataset))
    assert loaded_model.to_config()["network"]["d_feat"] == 12


def state_from_store(model: LightningModel) -> State:
    """The state of a model as it is read from a store."""
    state = model.to_state()
    return State(as_stored_text(state.config), state.tensors)


def test_stored_user_network_must_be_trusted(dataset: ToyDataset) -> None:
    model = fit_model(dataset, {"_target_": "user_networks.LastStep"}, epochs=1)
    state = state_from_store(model)
    with pytest.raises(TrustError, match="user_networks"):
        LightningModel.from_state(state)
    set_defaults(trusted=["user_networks"])
    loaded_model = LightningModel.from_state(state)
    pd.testing.assert_series_equal(loaded_model.predict(dataset), model.predict(dataset))


def test_stored_names_that_predict_imports_must_be_trusted(dataset: ToyDataset) -> None:
    for name in ("loss", "module"):
        model = fit_model(dataset, epochs=1)
        setattr(model, name, StoredText("user_networks.Unknown"))
        with pytest.raises(TrustError, match="user_networks"):
            model.predict(dataset)


def test_module_prepares_the_samples_of_a_prediction(dataset: ToyDataset) -> None:
    model = fit_model(dataset, module="user_networks.ReversedInputs", epochs=1)
    prepared = model.predict(dataset)
    model.module = None
    assert not prepared.equals(model.predict(dataset))


def test_live_user_module_has_no_configuration() -> None:
    with pytest.raises(ConfigError, match="live"):
        make_model(torch.nn.Linear(4, 1)).to_config()


def test_config_builds_the_same_model() -> None:
    from qtorch.core.instantiate import init_instance_by_config

    model = make_model(early_stop=3)
    config = model.to_config()
    assert config["_target_"] == "qtorch.model.LightningModel"
    assert init_instance_by_config(config).to_config() == config


def test_a_class_is_built_and_saved_as_its_import_path_is(dataset: ToyDataset) -> None:
    model, named = make_model(LastStep), make_model("user_networks.LastStep")
    for each in (model, named):
        each.fit(dataset)
    assert same_weights(model_weights(model), model_weights(named))
    assert model.to_config()["network"] == {"_target_": "user_networks.LastStep"}
    assert model.network_config_ == named.network_config_
    state = model.to_state()
    assert LightningModel.from_state(state).predict(dataset).equals(model.predict(dataset))


def test_a_class_that_no_configuration_can_name_is_refused(dataset: ToyDataset) -> None:
    class Local(LastStep):
        pass

    with pytest.raises(ConfigError, match="cannot be imported by name; define it at the top level"):
        make_model(Local).fit(dataset)
    with pytest.raises(ConfigError, match=r"is the class dict; expected a class of torch\.nn"):
        make_model(dict)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("lr", "optimizer={'lr': ...}"),
        ("learning_rate", "optimizer={'lr': ...}"),
        ("weight_decay", "optimizer={'weight_decay': ...}"),
        ("n_epochs", "trainer={'max_epochs': ...}"),
        ("max_epochs", "trainer={'max_epochs': ...}"),
        ("batch_size", "batch={'size': ...}"),
        ("hidden_size", "network={'_target_': 'qtorch.nn.LSTM', 'hidden_size': ...}"),
        ("kernel_size", "network={'_target_': 'qtorch.nn."),
        ("early_stp", "'early_stop'"),
    ],
)
def test_an_argument_of_a_part_is_named_with_its_part(name: str, place: str) -> None:
    with pytest.raises(ArgumentError) as error:
        LightningModel("GRU", **{name: 1})
    assert f"Did you mean {place}" in str(error.value)
    assert name != "lr" or LightningModel("GRU", optimizer={"lr": 1}).check_settings() is None


def test_nan_features_raise_a_clear_error() -> None:
    dataset_with_nan = ToyDataset()
    values = dataset_with_nan.view.groups["feature"]._panel.values
    values[:, 3, 0] = float("nan")
    with pytest.raises(DataError, match=r"training loss of epoch 0 is nan.*Fillna"):
        make_model().fit(dataset_with_nan)


def test_another_number_of_features_raises(short_model: LightningModel) -> None:
    smaller_dataset = ToyDataset()
    columns = smaller_dataset.view.groups["feature"]
    smaller_dataset.view = smaller_dataset.view.with_group(
        "feature", columns.keep(columns.names[:2])
    )
    with pytest.raises(DataError, match="2 features, but the model was trained on 4"):
        short_model.predict(smaller_dataset)


@pytest.mark.parametrize(
    "layer", [torch.nn.Linear(7, 1), torch.nn.LayerNorm(7), torch.nn.BatchNorm1d(7)]
)
def test_layers_of_another_size_are_told_the_sizes_of_the_data(layer: torch.nn.Module) -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), layer)
    with pytest.raises(ConfigError, match=r"another size: .* The data have 4 features and \d"):
        make_model(network).fit(ToyDataset())
