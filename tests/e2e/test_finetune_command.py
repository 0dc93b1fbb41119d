"""Tests of the `qtorch finetune` and `qtorch export` commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch import R
from qtorch.core.errors import ArgumentError, DataError
from qtorch.study import load_network
from qtorch.tracking.recorder import DEPTH_TAG, FROM_TAG, PARENT_TAG
from qtorch.trainer import task_train

pytestmark = pytest.mark.xdist_group("finetune")  # the tests share one parent

SPAN = ("dataset.segments.train=[2019-01-01,2019-09-30]",
        "dataset.segments.valid=[2019-10-01,2019-12-31]",
        "dataset.segments.test=[2020-01-01,2020-06-30]")  # fmt: skip


def weights(run) -> dict[str, torch.Tensor]:
    return run.load_object("params.pkl").network_.state_dict()


def run_state(run) -> tuple:
    """Return everything of a run that must not change."""
    artifacts = sorted(run.list_artifacts())
    return run.list_tags(), run.list_params(), run.list_metrics(), artifacts, run.info


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture
def folder(module_folder, monkeypatch) -> Path:
    """Change to the folder of all tests, with the parent's run."""
    monkeypatch.chdir(module_folder)
    monkeypatch.setenv("COLUMNS", "200")
    return module_folder


@pytest.fixture
def parent(train, runs):
    """Return the run that is fine-tuned; the first test trains it."""
    if not runs("parent"):
        result = train("experiment_name=parent")
        assert result.code == 0, result.err
    (run,) = [r for r in runs("parent") if FROM_TAG not in r.list_tags()]
    return run


@pytest.fixture
def finetune(qtorch_cli, parent, runs):
    """Return `finetune(...)`: fine-tune the parent with these options and return the new run."""

    def run_finetune(*options: str, run=None):
        before = {r.id for r in runs("parent")}
        result = qtorch_cli("finetune", f"run={(run or parent).id}", "log_level=WARNING", *options)
        assert result.code == 0, result.err
        (new,) = [r for r in runs("parent") if r.id not in before]
        assert new.id in result.out
        return new

    return run_finetune


@pytest.mark.slow
def test_finetuning_creates_a_new_run(parent, finetune):
    before, parent_weights = run_state(parent), weights(parent)
    run = finetune(*SPAN, "max_epochs=2", "lr=0.005", "early_stop=5", "train=head")
    assert run_state(R.get_recorder(recorder_id=parent.id)) == before
    assert all(torch.equal(parent_weights[n], w) for n, w in weights(parent).items())
    tags = run.list_tags()
    assert (tags[FROM_TAG], tags[PARENT_TAG], tags[DEPTH_TAG]) == (parent.id, parent.id, "1")
    assert {n for n, w in weights(run).items() if not torch.equal(parent_weights[n], w)} == {
        "fc_out.weight",
        "fc_out.bias",
    }
    report = run.load_object("fit_report")
    assert (report["epochs"], report["tuning"]["train"]) == (2, "head")
    dates = run.load_object("pred.pkl").index.get_level_values("datetime")
    assert dates.min() == pd.Timestamp("2020-01-01")
    second_run = finetune("max_epochs=1", "lora={rank: 2}", run=run)  # and once more from that run
    assert second_run.list_tags()[DEPTH_TAG] == "2"
    assert second_run.list_tags()[FROM_TAG] == run.id
    change = weights(second_run)["rnn.weight_ih_l0"] - weights(run)["rnn.weight_ih_l0"]
    assert 0 < torch.linalg.matrix_rank(change, tol=1e-6) <= 2


@pytest.mark.slow
def test_options_of_finetuning(parent, finetune, qtorch_cli):
    parent_weights = weights(parent)

    def weight_changes(run) -> set[str]:
        return {n for n, w in weights(run).items() if not torch.equal(parent_weights[n], w)}

    heads = {"fc_out.weight", "fc_out.bias"}
    assert weight_changes(finetune("max_epochs=1")) == set(parent_weights)
    assert weight_changes(finetune("max_epochs=1", "frozen=[rnn.*]")) == heads
    assert weight_changes(finetune("max_epochs=1", "train=[rnn.*]")) == set(parent_weights) - heads
    assert weight_changes(finetune("max_epochs=1", "unfreeze_every=1")) == heads
    decayed_run = finetune("max_epochs=1", "layer_decay=0.5")
    assert decayed_run.load_object("fit_report")["tuning"] == {"train": "all", "layer_decay": 0.5}
    optimizer_run = finetune("max_epochs=1", "keep_optimizer=true")
    assert optimizer_run.load_object("fit_report")["tuning"]["keep_optimizer"] is True
    lora_run = finetune("max_epochs=1", "lora={rank: 2, targets: [rnn.*]}")
    assert weight_changes(lora_run) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0", *heads}
    arguments = ("finetune", f"run={parent.id}", "log_level=WARNING")
    result = qtorch_cli(*arguments, "train=[fc_uot.*]")
    assert "matches no parameter" in result.error()
    result = qtorch_cli(*arguments, "lora={rang: 2}")
    assert "Did you mean 'rank'?" in result.error()


@pytest.mark.slow
def test_statistics_can_be_kept_refitted_or_adapted(parent, finetune):
    def feature_centers(run) -> torch.Tensor:
        model = run.load_object("params.pkl")
        state = getattr(model, "model_", model).statistics_
        return next(t for n, t in state.tensors.items() if n.endswith("center_"))

    old, new = feature_centers(parent), feature_centers(finetune(*SPAN, "max_epochs=1"))
    assert not torch.equal(old, new)
    assert torch.equal(feature_centers(finetune(*SPAN, "max_epochs=1", "statistics=keep")), old)
    assert torch.equal(feature_centers(finetune(*SPAN, "max_epochs=1", "statistics=refit")), new)
    adapted_run = finetune(*SPAN, "max_epochs=1", "statistics=adapt")
    torch.testing.assert_close(feature_centers(adapted_run), (old + new) / 2)
    # Another process predicts the same scores as the run's own records.
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "qtorch.cli.main",
            "predict",
            f"run={adapted_run.id}",
            "out=s.parquet",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    prediction = adapted_run.load_object("pred.pkl").sort_index()
    pd.testing.assert_frame_equal(
        pd.read_parquet("s.parquet").sort_index(), prediction, rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_incompatible_data_are_reported(parent, qtorch_cli):
    result = qtorch_cli("finetune", f"run={parent.id}", "dataset.step_len=7")
    assert "windows of 7 steps, but the model was trained on 5 (dataset.step_len)" in result.err
    task = parent.load_object("task")
    (filter_config, *_) = task["dataset"]["handler"]["infer_processors"]
    removed_column = filter_config["col_list"][0]
    filter_config["col_list"] = [*filter_config["col_list"][1:], "KMID"]
    model = {"_target_": "qtorch.study.WarmStart", "recorder_id": parent.id}
    for statistics in (None, "keep", "adapt"):
        options = {"max_epochs": 1, "statistics": statistics}
        with pytest.raises(
            DataError, match=f"(?s)missing features: {removed_column}.*additional features: KMID"
        ):
            task_train({**task, "model": {**model, "options": options}}, "debug")
    with pytest.raises(ArgumentError, match="Did you mean 'max_epochs'"):
        options = {"max_epoch": 1}
        task_train({**task, "model": {**model, "options": options}}, "debug")


@pytest.mark.slow
def test_run_is_exported_by_another_process(parent, qtorch_cli, start, folder):
    result = qtorch_cli("export", f"run={parent.id}", "format=safetensors")
    assert result.code == 0, result.err
    path = folder / f"{parent.id}.safetensors"
    assert "scores equal the model's" in result.out
    assert all(
        torch.equal(w, weights(parent)[n]) for n, w in load_network(path).state_dict().items()
    )
    pytest.importorskip("onnxruntime")
    command = ["export", f"run={parent.id}", "format=onnx", "out=m.onnx", "log=true"]
    process = start(*command)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert sorted(parent.list_artifacts("export")) == ["export/m.onnx", "export/m.onnx.json"]
    metadata = json.loads((folder / "m.onnx.json").read_text())
    assert (metadata["run"], metadata["step_len"]) == (parent.id, 5)

    import onnxruntime

    model, dataset = parent.load_object("params.pkl"), parent.load_object("dataset")
    samples = model.input_schema_.match_features(dataset.samples("valid"))
    x = samples.batch(torch.arange(300)).x.numpy()
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run(["score"], {"x": x})
    prediction = model.predict(dataset, "valid").to_numpy()[:300]
    np.testing.assert_allclose(scores, prediction, rtol=1e-5, atol=1e-6)


def test_export_reports_wrong_arguments(qtorch_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Did you mean 'onnx'?" in qtorch_cli("export", "run=x", "format=onxn").error()
    assert "does not exist" in qtorch_cli("export", "run=x", "format=onnx", "out=a/m").error()
    assert "there is no tracking store" in qtorch_cli("export", "run=5", "format=torch").error()
    result = qtorch_cli("export", "--help")
    assert result.code == 0
    assert "Not included: the statistics" in result.out


@pytest.mark.slow
def test_init_from_another_run(train, parent, runs):
    result = train(
        "experiment_name=gats",
        "model=gats",
        "model.network.hidden_size=8",
        "model.network.num_layers=1",
        f"model.init_from=run:{parent.id}",
    )
    assert result.code == 0, result.err
    (run,) = runs("gats")
    assert run.list_tags()[FROM_TAG] == parent.id
    assert run.list_params()["model.init_from"] == f"run:{parent.id}"
    assert "rnn.weight_ih_l0" in run.load_object("fit_report")["init_from"]["weights"]
