"""Tests of the `qtorch report` command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import qtorch
from qtorch import R
from qtorch.cli.main import main
from qtorch.study.sweep import JOB_TAG, start_sweep
from qtorch.tracking.mlflow_store import open_store

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


def test_report_with_a_folder_leaves_the_run_as_it_is(ids, capsys, tmp_path):
    run = R.get_recorder(recorder_id=ids[0])
    before = (run.list_metrics(), run.list_artifacts("report"))
    assert main(["report", f"run={ids[0]}", f"out={tmp_path / 'out'}", "tries=3"]) == 0
    assert f"report of run {ids[0]}; nothing was stored" in capsys.readouterr().out
    assert 'data-metric="report.ic_at_horizon.1"' in Path(tmp_path, "out/report.html").read_text()
    assert (run.list_metrics(), run.list_artifacts("report")) == before


@pytest.mark.slow
def test_report_of_one_run(ids, capsys):
    assert main(["report", f"runs=[{ids[0]}]"]) == 0
    assert f"report of run {ids[0]}, stored" in capsys.readouterr().out
    run = R.get_recorder(recorder_id=ids[0])
    assert "report.ic_at_horizon.1" in run.list_metrics()
    assert Path(run.download_artifact("report/report.html")).is_file()


@pytest.mark.slow
def test_choice_among_the_jobs_of_a_sweep_is_judged(ids, capsys, tmp_path):
    sweep = start_sweep("zoo", "debug", ["seed=0,1,2"], overrides=["seed=0,1,2"], count=3)
    days = pd.bdate_range("2020-01-01", periods=120, name="datetime")
    with R.start(experiment_name="debug"):
        failed_run = str(R.get_recorder().id)
    for number, run in enumerate([*ids, failed_run]):
        recorder = R.get_recorder(recorder_id=run)
        job = {"number": number, "overrides": [f"seed={number}"]}
        recorder.set_tags(**{JOB_TAG + str(sweep.id): json.dumps(job)})
        if run == failed_run:
            open_store(R.get_uri()).set_status(run, "FAILED")
            continue
        returns = pd.Series(np.random.default_rng(number).normal(0.002 * number, 0.01, 120), days)
        recorder.save_objects(artifact_path="sig_analysis", **{"long_short_r.pkl": returns})
    assert main(["sweep", "show", "zoo"]) == 0
    out = capsys.readouterr().out
    assert "highest Sharpe ratio on the test segment: 0." in out
    assert "per bar  job 1 (of 120 bars; the return is half of (top quintile" in out
    # The failed job is a try too.
    assert "choice of job 1 among 3 tries: not shown to be better than luck (Hansen's p 0." in out
    assert "probability of overfitting" in out
    assert "deflated Sharpe ratio" in out
    assert main(["report", "sweep=zoo"]) == 0
    assert "comparison of 2 runs" in capsys.readouterr().out
    text = Path(tmp_path, "comparison", "comparison.html").read_text()
    assert "By the three tests together it is not shown to be better than luck" in text
    open_store(R.get_uri()).set_status(ids[0], "FAILED")
    assert main(["report", "sweep=zoo"]) == 1
    assert "needs two finished jobs, and it has 1" in capsys.readouterr().err


@pytest.mark.slow
def test_comparison_of_several_runs(ids, capsys, tmp_path):
    assert main(["report", f"runs=[{','.join(ids)}]", "log=true"]) == 0
    assert "comparison of 2 runs" in capsys.readouterr().out
    assert Path(tmp_path, "comparison", "comparison.html").is_file()
    assert main(["report", f"runs=[{','.join(ids)}]"]) == 0
    assert "in place of the one that was there" in capsys.readouterr().out
    for run in ids:
        artifacts = R.get_recorder(recorder_id=run).list_artifacts("comparison")
        assert "comparison/comparison.html" in artifacts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs=[]"], "at least one run ID"),
        (["runs=[nosuchrun]"], "nosuchrun"),
        (["runs=[x]", "out=nowhere/there"], "does not exist"),
        ([], "got none of them"),
        (["runs=[x]", "sweep=y"], "got runs and sweep"),
        (["sweep=nosuchsweep"], "unknown sweep 'nosuchsweep'"),
        (["runs=[x]", "modes=sum"], "mode"),
        (["runs=[x]", "portfolio.open_cost=0.1"], "-m, record=full and portfolio.open_cost=...:"),
        (["runs=[x]", "handler.label=y"], "(See qtorch report --help.)"),
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
