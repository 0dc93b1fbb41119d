"""Tests of `qtorch train` and `qtorch predict` from the command line to MLflow."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest
import torch

from qtorch.data.source.synthetic import SyntheticSource

SIGNAL_METRICS = ("IC", "ICIR", "Rank IC", "Rank ICIR")


@pytest.mark.slow
def test_train_logs_everything_in_one_run(train, runs):
    result = train("log_level=ERROR")
    assert result.code == 0, result.err
    (run,) = runs()
    assert run.status == "FINISHED"
    assert run.id in result.out
    for text in ("valid", "test", "samples/s", "epochs", "mlflow server", *SIGNAL_METRICS):
        assert text in result.out
    metrics = run.list_metrics()
    for segment in ("valid", "test"):
        assert {f"{segment}.{f}" for f in SIGNAL_METRICS} <= set(metrics)
    assert metrics["test.IC"] == pytest.approx(metrics["IC"], abs=1e-12)
    assert "Long-Short Ann Return" in metrics
    params = run.list_params()
    assert params["model.network._target_"] == "qtorch.nn.LSTM"
    assert params["dataset.step_len"] == "5"
    pred = run.load_object("pred.pkl")
    label = run.load_object("label.pkl")
    assert list(pred.columns) == ["score"]
    assert pred.index.names == ["datetime", "instrument"]
    dates = pred.index.get_level_values("datetime")
    first, last = run.load_object("task")["dataset"]["segments"]["test"]
    assert (dates.min(), dates.max()) == (pd.Timestamp(first), pd.Timestamp(last))
    assert label.index.isin(pred.index).mean() > 0.99
    assert len(run.load_object("sig_analysis/ic.pkl")) == dates.nunique()
    assert "sig_analysis/ic.png" in run.list_artifacts("sig_analysis")
    # The log file has what this log level does not show.
    assert "network LSTM" not in result.err
    log = Path(run.download_artifact("run.log")).read_text()
    assert all(text in log for text in ("network LSTM", "epoch 0: ", "ends: FINISHED"))
    assert f"/#/experiments/{run.experiment_id}/runs/{run.id}/model-metrics" in result.out
    assert "a made market with a signal in it" in result.out
    assert "Sharpe" in result.out


@pytest.mark.slow
def test_predict_reproduces_the_scores_of_the_run(train, runs, qtorch_cli, folder):
    assert train().code == 0
    (run,) = runs()
    result = qtorch_cli("predict", f"run={run.id}", "out=scores.parquet")
    assert result.code == 0, result.err
    scores = pd.read_parquet(folder / "scores.parquet")
    prediction = run.load_object("pred.pkl")
    pd.testing.assert_frame_equal(
        scores.sort_index(), prediction.sort_index(), rtol=1e-5, atol=1e-6
    )
    dates = scores.index.get_level_values("datetime").unique().sort_values()
    span = f"segment=[{dates[3]:%Y-%m-%d},{dates[7]:%Y-%m-%d}]"
    assert qtorch_cli("predict", f"run={run.id}", span, "out=some.csv").code == 0
    subset = pd.read_csv(folder / "some.csv", parse_dates=["datetime"])
    assert subset["datetime"].nunique() == 5
    result = qtorch_cli("predict", f"run={run.id}", "segment=tset", "out=x.csv")
    assert "Did you mean 'test'?" in result.error()


@pytest.mark.slow
def test_damaged_or_nonfinite_weights_of_a_run_are_not_used(train, runs, qtorch_cli, folder):
    assert train("+model.allow_nonfinite=false").code == 0
    (run,) = runs()
    command = ("predict", f"run={run.id}", "out=scores.parquet")
    path = Path(run.download_artifact("params.pkl"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    error = qtorch_cli(*command).error()
    assert f"'params.pkl' cannot be read from {path}: the bytes do not match the digest" in error
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    model = run.load_object("params.pkl")
    with torch.no_grad():
        next(model.network_.parameters())[0, 0] = torch.nan
    run.save_objects(**{"params.pkl": model})
    error = qtorch_cli(*command).error()
    assert "are NaN or infinite" in error
    assert "allow_nonfinite=true" in error
    assert not (folder / "scores.parquet").exists()
    result = qtorch_cli(*command, "allow_nonfinite=true")
    assert result.code == 0
    assert "scores are NaN or infinite, on " in result.err
    assert pd.read_parquet(folder / "scores.parquet")["score"].isna().any()


SEEING_NETWORK = """
import os
from pathlib import Path
from qtorch.nn import GRU

class Seeing(GRU):
    def __init__(self, d_feat=6, **kwargs):
        Path(f"seen-{os.getpid()}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        super().__init__(d_feat, **kwargs)
"""


@pytest.mark.slow
def test_joblib_runs_jobs_in_parallel(train, runs, folder, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (folder / "seeing.py").write_text(SEEING_NETWORK)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("QTORCH_TRUSTED", "seeing")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,9")
    result = train(
        *("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1"),
        *("universe=stocks,none", "model=gru", "model.network._target_=seeing.Seeing"),
        "trainer.accelerator=auto",
    )
    assert result.code == 1
    visible_gpus = {file.read_text() for file in folder.glob("seen-*")}
    assert visible_gpus == {"5", "7"}  # each process has its own GPU
    jobs = [r for r in runs() if "qtorch.sweep" not in r.list_tags()]
    assert sorted(r.status for r in jobs) == ["FAILED"] * 2 + ["FINISHED"] * 2
    assert len([line for line in result.out.splitlines() if "FINISHED" in line]) == 2


@pytest.mark.slow
def test_config_dir_adds_configs(train, runs, folder):
    (folder / "mine" / "model").mkdir(parents=True)
    (folder / "mine" / "model" / "small.yaml").write_text(
        "defaults: [lightning, _self_]\nnetwork: {_target_: qtorch.nn.GRU, hidden_size: 3}\n"
    )
    result = train("--config-dir", "mine", "model=small")
    assert result.code == 0, result.err
    assert runs()[0].list_params()["model.network.hidden_size"] == "3"


@pytest.mark.slow
def test_config_and_help_do_not_train(qtorch_cli, runs):
    result = qtorch_cli("train", "--cfg", "job", "--resolve")
    assert result.code == 0
    assert "CORD60" in result.out
    result = qtorch_cli("train", "--help")
    assert result.code == 0
    assert "alpha158_20" in result.out
    result = qtorch_cli("train", "--hydra-help")
    assert result.code == 0
    assert "hydra/launcher: basic" in result.out
    assert "shell-completion" not in result.out  # it does not support subcommands
    assert runs() == []


@pytest.mark.slow
def test_data_import_and_describe(qtorch_cli, train, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    result = qtorch_cli("data", "import", "data=synthetic_tiny", "out=~/bars")
    assert result.code == 0, result.err
    assert (folder / "bars" / "calendars" / "day.txt").is_file()
    result = qtorch_cli("data", "import", "data=synthetic_tiny", "out=bars")
    assert "not empty" in result.error()
    result = qtorch_cli("data", "describe", "data=qlib", "data.provider_uri=bars")
    assert result.code == 0, result.err
    assert "2018-07-02" in result.out
    assert (folder / "bars.png").stat().st_size > 10_000
    jobs = ("-m", "hydra.job.chdir=true", "data.provider_uri=bars,~/bars")
    result = train("data=qlib", "universe=stocks", *jobs)
    assert result.code == 0, result.err
    assert not list(folder.glob("outputs/**/mlruns"))


@pytest.mark.slow
def test_table_with_other_column_names(qtorch_cli, folder):
    bars = SyntheticSource(4, "2019-01-01", "2019-06-28").load().to_frame().reset_index()
    bars = bars.rename(columns={"datetime": "day", "instrument": "ticker", "close": "last"})
    bars.to_parquet(folder / "bars.parquet", index=False)
    names = "data.columns={datetime:day,instrument:ticker,close:last,volume:volume}"
    result = qtorch_cli("data", "describe", "data=table", "data.path=bars.parquet", names)
    assert result.code == 0, result.err
    assert "fields      close, volume" in result.out
    result = qtorch_cli("data", "import", "data=table", "data.path=bars.parquet", names, "out=bars")
    assert result.code == 0, result.err
    assert len(list((folder / "bars" / "features").glob("*/close.day.bin"))) == 5


@pytest.mark.slow
def test_predict_on_another_source(train, runs, qtorch_cli, folder):
    assert train().code == 0
    (run,) = runs()
    assert qtorch_cli("data", "import", "data=synthetic_tiny", "out=bars").code == 0
    other_source = ("data=qlib", "data.provider_uri=bars")
    result = qtorch_cli("predict", f"run={run.id}", "out=x.parquet", *other_source)
    assert result.code == 0, result.err
    prediction = run.load_object("pred.pkl").sort_index()
    scores = pd.read_parquet(folder / "x.parquet").sort_index()
    pd.testing.assert_frame_equal(scores, prediction, rtol=1e-4, atol=1e-5)
    result = qtorch_cli("predict", f"run={run.id}", "out=x.parquet", "data=synthetic")
    assert result.code == 0  # other instruments, with the same features and fitted processors
    assert len(pd.read_parquet(folder / "x.parquet")) > 5 * len(prediction)


OWN_NETWORK = """\
from torch import nn


class MeanNet(nn.Linear):
    def __init__(self, d_feat):
        super().__init__(d_feat, 1)

    def forward(self, x):
        return super().forward(x[:, -1])[:, 0]
"""


@pytest.mark.slow
def test_run_of_an_own_network_has_its_name_and_a_hint_to_trust_it(
    train, runs, folder, monkeypatch
):
    (folder / "own_net.py").write_text(OWN_NETWORK)
    monkeypatch.syspath_prepend(folder)
    words = ("model=lightning", "+model.network._target_=own_net.MeanNet", "record=none")
    result = train(*words)
    assert "export QTORCH_TRUSTED=own_net" in result.out, result.err
    assert [run.name for run in runs()] == ["MeanNet"]
    monkeypatch.setenv("QTORCH_TRUSTED", "own_net")
    assert "QTORCH_TRUSTED" not in train(*words, "seed=1").out
    monkeypatch.delenv("QTORCH_TRUSTED")
    assert "QTORCH_TRUSTED" not in train("record=none").out
