"""Translation of configurations and tasks with Qlib's names."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

from qtorch import init_instance_by_config
from qtorch.core.errors import ConfigError
from qtorch.core.qlib.notes import Notes, set_path
from qtorch.core.qlib.translation import translate_config, translate_task
from qtorch.core.trust import StoredText, as_stored_text

LSTM = {
    "class": "LSTM",
    "module_path": "qlib.contrib.model.pytorch_lstm_ts",
    "kwargs": {
        "d_feat": 20,
        "n_epochs": 7,
        "lr": 1e-4,
        "early_stop": 5,
        "metric": "loss",
        "loss": "mse",
        "n_jobs": 20,
        "GPU": 0,
        "rnn_type": "GRU",
    },
}


def model_task(name: str, **kwargs: Any) -> dict[str, Any]:
    model = {"class": f"qlib.contrib.model.{name}", "kwargs": kwargs}
    handler = {"class": "qlib.contrib.data.handler.Alpha360", "kwargs": {"label": ["a", "b", "c"]}}
    dataset = {
        "class": "DatasetH",
        "module_path": "qlib.data.dataset",
        "kwargs": {"handler": handler, "segments": {"train": ["2008-01-01", "2014-12-31"]}},
    }
    return {"model": model, "dataset": dataset}


def test_a_model_becomes_a_network_and_the_settings_of_its_training(caplog):
    caplog.set_level(logging.INFO, "qtorch")
    config = translate_config(LSTM)
    assert config == {
        "_target_": "qtorch.model.LightningModel",
        "network": {"_target_": "qtorch.nn.LSTM", "d_feat": 20},
        "trainer": {
            "gradient_clip_val": 3.0,
            "gradient_clip_algorithm": "value",
            "max_epochs": 7,
        },
        "batch": {"drop_last": True, "size": 2000},
        "optimizer": {"lr": 1e-4},
        "early_stop": 5,
        "monitor": "loss",
        "loss": "mse",
    }
    lines = [r.message for r in caplog.records if "n_jobs" in r.message]
    assert len(lines) == 1
    assert "GPU" in lines[0]
    assert "rnn_type" in lines[0]
    model = init_instance_by_config({**LSTM, "kwargs": {"GPU": -1, "hidden_size": 8}})
    assert type(model).__name__ == "LightningModel"
    assert model.trainer["max_epochs"] == 200
    assert model.trainer["accelerator"] == "cpu"
    assert model.network["hidden_size"] == 8


def test_a_class_of_the_same_arguments_keeps_them_and_nested_names_are_translated():
    loader = {"class": "qlib.data.dataset.loader.QlibDataLoader", "kwargs": {"config": ["$close"]}}
    config = {"class": "mine.Handler", "kwargs": {"loaders": [loader], "other": {"class": "X"}}}
    translated = translate_config(config)
    assert translated["kwargs"]["other"] == {"class": "X"}
    assert translated["kwargs"]["loaders"] == [
        {"_target_": "qtorch.data.QlibDataLoader", "config": ["$close"]}
    ]
    hydra = {"_target_": "qlib.data.dataset.processor.Fillna", "_partial_": True, "fill_value": 1}
    assert translate_config(hydra) == {
        "_target_": "qtorch.data.processor.Fillna",
        "_partial_": True,
        "fill_value": 1,
    }
    assert translate_config("qlib.workflow.task.gen.RollingGen") == "qtorch.task.RollingGen"
    generator = init_instance_by_config("qlib.workflow.task.gen.RollingGen")
    assert type(generator).__module__.startswith("qtorch.task")


def test_models_of_trees_keep_their_arguments_but_one():
    notes = Notes()
    config = {"class": "qlib.contrib.model.xgboost.XGBModel",
              "kwargs": {"eta": 0.1, "n_estimators": 647, "nthread": 20}}  # fmt: skip
    assert translate_config(config, notes) == {
        "_target_": "qtorch.model.XGBModel", "eta": 0.1, "nthread": 20
    }  # fmt: skip
    assert list(notes.ignored) == ["n_estimators (XGBModel)"]
    ensemble = {"class": "DEnsembleModel", "module_path": "qlib.contrib.model.double_ensemble",
                "kwargs": {"num_models": 3, "decay": 0.5, "num_leaves": 210}}  # fmt: skip
    assert translate_config(ensemble) == {
        "_target_": "qtorch.model.DEnsembleModel", "num_models": 3, "decay": 0.5, "num_leaves": 210
    }  # fmt: skip


def test_a_file_of_weights_is_where_the_network_starts(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("WARNING")
    (tmp_path / "lstm.pkl").write_bytes(b"weights")

    def translate(title: str, **kwargs: Any) -> dict[str, Any]:
        return translate_config({"class": f"qlib.contrib.model.{title}", "kwargs": kwargs})

    config = translate("pytorch_gats_ts.GATs", base_model="LSTM", model_path="lstm.pkl")
    assert config["init_from"] == f"file:{tmp_path / 'lstm.pkl'}"
    assert not caplog.text
    config = translate("pytorch_igmtf.IGMTF", model_path="run:5")
    assert config["init_from"] == "run:5"
    config = translate("pytorch_add.ADD", model_path="file:elsewhere.pkl")
    assert config["init_from"] == "file:elsewhere.pkl"
    tra = {"model_config": {}, "tra_config": {}}
    assert "init_from" not in translate("pytorch_tra.TRAModel", **tra, init_state="")
    assert not caplog.text
    assert "init_from" not in translate("pytorch_tra.TRAModel", **tra, init_state="lstm.pkl")
    assert "because its weights have other names in qtorch: Qlib's network starts" in caplog.text


@pytest.mark.parametrize(
    ("title", "argument"),
    [("pytorch_igmtf.IGMTF", "model_path"), ("pytorch_tra.TRAModel", "init_state")],
)
@pytest.mark.parametrize("file", ["gru.pkl", "."])
def test_a_file_of_weights_that_does_not_exist_is_an_error_as_in_qlib(
    title, argument, file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = {"class": f"qlib.contrib.model.{title}", "kwargs": {argument: file}}
    path = re.escape(str(tmp_path / file))
    message = f"{argument} of Qlib's .* is '{file}'; there is no file {path}, .*Qlib.*run:RUN_ID"
    with pytest.raises(ConfigError, match=message):
        translate_config(config)


def test_stored_names_stay_stored_text():
    config = translate_config(as_stored_text(LSTM))
    assert isinstance(config["_target_"], StoredText)
    assert isinstance(config["network"]["_target_"], StoredText)
    user_module = {"class": "qlib.contrib.model.pytorch_general_nn.GeneralPTNN"}
    stored = as_stored_text({**user_module, "kwargs": {"pt_model_uri": "os.system"}})
    assert isinstance(translate_config(stored)["network"]["_target_"], StoredText)


def test_a_task_without_qlibs_names_is_returned_as_it_is():
    task = {"model": {"_target_": "qtorch.model.LinearModel"}, "dataset": {"_target_": "a.B"}}
    assert translate_task(task) == task


def test_a_users_module_gets_windows_or_the_features_of_one_day():
    task = model_task(
        "pytorch_general_nn.GeneralPTNN", pt_model_uri="my.Net", pt_model_kwargs={"width": 3}
    )
    network = {"_target_": "my.Net", "width": 3}
    flat = translate_task(task)
    assert flat["model"]["network"] == {"_target_": "qtorch.nn.FlatInput", "network": network}
    task["dataset"]["class"] = "TSDatasetH"
    assert translate_task(task)["model"]["network"] == network
    mlp = translate_task(
        model_task("pytorch_nn.DNNModelPytorch", pt_model_kwargs={"input_dim": 158})
    )
    assert mlp["model"]["network"] == {"_target_": "qtorch.nn.MLP", "d_feat": 158}
    assert mlp["model"]["trainer"]["max_steps"] == 300


def test_arguments_move_to_the_part_that_they_belong_to():
    task = model_task("pytorch_hist.HIST", stock2concept="a.npy", stock_index="b.npy")
    concept = translate_task(task)["dataset"]["extras"]["concept"]
    assert concept["stock2concept"] == "a.npy"
    labels = translate_task(model_task("pytorch_tcts.TCTS", target_label=1, output_dim=3))
    assert labels["dataset"]["handler"]["label"] == ["b", "a", "c"]
    assert labels["model"]["network"]["num_outputs"] == 3
    with pytest.raises(ConfigError, match=r"target_label.*3 labels"):
        translate_task(model_task("pytorch_tcts.TCTS", target_label=3))

    transport = {"transport_method": "router", "lamb": 1.0, "tra_config": {"num_states": 3}}
    task = model_task("pytorch_tra.TRAModel", model_config={"input_size": 6}, **transport)
    memory = {"seq_len": 60, "horizon": 2, "batch_size": 1024, "drop_last": True}
    dataset = task["dataset"]
    dataset |= {"class": "MTSDatasetH", "module_path": "qlib.contrib.data.dataset"}
    dataset["kwargs"] |= memory
    translated = translate_task(task)
    assert translated["dataset"]["_target_"] == "qtorch.data.TSDatasetH"
    assert translated["dataset"]["step_len"] == 60
    assert translated["dataset"]["horizon"] == 2
    assert translated["model"]["batch"] == {"size": 1024, "order": "random", "drop_last": True}
    assert translated["model"]["module"] == {
        "_target_": "qtorch.model.TRAModule",
        "lamb": 1.0,
        "rho": 0.99,
        "alpha": 1.0,
    }
    dataset["kwargs"]["input_size"] = 6
    assert translate_task(task)["dataset"]["_target_"] == "qtorch.data.DatasetH"


def test_a_moved_argument_of_a_single_part_is_a_warning(caplog):
    config = {
        "class": "qlib.contrib.data.dataset.MTSDatasetH",
        "kwargs": {"handler": {}, "segments": {}, "batch_size": 5},
    }
    translate_config(config)
    assert "batch_size of MTSDatasetH belongs to the model" in caplog.text


def test_records_get_qlibs_defaults_and_scores_instead_of_a_model():
    strategy = {
        "class": "TopkDropoutStrategy",
        "module_path": "qlib.contrib.strategy",
        "kwargs": {"model": "<MODEL>", "dataset": "<DATASET>", "topk": 50, "n_drop": 5},
    }
    record = {
        "class": "PortAnaRecord",
        "module_path": "qlib.workflow.record_temp",
        "kwargs": {"config": {"strategy": strategy, "backtest": {"account": 5}}},
    }
    config = translate_config(record)["config"]
    assert config["strategy"]["signal"] == "<PRED>"
    assert config["backtest"] == {"account": 5, "benchmark": "SH000300"}
    strategy["kwargs"] = {"signal": ["<MODEL>", "<DATASET>"], "topk": 3}
    assert translate_config(strategy)["signal"] == "<PRED>"
    with pytest.raises(ConfigError, match="trade_exchange"):
        translate_config({**strategy, "kwargs": {"trade_exchange": 3}})
    soft = translate_config({
        "class": "SoftTopkStrategy",
        "module_path": "qlib.contrib.strategy.cost_control",
        "kwargs": {"model": "<MODEL>", "dataset": "<DATASET>", "topk": 3, "max_sold_weight": 0.1},
    })  # fmt: skip
    target = "qtorch.backtest.SoftTopkStrategy"
    assert soft == {"_target_": target, "signal": "<PRED>", "topk": 3, "max_sold_weight": 0.1}
    analysis = translate_config("qlib.workflow.record_temp.SigAnaRecord")
    assert analysis == {"_target_": "qtorch.record.SigAnaRecord", "ann_scaler": 252}


def test_an_error_says_where_it_is():
    task = model_task("pytorch_gru.GRU", n_epoch=3)
    with pytest.raises(ConfigError, match=r"task.model.kwargs.n_epoch: unknown argument of Qlib"):
        translate_task(task, location="task")
    task = model_task("pytorch_tabnet.TabnetModel", final_out_dim=2)
    with pytest.raises(ConfigError, match=r"task.model.kwargs.final_out_dim: .*only 1 is possible"):
        translate_task(task, location="task")


def test_notes_are_collected_and_mappings_merged():
    notes = Notes()
    translate_config(LSTM, notes)
    assert set(notes.ignored) == {"n_jobs (LSTM)", "GPU (LSTM)", "rnn_type (LSTM)"}
    assert set_path({"a": {"b": 1}}, "a", {"c": 2}) == {"a": {"b": 1, "c": 2}}
    assert set_path({"a": {"b": 1}}, "a", {"_target_": "x"}) == {"a": {"_target_": "x"}}
    assert set_path({}, "a.b.c", 1) == {"a": {"b": {"c": 1}}}


def test_the_executor_of_a_record_stays_a_mapping_of_the_backtest():
    executor = {
        "class": "SimulatorExecutor",
        "module_path": "qlib.backtest.executor",
        "kwargs": {"time_per_step": "day", "generate_portfolio_metrics": True},
    }
    record = {
        "class": "PortAnaRecord",
        "module_path": "qlib.workflow.record_temp",
        "kwargs": {"config": {"executor": executor}},
    }
    task = translate_task({"record": [record]})
    assert task["record"][0]["config"]["executor"] == {
        "class": "SimulatorExecutor",
        "kwargs": {"time_per_step": "day", "generate_portfolio_metrics": True},
    }
    assert translate_task(task) == task  # a job's task is translated again when it is trained
    executor["class"] = "NestedExecutor"
    with pytest.raises(ConfigError, match=r"^record\[0\].*executor: .*no nested execution"):
        translate_task({"record": [record]})


def test_the_segments_of_tabnets_pretraining_are_those_of_its_training(caplog):
    task = model_task("pytorch_tabnet.TabnetModel", pretrain=True)
    segments = task["dataset"]["kwargs"]["segments"]
    expected_segments = dict(segments)
    segments |= {"pretrain": segments["train"], "pretrain_validation": segments["train"]}
    assert translate_task(task)["dataset"]["segments"] == expected_segments
    caplog.clear()
    translate_config(task["model"])
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
