"""A run's model learns on and is exported, by commands as a user gives them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch import R
from qtorch.core.errors import ArgumentError, DataError
from qtorch.study import load_network
from qtorch.tracking.lineage import DEPTH_TAG, FROM_TAG, PARENT_TAG
from qtorch.trainer import task_train

SPAN = ("dataset.segments.train=[2019-01-01,2019-09-30]",
        "dataset.segments.valid=[2019-10-01,2019-12-31]",
        "dataset.segments.test=[2020-01-01,2020-06-30]")  # fmt: skip


def weights(run) -> dict[str, torch.Tensor]:
    return run.load_object("params.pkl").network_.state_dict()


def told_of(run) -> tuple:
    """Everything of a run that must stay as it is."""
    artifacts = sorted(run.list_artifacts())
    return run.list_tags(), run.list_params(), run.list_metrics(), artifacts, run.info


@pytest.fixture
def parent(train, runs):
    told = train()
    assert told.code == 0, told.err
    (run,) = runs()
    return run


@pytest.fixture
def tuned(qtorch_cli, parent, runs):
    """`tuned(...)`: the run that `qtorch finetune` of the parent with these options makes."""

    def act(*options: str, run=None):
        before = {r.id for r in runs()}
        told = qtorch_cli("finetune", f"run={(run or parent).id}", "log_level=WARNING", *options)
        assert told.code == 0, told.err
        (new,) = [r for r in runs() if r.id not in before]
        assert new.id in told.out
        return new

    return act


@pytest.mark.slow
def test_a_model_learns_on_in_a_run_of_its_own(parent, tuned):
    before, own = told_of(parent), weights(parent)
    run = tuned(*SPAN, "max_epochs=2", "lr=0.005", "early_stop=5", "train=head")
    assert told_of(R.get_recorder(recorder_id=parent.id)) == before
    assert all(torch.equal(own[n], w) for n, w in weights(parent).items())
    tags = run.list_tags()
    assert (tags[FROM_TAG], tags[PARENT_TAG], tags[DEPTH_TAG]) == (parent.id, parent.id, "1")
    assert {n for n, w in weights(run).items() if not torch.equal(own[n], w)} == {
        "fc_out.weight",
        "fc_out.bias",
    }
    report = run.load_object("fit_report")
    assert (report["epochs"], report["tuning"]["train"]) == (2, "head")
    dates = run.load_object("pred.pkl").index.get_level_values("datetime")
    assert dates.min() == pd.Timestamp("2020-01-01")
    again = tuned("max_epochs=1", "lora={rank: 2}", run=run)  # and from there on
    assert again.list_tags()[DEPTH_TAG] == "2"
    assert again.list_tags()[FROM_TAG] == run.id
    change = weights(again)["rnn.weight_ih_l0"] - weights(run)["rnn.weight_ih_l0"]
    assert 0 < torch.linalg.matrix_rank(change, tol=1e-6) <= 2


@pytest.mark.slow
def test_every_option_reaches_the_training(parent, tuned, qtorch_cli):
    own = weights(parent)

    def moved(run) -> set[str]:
        return {n for n, w in weights(run).items() if not torch.equal(own[n], w)}

    heads = {"fc_out.weight", "fc_out.bias"}
    assert moved(tuned("max_epochs=1")) == set(own)
    assert moved(tuned("max_epochs=1", "frozen=[rnn.*]")) == heads
    assert moved(tuned("max_epochs=1", "train=[rnn.*]")) == set(own) - heads
    assert moved(tuned("max_epochs=1", "unfreeze_every=1")) == heads
    decayed = tuned("max_epochs=1", "layer_decay=0.5")
    assert decayed.load_object("fit_report")["tuning"] == {"train": "all", "layer_decay": 0.5}
    kept = tuned("max_epochs=1", "keep_optimizer=true")
    assert kept.load_object("fit_report")["tuning"]["keep_optimizer"] is True
    lora = tuned("max_epochs=1", "lora={rank: 2, targets: [rnn.*]}")
    assert moved(lora) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0", *heads}
    again = ("finetune", f"run={parent.id}", "log_level=WARNING")
    told = qtorch_cli(*again, "train=[fc_uot.*]")
    assert "fits no parameter" in told.error()
    told = qtorch_cli(*again, "lora={rang: 2}")
    assert "Did you mean 'rank'?" in told.error()


@pytest.mark.slow
def test_statistics_are_kept_refitted_or_between(parent, tuned):
    def centre(run) -> torch.Tensor:
        model = run.load_object("params.pkl")
        state = getattr(model, "model_", model).statistics_
        return next(t for n, t in state.tensors.items() if n.endswith("center_"))

    old, new = centre(parent), centre(tuned(*SPAN, "max_epochs=1"))
    assert not torch.equal(old, new)
    assert torch.equal(centre(tuned(*SPAN, "max_epochs=1", "statistics=keep")), old)
    assert torch.equal(centre(tuned(*SPAN, "max_epochs=1", "statistics=refit")), new)
    between = tuned(*SPAN, "max_epochs=1", "statistics=adapt")
    torch.testing.assert_close(centre(between), (old + new) / 2)
    # Another process predicts with what was learnt, as the run's own records did.
    done = subprocess.run(
        [sys.executable, "-m", "qtorch.cli.main", "predict", f"run={between.id}", "out=s.parquet"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = between.load_object("pred.pkl").sort_index()
    pd.testing.assert_frame_equal(
        pd.read_parquet("s.parquet").sort_index(), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_data_that_do_not_fit_are_told_by_their_differences(parent, qtorch_cli):
    told = qtorch_cli("finetune", f"run={parent.id}", "dataset.step_len=7")
    assert "windows of 7 steps, the model learnt from 5 (dataset.step_len)" in told.err
    task = parent.load_object("task")
    (chosen, *_) = task["dataset"]["handler"]["infer_processors"]
    gone = chosen["col_list"][0]
    chosen["col_list"] = [*chosen["col_list"][1:], "KMID"]
    model = {"_target_": "qtorch.study.WarmStart", "recorder_id": parent.id}
    for statistics in (None, "keep", "adapt"):
        options = {"max_epochs": 1, "statistics": statistics}
        with pytest.raises(DataError, match=f"(?s)missing: {gone}.*not know: KMID"):
            task_train({**task, "model": {**model, "options": options}}, "debug")
    with pytest.raises(ArgumentError, match="Did you mean 'max_epochs'"):
        options = {"max_epoch": 1}
        task_train({**task, "model": {**model, "options": options}}, "debug")


@pytest.mark.slow
def test_a_run_is_exported_by_another_process(parent, qtorch_cli, folder):
    told = qtorch_cli("export", f"run={parent.id}", "format=safetensors")
    assert told.code == 0, told.err
    path = folder / f"{parent.id}.safetensors"
    assert "scores equal the model's" in told.out
    assert all(
        torch.equal(w, weights(parent)[n]) for n, w in load_network(path).state_dict().items()
    )
    pytest.importorskip("onnxruntime")
    command = ["export", f"run={parent.id}", "format=onnx", "out=m.onnx", "log=true"]
    done = subprocess.run(
        [sys.executable, "-m", "qtorch.cli.main", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(parent.list_artifacts("export")) == ["export/m.onnx", "export/m.onnx.json"]
    told = json.loads((folder / "m.onnx.json").read_text())
    assert (told["run"], told["step_len"]) == (parent.id, 5)

    import onnxruntime

    model, dataset = parent.load_object("params.pkl"), parent.load_object("dataset")
    samples = model.learnt_.matched(dataset.samples("valid"))
    x = samples.batch(torch.arange(300)).x.numpy()
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run(["score"], {"x": x})
    expected = model.predict(dataset, "valid").to_numpy()[:300]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_an_export_says_what_is_wrong_with_it(qtorch_cli):
    assert "Did you mean 'onnx'?" in qtorch_cli("export", "run=x", "format=onxn").error()
    assert "there is no folder" in qtorch_cli("export", "run=x", "format=onnx", "out=a/m").error()
    told = qtorch_cli("export", "--help")
    assert told.code == 0
    assert "Not included: the statistics" in told.out


@pytest.mark.slow
def test_gats_begin_with_a_run_on_the_command_line(train, parent, runs):
    told = train(
        "model=gats",
        "model.network.hidden_size=8",
        "model.network.num_layers=1",
        f"model.init_from=run:{parent.id}",
    )
    assert told.code == 0, told.err
    (run,) = [r for r in runs() if r.id != parent.id]
    assert run.list_tags()[FROM_TAG] == parent.id
    assert run.list_params()["model.init_from"] == f"run:{parent.id}"
    assert "rnn.weight_ih_l0" in run.load_object("fit_report")["init_from"]["weights"]
