"""The main job from the command line to MLflow."""

from __future__ import annotations

import pandas as pd
import pytest

from qtorch.data.source.synthetic import SyntheticSource

FIGURES = ("IC", "ICIR", "Rank IC", "Rank ICIR")


def test_one_command_trains_judges_and_keeps_everything_in_one_run(train, runs):
    told = train()
    assert told.code == 0, told.err
    (run,) = runs()
    assert run.status == "FINISHED"
    assert run.id in told.out
    for word in ("valid", "test", "samples/s", "epochs", "mlflow server", *FIGURES):
        assert word in told.out
    metrics = run.list_metrics()
    for segment in ("valid", "test"):
        assert {f"{segment}.{f}" for f in FIGURES} <= set(metrics)
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


@pytest.mark.slow
def test_predict_gives_the_scores_of_the_run_again(train, runs, qtorch_cli, folder):
    assert train().code == 0
    (run,) = runs()
    told = qtorch_cli("predict", f"run={run.id}", "out=scores.parquet")
    assert told.code == 0, told.err
    scores = pd.read_parquet(folder / "scores.parquet")
    expected = run.load_object("pred.pkl")
    pd.testing.assert_frame_equal(scores.sort_index(), expected.sort_index(), rtol=1e-5, atol=1e-6)
    dates = scores.index.get_level_values("datetime").unique().sort_values()
    span = f"segment=[{dates[3]:%Y-%m-%d},{dates[7]:%Y-%m-%d}]"
    assert qtorch_cli("predict", f"run={run.id}", span, "out=some.csv").code == 0
    some = pd.read_csv(folder / "some.csv", parse_dates=["datetime"])
    assert some["datetime"].nunique() == 5
    told = qtorch_cli("predict", f"run={run.id}", "segment=tset", "out=x.csv")
    assert "Did you mean 'test'?" in told.error()


@pytest.mark.slow
def test_joblib_runs_a_sweeps_jobs_side_by_side(train, runs):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    told = train(
        "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1", "universe=stocks,none"
    )
    assert told.code == 1
    jobs = [r for r in runs() if "qtorch.sweep" not in r.list_tags()]
    assert sorted(r.status for r in jobs) == ["FAILED"] * 2 + ["FINISHED"] * 2
    assert len([line for line in told.out.splitlines() if "FINISHED" in line]) == 2


@pytest.mark.slow
def test_a_users_own_folder_of_configs_adds_to_ours(train, runs, folder):
    (folder / "mine" / "model").mkdir(parents=True)
    (folder / "mine" / "model" / "small.yaml").write_text(
        "defaults: [lightning, _self_]\nnetwork: {_target_: qtorch.nn.GRU, hidden_size: 3}\n"
    )
    told = train("--config-dir", "mine", "model=small")
    assert told.code == 0, told.err
    assert runs()[0].list_params()["model.network.hidden_size"] == "3"


@pytest.mark.slow
def test_what_the_configuration_is_can_be_asked_without_running_it(qtorch_cli, runs):
    told = qtorch_cli("train", "--cfg", "job", "--resolve")
    assert told.code == 0
    assert "CORD60" in told.out
    told = qtorch_cli("train", "--help")
    assert told.code == 0
    assert "alpha158_20" in told.out
    told = qtorch_cli("train", "--hydra-help")
    assert told.code == 0
    assert "hydra/launcher: basic" in told.out
    assert "shell-completion" not in told.out  # there is none for a command of a command
    assert runs() == []


@pytest.mark.slow
def test_bars_come_in_from_a_table_and_are_described(qtorch_cli, train, folder):
    told = qtorch_cli("data", "import", "data=synthetic_tiny", "out=bars")
    assert told.code == 0, told.err
    assert (folder / "bars" / "calendars" / "day.txt").is_file()
    told = qtorch_cli("data", "import", "data=synthetic_tiny", "out=bars")
    assert "not empty" in told.error()
    told = qtorch_cli("data", "describe", "data=qlib", "data.provider_uri=bars")
    assert told.code == 0, told.err
    assert "2018-07-02" in told.out
    assert (folder / "bars.png").stat().st_size > 10_000
    told = train("data=qlib", "data.provider_uri=bars", "universe=stocks")
    assert told.code == 0, told.err


@pytest.mark.slow
def test_a_table_of_other_names_by_the_command_line(qtorch_cli, folder):
    bars = SyntheticSource(4, "2019-01-01", "2019-06-28").load().to_frame().reset_index()
    bars = bars.rename(columns={"datetime": "day", "instrument": "ticker", "close": "last"})
    bars.to_parquet(folder / "bars.parquet", index=False)
    names = "data.columns={datetime:day,instrument:ticker,close:last,volume:volume}"
    told = qtorch_cli("data", "describe", "data=table", "data.path=bars.parquet", names)
    assert told.code == 0, told.err
    assert "fields      close, volume" in told.out
    told = qtorch_cli("data", "import", "data=table", "data.path=bars.parquet", names, "out=bars")
    assert told.code == 0, told.err
    assert len(list((folder / "bars" / "features").glob("*/close.day.bin"))) == 5


@pytest.mark.slow
def test_a_run_predicts_on_another_source(train, runs, qtorch_cli, folder):
    assert train().code == 0
    (run,) = runs()
    assert qtorch_cli("data", "import", "data=synthetic_tiny", "out=bars").code == 0
    other = ("data=qlib", "data.provider_uri=bars")
    told = qtorch_cli("predict", f"run={run.id}", "out=x.parquet", *other)
    assert told.code == 0, told.err
    expected = run.load_object("pred.pkl").sort_index()
    scores = pd.read_parquet(folder / "x.parquet").sort_index()
    pd.testing.assert_frame_equal(scores, expected, rtol=1e-4, atol=1e-5)
    told = qtorch_cli("predict", f"run={run.id}", "out=x.parquet", "data=synthetic")
    assert told.code == 0  # other instruments, the same features and fitted processors
    assert len(pd.read_parquet(folder / "x.parquet")) > 5 * len(expected)
