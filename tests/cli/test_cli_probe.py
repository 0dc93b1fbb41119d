"""Tests of `qtorch probe`: exit codes, files, and no false alarm on any shipped model."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from model_libraries import require_model_library

from qtorch.cli.compose import compose_settings, config_path, resolve_segments
from qtorch.cli.main import main
from qtorch.cli.probe import shorten_training
from qtorch.core.instantiate import init_instance_by_config
from qtorch.study import ProbeReport, probe
from qtorch.study.leakage.report import LEAK, OK, Line

MODELS = sorted(path.stem for path in (config_path() / "model").glob("*.yaml"))
# What a model's comments ask for.
OVERRIDES = {
    "lightning": ["+model.network._target_=qtorch.nn.GRU"],
    "mlp": ["dataset=day"],
    "tabnet": ["dataset=day"],
    "sfm": ["handler=alpha360", "dataset=day"],
    "tcts": ['handler.label=["Ref($close,-2)/Ref($close,-1)-1","Ref($close,-3)/Ref($close,-1)-1"]'],
}


@pytest.fixture
def short_probe(monkeypatch):
    """Replace the probe by one that returns a report at once; yields its calls."""
    calls = []

    def replacement(dataset, model=None, **options):
        calls.append(options)
        verdict = LEAK if options["methods"] == ["scale"] else OK
        lines = [Line("features", verdict, "20 cells")]
        return ProbeReport(lines, [pd.Timestamp("2020-03-02")], tuple(options["methods"]), {})

    monkeypatch.setattr("qtorch.study.leakage.probe.probe", replacement)
    return calls


def test_exit_code_and_files(short_probe, tmp_path, capsys):
    files = [f"json={tmp_path}/r.json", f"page={tmp_path}/r.html"]
    settings = ["data=synthetic_tiny", "fit=false", "dates=[2020-03-02]"]
    assert main(["probe", *settings, *files]) == 0
    assert "no leak found" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["leak"] is False
    assert "features" in (tmp_path / "r.html").read_text()
    assert main(["probe", *settings, "methods=[scale]"]) == 1
    assert "1 of 1 lines leak: features" in capsys.readouterr().out
    assert short_probe[0]["dates"] == ["2020-03-02"]


def test_help_and_wrong_file_names(capsys):
    assert main(["probe", "--help"]) == 0
    assert "exit code: 0 if there is no leak" in capsys.readouterr().out
    assert main(["probe", "json=report.txt"]) == 1
    assert "ends in .json" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_no_false_alarm_on_a_shipped_model(name, tmp_path):
    require_model_library(name)
    overrides = ["data=synthetic_tiny", f"model={name}", *OVERRIDES.get(name, [])]
    settings = compose_settings("probe", overrides)
    task = resolve_segments(settings["task"])
    dataset = task["dataset"]
    if name == "hist":
        dataset = {**dataset, "extras": {"concept": concept_extra(settings["data"], tmp_path)}}
    config = shorten_training(task["model"])
    assert "trainer" not in config or config["trainer"]["limit_train_batches"] == 1
    assert config.get("num_boost_round", 5) == config.get("epochs", 5) == 5
    model = init_instance_by_config(config)
    # The features do not depend on the model; `test_no_false_alarm_on_a_shipped_handler` changes
    # them in every way.
    dates = [next(iter(dataset["segments"]["test"]))]
    report = probe(
        init_instance_by_config(dataset), model, fit=True, methods=["delete"], dates=dates
    )
    assert not report.has_leak, str(report)
    assert report.line("scores").verdict == OK, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["handler=alpha158_market", "experiment=alpha360_gru"])
def test_no_false_alarm_on_a_shipped_handler(choice):
    settings = compose_settings("probe", [choice, "data=synthetic_tiny", "universe=liquid"])
    dataset = init_instance_by_config(resolve_segments(settings["task"])["dataset"])
    report = probe(dataset)
    assert not report.has_leak, str(report)


def concept_extra(data, folder):
    """Concepts of which half of the instruments change in the test segment."""
    names = sorted(init_instance_by_config(data).read_membership("stocks"))
    rows = [(n, f"C{k % 4}", "2018-07-02", "2020-01-31") for k, n in enumerate(names)]
    rows += [(n, f"C{k % 3}", "2020-02-03", None) for k, n in enumerate(names)]
    table = pd.DataFrame(rows, columns=["instrument", "concept", "start", "end"])
    table.to_parquet(folder / "concepts.parquet")
    return {"_target_": "qtorch.data.Concepts", "table": str(folder / "concepts.parquet")}


@pytest.mark.slow
def test_a_finished_run_is_probed_with_its_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from qtorch import R

    train = ["debug=tiny", "model.network.hidden_size=8", "record=none"]
    assert main(["train", *train]) == 0
    run = next(iter(R.list_recorders(experiment_name="debug").values()))
    assert main(["probe", f"run={run.id}", "methods=[scale]"]) == 0
    assert "of a fitted model, unmoved" in capsys.readouterr().out


@pytest.mark.slow
def test_a_leak_on_the_command_line_ends_with_one(capsys):
    label = 'handler.label=["Ref($close,-2)/Ref($close,-1)-1"]'
    words = ["data=synthetic_tiny", "handler=alpha158", label, "fit=false", "methods=[scale]"]
    assert main(["probe", *words, "+dataset.horizon=0"]) == 1
    assert "purge" in capsys.readouterr().out
