"""Names of Qlib in a program after `install()`: its arguments, and what has no counterpart."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import qtorch
from qtorch.compat import qlib as compat
from qtorch.core.errors import ArgumentError, ConfigError
from qtorch.core.qlib.notes import Notes
from qtorch.core.qlib.translation import (
    check_definition_trust,
    keep_class_form,
    translate_config,
    translate_task,
)
from qtorch.core.session import session
from qtorch.core.trust import StoredText, TrustError, as_stored_text
from qtorch.data import D, NameDFilter, SyntheticSource, exists_qlib_data, write_qlib
from qtorch.data.handler.provider import DataProvider


@pytest.fixture
def module(monkeypatch):
    """Import modules of Qlib by qtorch."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "qlib"]:
        monkeypatch.delitem(sys.modules, name)
    compat.install()
    yield importlib.import_module
    compat.uninstall()


@pytest.fixture(scope="module")
def provider(tmp_path_factory):
    market = SyntheticSource(6, "2019-01-01", "2019-06-28", seed=1)
    return write_qlib(market, tmp_path_factory.mktemp("market") / "bars")


def test_classes_take_qlibs_arguments(module):
    lstm = module("qlib.contrib.model.pytorch_lstm").LSTM
    model = lstm(d_feat=6, hidden_size=8, n_epochs=3, lr=1e-4, early_stop=7, GPU=-1)
    assert type(model) is qtorch.model.LightningModel
    assert isinstance(model, lstm)
    assert model.network["hidden_size"] == 8
    assert model.trainer["max_epochs"] == 3
    assert model.trainer["accelerator"] == "cpu"
    with pytest.raises(ArgumentError, match="Did you mean 'hidden_size'"):
        lstm(hidden_sizes=8)
    with pytest.raises(ArgumentError, match="pass its arguments by their names"):
        lstm(6)
    with pytest.raises(ConfigError, match="a subclass of it cannot be Qlib's LSTM"):
        type("Mine", (lstm,), {})


def test_classes_with_the_same_arguments_can_be_subclassed(module):
    strategy = module("qlib.contrib.strategy").TopkDropoutStrategy
    own_class = type("Own", (strategy,), {"get_risk_degree": lambda self, trade_step=None: 0.5})
    scores = pd.Series(
        [1.0],
        pd.MultiIndex.from_tuples(
            [(pd.Timestamp("2020-01-02"), "A")], names=["datetime", "instrument"]
        ),
    )
    own_strategy = own_class(signal=scores, topk=3, n_drop=1)
    assert own_strategy.topk == 3
    assert own_strategy.read_risk_degree(0) == 0.5
    assert isinstance(own_strategy, strategy)
    assert isinstance(strategy(signal=scores, topk=3, n_drop=1), strategy)
    assert not isinstance(strategy(signal=scores, topk=3, n_drop=1), own_class)


def test_a_name_is_found_before_a_module_of_the_same_name(module):
    assert callable(module("qlib.backtest").backtest)
    executor = module("qlib.backtest").executor = module("qlib.backtest.executor")
    assert executor.SimulatorExecutor(time_per_step="day").time_per_step == "day"
    report = module("qlib.contrib.report.analysis_position")
    assert report.report_graph is qtorch.record.report.graphs.report_graph


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qlib.tests.data.GetData", "data are not downloaded"),
        ("qlib.workflow.online.manager.OnlineManager", "nearest is qtorch rolling"),
        ("qlib.config.C", "arguments of qtorch.init"),
        ("qlib.utils.get_pre_trading_date", "qtorch knows no 'qlib.utils.get_pre_trading_date'"),
    ],
)
def test_what_is_not_there_says_so(module, name, text):
    package, _, title = name.rpartition(".")
    with pytest.raises(ImportError, match=text):
        getattr(module(package), title)


def test_a_module_that_is_not_there_says_so(module):
    with pytest.raises(ModuleNotFoundError, match=r"no part of Qlib's module 'qlib\.rl'"):
        module("qlib.rl")


def test_of_two_names_of_a_tree_parameter_the_main_one_counts():
    notes = Notes()
    config = {
        "class": "qlib.contrib.model.gbdt.LGBModel",
        "kwargs": {"colsample_bytree": 0.7, "feature_fraction": 0.8, "subsample": 0.9},
    }
    translated = translate_config(config, notes)
    assert translated == {
        "_target_": "qtorch.model.LGBModel",
        "feature_fraction": 0.8,
        "subsample": 0.9,
    }
    assert "colsample_bytree (LGBModel)" in notes.ignored


def test_mongo_is_the_url_of_the_task_pools(module, tmp_path):
    mongo = {"task_url": "mongodb://127.0.0.1:27017/", "task_db_name": "rolling"}
    module("qlib").init(provider_uri=str(tmp_path), mongo=mongo)
    assert session().task_url == "mongodb://127.0.0.1:27017/rolling"
    with pytest.raises(ConfigError, match="task_db_name"):
        module("qlib").init(provider_uri=str(tmp_path), mongo={"task_url": "mongodb://x"})


# -- stored tasks ----------------------------------------------------------------------------------


def example_task():
    return {
        "model": {
            "class": "LSTM",
            "module_path": "qlib.contrib.model.pytorch_lstm_ts",
            "kwargs": {"n_epochs": 2},
        },
        "dataset": {
            "class": "TSDatasetH",
            "module_path": "qlib.data.dataset",
            "kwargs": {
                "handler": {
                    "class": "Alpha158",
                    "module_path": "qlib.contrib.data.handler",
                    "kwargs": {"instruments": "csi300"},
                },
                "segments": {"train": ["2008-01-01", "2014-12-31"]},
            },
        },
    }


def test_a_task_keeps_its_form():
    task = example_task()
    translated = translate_task(task)
    model, dataset = (keep_class_form(task[key], translated[key]) for key in ("model", "dataset"))
    assert (model["class"], model["module_path"]) == ("LightningModel", "qtorch.model")
    assert model["kwargs"]["trainer"]["max_epochs"] == 2
    assert dataset["kwargs"]["segments"] == task["dataset"]["kwargs"]["segments"]
    handler = dataset["kwargs"]["handler"]
    assert handler == {
        "class": "Alpha158",
        "module_path": "qtorch.data",
        "kwargs": {"instruments": "csi300"},
    }
    own_form = {"_target_": "qlib.contrib.model.linear.LinearModel"}
    assert "_target_" in keep_class_form(own_form, translate_config(own_form))


def test_names_of_stored_tasks_stay_stored_text():
    task = as_stored_text(example_task())
    model = keep_class_form(task["model"], translate_task(task)["model"])
    assert isinstance(model["class"], StoredText)
    assert isinstance(model["module_path"], StoredText)
    check_definition_trust(task)
    task["model"] = as_stored_text({"class": "os.system", "kwargs": {}})
    with pytest.raises(TrustError, match=r"os\.system"):
        check_definition_trust(task)


# -- functions -------------------------------------------------------------------------------------


def test_auto_init_finds_the_settings_of_the_project(module, tmp_path):
    qlib = module("qlib")
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "shared.yaml").write_text(f"provider_uri: {tmp_path}\nregion: cn\n")
    (tmp_path / "config.yaml").write_text(
        "conf_type: ref\nqlib_cfg: shared.yaml\nqlib_cfg_update: {region: tw}\n"
    )
    qlib.auto_init(cur_path=tmp_path / "deep" / "deeper")
    assert (session().region, session().provider_uri) == ("tw", str(tmp_path))
    qlib.auto_init(cur_path=tmp_path / "deep", region="us")  # it is initialized already
    assert session().region == "tw"
    qlib.auto_init(cur_path=tmp_path / "deep", region="us", skip_if_reg=False)
    assert session().region == "us"
    assert qlib.get_project_path(cur_path=tmp_path / "deep") == tmp_path
    with pytest.raises(FileNotFoundError, match=r"no other\.yaml in"):
        qlib.get_project_path("other.yaml", tmp_path)
    (tmp_path / "config.yaml").write_text("conf_type: copy\n")
    with pytest.raises(ConfigError, match="conf_type is 'copy'"):
        qlib.auto_init(cur_path=tmp_path, skip_if_reg=False)


def test_the_folder_of_a_path_is_created(module, tmp_path):
    get_or_create_path = module("qlib.utils").get_or_create_path
    file, folder = tmp_path / "a" / "weights.bin", tmp_path / "b"
    assert get_or_create_path(file) == file
    assert file.parent.is_dir()
    assert not file.exists()
    assert get_or_create_path(folder, return_dir=True) == folder
    assert folder.is_dir()
    for is_dir in (False, True):
        path = Path(get_or_create_path(return_dir=is_dir))
        assert path.is_dir() == is_dir
        path.rmdir() if is_dir else path.unlink()


def test_a_class_is_cast_for_a_block(module):
    class Base:
        pass

    class Special(Base):
        def title(self):
            return "special"

    value = Base()
    with pytest.raises(KeyError), module("qlib.utils.mod").class_casting(value, Special):
        assert value.title() == "special"
        raise KeyError
    assert type(value) is Base


def test_frequencies(module):
    freq = module("qlib.utils.time").Freq
    assert freq.parse("30min") == (30, "min")
    assert "{}{}".format(*freq.parse("day")) == "1day"
    assert str(freq("1day")) == "day"
    assert freq("60min") == "60min"


def test_the_examples_tasks_translate(module):
    config = module("qlib.tests.config")
    task = translate_task(config.CSI300_GBDT_TASK)
    assert task["model"]["_target_"] == "qtorch.model.LGBModel"
    assert task["model"]["num_leaves"] == 210
    assert task["dataset"]["handler"]["instruments"] == "csi300"
    rolling = config.CSI100_RECORD_LGB_TASK_CONFIG_ROLLING
    assert rolling["dataset"]["kwargs"]["segments"]["train"] == ("2013-01-01", "2014-12-31")
    task = translate_task(config.CSI100_RECORD_XGBOOST_TASK_CONFIG)
    assert task["model"]["_target_"] == "qtorch.model.XGBModel"


# -- D ---------------------------------------------------------------------------------------------


def test_d_reads_the_data_of_the_session(provider):
    assert exists_qlib_data(provider)
    assert not exists_qlib_data(provider / "nowhere")
    qtorch.init(provider_uri=str(provider))
    days = D.calendar("2019-03-01", "2019-03-29")
    assert (days[0], len(days)) == (pd.Timestamp("2019-03-01"), 21)
    frame = D.features(D.instruments("stocks"), ["$close", "Ref($close, 1)"], days[0], days[-1])
    assert frame.index.names == ["instrument", "datetime"]
    assert list(frame) == ["$close", "Ref($close, 1)"]
    close = frame["$close"].unstack(0)
    np.testing.assert_allclose(
        frame["Ref($close, 1)"].unstack(0).iloc[5], close.ffill().iloc[4], rtol=1e-6
    )
    with pytest.raises(ConfigError, match="calendars of the future"):
        D.calendar(future=True)


def test_instruments_pass_filters_and_dates(provider):
    data = DataProvider(qtorch.data.QlibSource(provider))
    every_name = data.list_instruments(data.instruments("stocks"), as_list=True)
    assert len(every_name) == 6
    universe = data.instruments("stocks", filter_pipe=[NameDFilter("S[0-2]")])
    spans = data.list_instruments(universe, "2019-03-01", "2019-03-29")
    assert list(spans) == ["S0", "S1", "S2"]
    assert min(first for part in spans.values() for first, _ in part) >= pd.Timestamp("2019-03-01")
    names = data.features(universe, ["$close"], "2019-03-01", "2019-03-05").index.unique(0)
    assert list(names) == ["S0", "S1", "S2"]
    whole = data.list_instruments(["S1"], "2019-03-01", "2019-03-29")
    assert [(a.day, b.day) for a, b in whole["S1"]] == [(1, 29)]
    assert data.list_instruments({"S1": [("2019-01-01", "2019-02-01")]}, "2019-03-01") == {}
