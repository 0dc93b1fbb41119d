"""Tests of user errors: a clear one-line message, an exit code, no run that looks finished."""

from __future__ import annotations

import subprocess

import numpy as np
import pandas as pd
import pytest


def make_bars(num_days: int = 300, num_instruments: int = 8) -> pd.DataFrame:
    """Return a long table of bars."""
    dates = pd.bdate_range("2019-01-01", periods=num_days).as_unit("ns")
    names = [f"I{k}" for k in range(num_instruments)]
    index = pd.MultiIndex.from_product([dates, names], names=["datetime", "instrument"])
    noise = np.random.default_rng(0).normal(0, 0.02, (num_days, num_instruments))
    close = (20 * np.exp(noise.cumsum(0))).ravel()
    bars = {n: close * f for n, f in (("open", 0.99), ("high", 1.02), ("low", 0.97), ("close", 1))}
    volume = np.exp(np.random.default_rng(1).normal(10, 0.3, close.shape))
    return pd.DataFrame({**bars, "vwap": close, "volume": volume}, index=index).reset_index()


def assert_no_finished_run(runs):
    assert [r.status for r in runs()] in ([], ["FAILED"])


CONFIG_FAULTS = {
    "missing provider folder": (["data=qlib", "data.provider_uri=nowhere"], "nowhere"),
    "no provider folder given": (["data=qlib"], "data.provider_uri must be given"),
    "unknown universe": (["universe=stoks"], "Did you mean 'stocks'?"),
    "unknown model option": (["model.network.hiden_size=3"], "Did you mean 'hidden_size'?"),
    "unknown model option, added": (["+model.network.hiden_size=3"], "Did you mean 'hidden_size'?"),
    "unknown trainer option": (["trainer.max_epoch=3"], "Did you mean 'max_epochs'?"),
    "unknown option": (["sead=3"], "Did you mean 'seed'?"),
    "item that a list does not have": (
        ["+handler.infer_processors.3._target_=qtorch.data.processor.CSRankNorm"],
        "the list handler.infer_processors has no item 3",
    ),
    "unknown network": (["model=lstmm"], "Did you mean 'lstm'?"),
    "unknown group": (["modle=lstm"], "Did you mean 'model'?"),
    "unknown class": (["model.network._target_=qtorch.nn.LSTN"], "LSTM"),
    "unquoted expression": (["handler.label=Ref($close,-2)/$close"], "need quotes"),
    "unknown field": (
        ["handler.label=['$closs/$open-1']"],
        "vwap: '$closs', character 1 of '$closs/",
    ),
    "unknown operator": (["handler.label=['Reff($close,-2)/$close']"], "Did you mean 'Ref'?"),
    "syntax error": (["handler.label=['Ref($close,-2']"], "'(', character 4 of 'Ref($close,-2'"),
    "unknown metric": (["callbacks.monitor=icc"], "Did you mean 'ic'?"),
    "unknown loss": (["model.loss=msee"], "Did you mean 'mse'?"),
    "module that does not exist": (
        ["model.network={_target_: no_such_module.Net}"],
        "no module named 'no_such_module'",
    ),
    "unknown accelerator": (["trainer.accelerator=gpuu"], "unknown trainer.accelerator 'gpuu'"),
    "record without what it needs": (
        ["task.record=[{_target_: qtorch.record.SigAnaRecord}]"],
        "SigAnaRecord needs the SignalRecord before it",
    ),
    "list for a config group": (
        ["record=[{_target_: qtorch.record.SigAnaRecord}]"],
        "instead: task.record=[{_target_: ",
    ),
    "larger portfolio than universe": (
        ["record=full", "portfolio.topk=99"],
        "topk=99 is more than the 28 instruments of the test segment",
    ),
    "text instead of a number": (["trainer.max_epochs=abc"], "trainer.max_epochs is 'abc'"),
    "label that is always NaN": (
        ["handler.label=['Ref($close,-9999)/$close']"],
        "Check the expression and the data of the label",
    ),
    "empty segment": (["segments.test=[2031-01-01,2031-12-31]"], "test"),
    "segment fractions above one": (["segments.test=0.9"], "their sum at most 1"),
    "unreachable tracking server": (
        ["tracking.uri=http://127.0.0.1:9"],
        "http://127.0.0.1:9 does not answer (Connection refused)",
    ),
    "plain folder as store": (["tracking.uri=runs"], "sqlite:///"),
    "resume without a run ID": (["resume=true"], "resume=RUN_ID"),
    "resume of an unknown run": (["resume=abc"], "there is no tracking store"),
}
# What a configuration gets wrong by itself is said before there are data and a run.
NO_RUN = (
    "empty segment", "unknown model option", "unknown class", "unknown metric", "unknown loss",
    "module that does not exist", "unknown accelerator", "record without what it needs",
    "text instead of a number",
)  # fmt: skip
DATES = ["segments.train=[2018-07-01,2019-06-30]", "segments.valid=[2019-07-01,2019-09-30]"]


# Each takes about a second: the fast suite runs only a few.
FAST = ("unknown universe", "record without what it needs")
FAULTS = [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in CONFIG_FAULTS]


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_configuration_gives_a_one_line_error(fault, train, qtorch_cli, runs, monkeypatch):
    monkeypatch.setenv("QTORCH_TRACKING_TIMEOUT", "1")
    overrides, message = CONFIG_FAULTS[fault]
    if fault == "empty segment":
        overrides = [*DATES, "record=none", *overrides]
    if fault.startswith("resume"):
        result = qtorch_cli("train", *overrides)
    else:
        result = train(*overrides)
    assert message in result.error()
    assert result.code == 1
    if fault in NO_RUN:
        assert runs() == []
    if fault == "larger portfolio than universe":  # reported before there is a run
        assert not runs()
    if "tracking" not in fault and "store" not in fault:
        assert_no_finished_run(runs)


@pytest.mark.slow
def test_overlapping_segments(train, runs):
    result = train(
        *DATES[:1],
        "segments.valid=[2019-06-01,2019-09-30]",
        "segments.test=[2019-10-01,2020-06-30]",
    )
    assert "overlap" in result.error()
    assert_no_finished_run(runs)


def corrupt(bars: pd.DataFrame, fault: str) -> pd.DataFrame:
    if fault == "duplicate row":
        return pd.concat([bars, bars.tail(1)])
    if fault == "time zone":
        return bars.assign(datetime=bars["datetime"].dt.tz_localize("America/New_York"))
    if fault == "not numeric":
        return bars.assign(close=bars["close"].astype(str) + " USD")
    if fault == "infinite":
        return bars.assign(close=bars["close"].where(bars.index != 1234, np.inf))
    if fault == "one instrument":
        return bars[bars["instrument"] == "I0"]
    return bars


TABLE_FAULTS = {
    "duplicate row": "duplicate",
    "time zone": "America/New_York",
    "not numeric": "close",
    "infinite": "infinite values in the bars: close (1), first I2 on 2019-08-05. Fix the data, "
    "or put ProcessInf first in the handler's infer_processors",
    "one instrument": "compares the instruments of a day",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", TABLE_FAULTS)
def test_faulty_table_gives_a_one_line_error(fault, train, runs, folder):
    corrupt(make_bars(), fault).to_parquet(folder / "bars.parquet", index=False)
    result = train("data=table", "data.path=bars.parquet")
    assert TABLE_FAULTS[fault] in result.error()
    assert_no_finished_run(runs)
    # The fault is reported before the training.
    assert all(run.metric_history("train/loss") == {} for run in runs())
    if fault == "one instrument":
        result_without_records = train("data=table", "data.path=bars.parquet", "record=none")
        assert "CSRankNorm compares the instruments of a day" in result_without_records.error()


@pytest.mark.slow
def test_process_inf_handles_infinite_values(train, runs, folder):
    corrupt(make_bars(), "infinite").to_parquet(folder / "bars.parquet", index=False)
    result = train(
        "data=table",
        "data.path=bars.parquet",
        "handler.infer_processors=[{_target_:qtorch.data.processor.ProcessInf},"
        "{_target_:qtorch.data.processor.Fillna,fields_group:feature}]",
        "handler.learn_processors=[{_target_:qtorch.data.processor.DropnaLabel},"
        "{_target_:qtorch.data.processor.ProcessInf}]",
    )
    assert result.code == 0, result.err
    assert runs()[0].status == "FINISHED"


@pytest.mark.slow
def test_truncated_bin_file(train, qtorch_cli, runs, folder):
    assert qtorch_cli("data", "import", "data=synthetic_tiny", "out=bars").code == 0
    path = sorted((folder / "bars" / "features").glob("*/close.day.bin"))[3]
    path.write_bytes(path.read_bytes()[:-6])
    result = train("data=qlib", "data.provider_uri=bars")
    assert "close.day.bin" in result.error()
    assert_no_finished_run(runs)


@pytest.mark.slow
def test_predict_with_a_failed_run(train, runs, qtorch_cli):
    train("handler.label=['Ref($close,-9999)/$close']")
    (run,) = runs()
    result = qtorch_cli("predict", f"run={run.id}", "out=x.csv")
    assert "only a finished run has a fitted model" in result.error()


@pytest.mark.slow
def test_full_disk_while_saving(train, runs, folder, monkeypatch):
    monkeypatch.setenv("QTORCH_TRACKING_PATIENCE", "1")
    disk = folder / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip(f"a small filesystem cannot be mounted here: {mount.stderr.strip()}")
    try:
        result = train(f"tracking.uri=sqlite:///{disk}/runs.db", "model.network.hidden_size=400")
        assert "full" in result.error()
        import qtorch

        qtorch.init(tracking_uri=f"sqlite:///{disk}/runs.db")
        assert "FINISHED" not in [r.status for r in runs()]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
