"""Reading workflow files in Qlib's format, and their translation into a job's task."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from qtorch.cli.workflow.command import list_reserved_keys
from qtorch.cli.workflow.experiment import experiment_config
from qtorch.cli.workflow.file import load_stored_workflow, read_workflow
from qtorch.cli.workflow.task import add_folders, translate_workflow
from qtorch.core.errors import ConfigError, TrustError
from qtorch.core.qlib.notes import Notes
from qtorch.core.session import session
from qtorch.core.trust import StoredText, as_stored_text

WORKFLOW = """\
qlib_init:
    provider_uri: "{{ BARS }}"
    region: cn
market: &market csi300
handler_config: &handler_config
    start_time: 2008-01-01
    instruments: *market
    seed: &seed 1e-4
seed: &number 7
task:
    model:
        class: LSTM
        module_path: qlib.contrib.model.pytorch_lstm
        kwargs: {lr: 1e-4, seed: *number}
    dataset:
        class: DatasetH
        module_path: qlib.data.dataset
        kwargs:
            handler:
                class: Alpha158
                module_path: qlib.contrib.data.handler
                kwargs:
                    <<: *handler_config
                    label: ["Ref($close, -2)/Ref($close, -1) - 1", "${HOME}", yes]
            again: *handler_config
            segments: {train: [2008-01-01, 2014-12-31], test: [2017-01-01, 2018-01-01]}
    record:
        class: SigAnaRecord
        module_path: qlib.workflow.record_temp
"""


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BARS", str(tmp_path / "bars"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "workflow.yaml"
    path.write_text(WORKFLOW)
    return path


def resolve_settings(document: dict, **changes) -> dict:
    settings = OmegaConf.to_container(OmegaConf.create(document), resolve=True)
    assert isinstance(settings, dict)
    common = {"seed": 0, "as_qlib": False, "sweep": {"stored": False}}
    return {**common, "workflow": {"file": None}, **settings, **changes}


def test_templates_anchors_and_numbers_are_read_as_qlib_reads_them(file):
    workflow = read_workflow(file, list_reserved_keys())
    document = workflow.document
    assert document["qlib_init"]["provider_uri"].endswith("bars")
    kwargs = document["task"]["dataset"]["kwargs"]
    handler = kwargs["handler"]["kwargs"]
    assert handler["instruments"] == "${market}"  # an override of market reaches it
    assert kwargs["again"] == "${handler_config}"
    assert handler["start_time"] == "2008-01-01"
    assert handler["label"][1:] == [r"\${HOME}", "yes"]  # no interpolation, and no bool
    # A key with another meaning here is not kept, its value is.
    assert document["task"]["model"]["kwargs"] == {"lr": 1e-4, "seed": 7}
    assert "seed" not in document
    assert workflow.find_place(("task", "model", "kwargs")) == "workflow.yaml line 14"
    resolved = resolve_settings(document)
    label = resolved["task"]["dataset"]["kwargs"]["handler"]["kwargs"]["label"]
    assert label[1] == "${HOME}"
    assert load_stored_workflow(workflow.text, "w") == document
    with pytest.raises(TrustError, match=r"oc\.env:HOME"):
        load_stored_workflow(yaml.safe_dump({"task": "${oc.env:HOME}"}), "w")


def test_a_variable_that_is_not_in_the_environment_is_empty_and_named(file, monkeypatch, caplog):
    monkeypatch.delenv("BARS")
    assert read_workflow(file).document["qlib_init"]["provider_uri"] == ""
    assert "variables BARS are not in the environment" in caplog.text


def test_a_variable_with_a_default_or_that_the_template_tests_is_not_missed(tmp_path, caplog):
    path = tmp_path / "w.yaml"
    path.write_text(
        "qlib_init: {provider_uri: {{ BARS_FOLDER | default('bars') }}}\n"
        "task: {{ '{' }}{% if NUM_STEPS %}step_len: {{ NUM_STEPS }},{% endif %} model: 1}\n"
    )
    document = read_workflow(path).document
    assert document == {"qlib_init": {"provider_uri": "bars"}, "task": {"model": 1}}
    assert not caplog.records


def test_a_base_file_is_updated_key_by_key(file):
    (file.parent / "sub").mkdir()
    child = file.parent / "sub" / "child.yaml"
    child.write_text(
        "BASE_CONFIG_PATH: ../workflow.yaml\nmarket: csi500\n"
        "task: {model: {kwargs: {lr: 5}}, record: __DROP__}\n"
    )
    (file.parent / "bars.txt").write_text("")
    document = read_workflow(child).document
    assert document["market"] == "csi500"
    assert document["task"]["model"]["kwargs"]["lr"] == 5
    assert document["task"]["model"]["class"] == "LSTM"
    assert "record" not in document["task"]
    child.write_text("BASE_CONFIG_PATH: nowhere.yaml\n")
    with pytest.raises(ConfigError, match=r"nowhere.yaml.* nor .*sub/nowhere.yaml"):
        read_workflow(child)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "expected sections"),
        ("", "got nothing"),
        ("task: {model: 1\n", r"workflow.yaml line \d+: this is not YAML"),
        ("task:\n  a: 1\n  a: 2\n", "line 3: the key 'a' stands twice"),
        ("model: {}\ndataset: {}\n", "Indent model, dataset under 'task:'"),
        ("tasks: {}\n", "Did you mean 'task'"),
        ("task: {}\nqlib_init: 3\n", "qlib_init is 3"),
        ("task: {}\nsys: {paths: x}\n", "expected path and rel_path"),
        ("task: {}\na: {<<: 3}\n", "line 2: << merges mappings"),
        ("task: '{{ A'\n", "cannot render the template"),
    ],
)
def test_a_file_that_is_no_workflow_is_explained(file, text, message):
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_workflow(file)
    with pytest.raises(ConfigError, match="no workflow file"):
        read_workflow(file.parent / "other.yaml")


def test_a_job_gets_the_data_the_region_and_the_seed(file):
    workflow = read_workflow(file, list_reserved_keys())
    workflow.document["task"]["dataset"]["kwargs"].pop("again")
    settings = resolve_settings(workflow.document, seed=3)
    notes = Notes()
    task = translate_workflow(settings, settings["task"], notes)
    source = task["dataset"]["handler"]["source"]
    assert source == {
        "_target_": "qtorch.data.QlibSource",
        "provider_uri": str(file.parent / "bars"),
    }
    assert task["record"][0]["region"] == "cn"
    assert task["seed"] == 3
    assert session().region == "cn"
    experiment = experiment_config(task, {**settings, "experiment_name": "e"})
    assert experiment["trainer"]["max_epochs"] == 200
    assert experiment["handler"]["source"] == "${data}"
    stored = resolve_settings(workflow.document, sweep={"stored": True})
    task = translate_workflow(stored, as_stored_text(stored["task"]))
    assert isinstance(task["dataset"]["handler"]["_target_"], StoredText)


def test_an_error_names_the_line_of_the_file(file):
    file.write_text(WORKFLOW.replace("lr: 1e-4,", "\n            learning: 1e-4,"))
    settings = resolve_settings(read_workflow(file).document, workflow={"file": str(file)})
    settings["task"]["dataset"] = {}
    with pytest.raises(ConfigError, match=r"workflow.yaml line 15: task.model.kwargs.learning"):
        translate_workflow(settings, settings["task"])
    settings["qlib_init"]["regon"] = "cn"
    with pytest.raises(ConfigError, match=r"workflow.yaml line 1: qlib_init.regon: .*'region'"):
        translate_workflow(settings, settings["task"])


def test_figures_of_qlib_and_stores_of_qlib(file):
    record = {"class": "qlib.workflow.record_temp.PortAnaRecord"}
    task = {"model": {}, "dataset": {}, "record": record}
    settings = resolve_settings(
        {"qlib_init": {"provider_uri": "bars"}, "task": task},
        as_qlib=True,
    )
    config = translate_workflow(settings, task)["record"][0]["config"]
    assert config["backtest"]["as_qlib"] is True
    assert config["backtest"]["benchmark"] == "SH000300"


def test_folders_of_a_workflow_are_searched_for_modules(file, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    file.write_text("sys: {rel_path: [lib], path: /opt/mine}\ntask: {}\n")
    section = read_workflow(file).document["sys"]
    assert section == {"path": ["/opt/mine", str(file.parent / "lib")]}
    add_folders(section)
    assert sys.path[-1] == str(file.parent / "lib")
    with pytest.raises(ConfigError, match="stored workflow"):
        add_folders(as_stored_text(section))
