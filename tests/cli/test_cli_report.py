"""Tests of the `qtorch report` command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import qtorch
from qtorch import R
from qtorch.cli.main import main

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def ids(tmp_path, monkeypatch) -> list[str]:
    """The IDs of two finished runs in the store of the working folder."""
    monkeypatch.chdir(tmp_path)
    qtorch.init(tracking_uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    index = pd.MultiIndex.from_product(
        [pd.bdate_range("2020-01-01", periods=30), ["A", "B", "C", "D", "E"]],
        names=["datetime", "instrument"],
    )
    run_ids = []
    for seed in (0, 1):
        with R.start(experiment_name="debug"):
            recorder = R.get_recorder()
            recorder.log_params(seed=seed)
            values = np.random.default_rng(seed).normal(size=(2, len(index)))
            recorder.save_objects(
                **{"pred.pkl": pd.DataFrame({"score": values[0]}, index),
                   "label.pkl": pd.DataFrame({"LABEL0": values[1]}, index)}
            )  # fmt: skip
            run_ids.append(str(recorder.id))
    return run_ids


@pytest.mark.slow
def test_report_of_one_run(ids, capsys, tmp_path):
    assert main(["report", f"runs=[{ids[0]}]", f"out={tmp_path / 'out'}", "tries=3"]) == 0
    out = capsys.readouterr().out
    run = R.get_recorder(recorder_id=ids[0])
    assert f"report of run {ids[0]}" in out
    assert "report.ic_at_horizon.1" in run.list_metrics()
    artifact = Path(run.download_artifact("report/report.html"))
    assert (tmp_path / "out" / "report.html").read_bytes() == artifact.read_bytes()
    assert main(["report", f"runs={ids[0]}"]) == 0


@pytest.mark.slow
def test_comparison_of_several_runs(ids, capsys, tmp_path):
    assert main(["report", f"runs=[{','.join(ids)}]", "log=true"]) == 0
    assert "comparison of 2 runs" in capsys.readouterr().out
    assert Path(tmp_path, "comparison", "comparison.html").is_file()
    for run in ids:
        artifacts = R.get_recorder(recorder_id=run).list_artifacts("comparison")
        assert "comparison/comparison.html" in artifacts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs=[]"], "at least one run ID"),
        (["runs=[nosuchrun]"], "nosuchrun"),
        (["runs=[x]", "out=nowhere/there"], "does not exist"),
        ([], "runs"),
        (["runs=[x]", "modes=sum"], "mode"),
    ],
)
def test_wrong_arguments_give_a_one_line_error(ids, capsys, words, message):
    assert main(["report", *words]) == 1
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert message in error


def test_invalid_mode_suggests_the_nearest_one(ids, capsys):
    assert main(["report", f"runs=[{ids[0]}]", "mode=product_"]) == 1
    assert "'product'" in capsys.readouterr().err


def test_help(capsys):
    assert main(["report", "--help"]) == 0
    assert "usage: qtorch report" in capsys.readouterr().out
