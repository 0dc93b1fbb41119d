"""What a user can get wrong: one clear line, an exit code, no run that looks finished."""

from __future__ import annotations

import subprocess

import numpy as np
import pandas as pd
import pytest


def closes(num_days: int = 300, num_instruments: int = 8) -> pd.DataFrame:
    """A long table of bars."""
    dates = pd.bdate_range("2019-01-01", periods=num_days).as_unit("ns")
    names = [f"I{k}" for k in range(num_instruments)]
    index = pd.MultiIndex.from_product([dates, names], names=["datetime", "instrument"])
    noise = np.random.default_rng(0).normal(0, 0.02, (num_days, num_instruments))
    close = (20 * np.exp(noise.cumsum(0))).ravel()
    bars = {n: close * f for n, f in (("open", 0.99), ("high", 1.02), ("low", 0.97), ("close", 1))}
    volume = np.exp(np.random.default_rng(1).normal(10, 0.3, close.shape))
    return pd.DataFrame({**bars, "vwap": close, "volume": volume}, index=index).reset_index()


def without_finished(runs):
    assert [r.status for r in runs()] in ([], ["FAILED"])


CONFIG_FAULTS = {
    "missing provider folder": (["data=qlib", "data.provider_uri=nowhere"], "nowhere"),
    "no provider folder given": (["data=qlib"], "data.provider_uri must be given"),
    "unknown universe": (["universe=stoks"], "Did you mean 'stocks'?"),
    "unknown model option": (["model.network.hiden_size=3"], "Did you mean 'hidden_size'?"),
    "unknown model option, added": (["+model.network.hiden_size=3"], "Did you mean 'hidden_size'?"),
    "unknown trainer option": (["trainer.max_epoch=3"], "Did you mean 'max_epochs'?"),
    "unknown option": (["sead=3"], "Did you mean 'seed'?"),
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
    "word for a number": (["trainer.max_epochs=abc"], "trainer.max_epochs is 'abc'"),
    "label of nothing": (
        ["handler.label=['Ref($close,-9999)/$close']"],
        "Is the label NaN everywhere",
    ),
    "empty segment": (["segments.test=[2031-01-01,2031-12-31]"], "test"),
    "segments over one": (["segments.test=0.9"], "their sum is at most 1"),
    "tracking that does not answer": (
        ["tracking.uri=http://127.0.0.1:9"],
        "http://127.0.0.1:9 does not answer (Connection refused)",
    ),
    "a bare folder as store": (["tracking.uri=runs"], "sqlite:///"),
    "resume of nothing": (["resume=true"], "resume=RUN_ID"),
    "resume of an unknown run": (["resume=abc"], "abc"),
}
DATES = ["segments.train=[2018-07-01,2019-06-30]", "segments.valid=[2019-07-01,2019-09-30]"]


# A second is little, but there are many: one of each kind in the fast suite.
FAST = (
    "missing provider folder",
    "unknown universe",
    "unknown model option",
    "unknown field",
    "unknown operator",
    "syntax error",
    "label of nothing",
    "empty segment",
    "tracking that does not answer",
)
FAULTS = [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in CONFIG_FAULTS]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_configuration(fault, train, qtorch_cli, runs, monkeypatch):
    monkeypatch.setenv("QTORCH_TRACKING_TIMEOUT", "1")
    overrides, said = CONFIG_FAULTS[fault]
    if fault == "empty segment":
        overrides = [*DATES, "record=none", *overrides]
    if fault.startswith("resume"):
        told = qtorch_cli("train", *overrides)
    else:
        told = train(*overrides)
    assert said in told.error()
    assert told.code == 1
    if fault == "empty segment":  # said before the training, not after it
        (run,) = runs()
        assert run.logged("train/loss") == {}
    if "tracking" not in fault and "store" not in fault:
        without_finished(runs)


@pytest.mark.slow
def test_overlapping_segments(train, runs):
    told = train(
        *DATES[:1],
        "segments.valid=[2019-06-01,2019-09-30]",
        "segments.test=[2019-10-01,2020-06-30]",
    )
    assert "overlap" in told.error()
    without_finished(runs)


def spoilt(bars: pd.DataFrame, how: str) -> pd.DataFrame:
    if how == "doubled":
        return pd.concat([bars, bars.tail(1)])
    if how == "unsorted":
        return bars.iloc[::-1]
    if how == "time zone":
        return bars.assign(datetime=bars["datetime"].dt.tz_localize("America/New_York"))
    if how == "not numeric":
        return bars.assign(close=bars["close"].astype(str) + " USD")
    if how == "infinite":
        return bars.assign(close=bars["close"].where(bars.index != 1234, np.inf))
    if how == "one instrument":
        return bars[bars["instrument"] == "I0"]
    return bars


TABLE_FAULTS = {
    "doubled": "doubled",
    "unsorted": "unsorted",
    "time zone": "America/New_York",
    "not numeric": "close",
    "infinite": "infinite values in the bars: close (1), first I2 on 2019-08-05. Mend them in the "
    "data, or put ProcessInf first among the handler's infer_processors",
    "one instrument": "compares the instruments of a day",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", TABLE_FAULTS)
def test_a_faulty_table(how, train, runs, folder):
    spoilt(closes(), how).to_parquet(folder / "bars.parquet", index=False)
    told = train("data=table", "data.path=bars.parquet")
    assert TABLE_FAULTS[how] in told.error()
    without_finished(runs)
    assert all(run.logged("train/loss") == {} for run in runs())  # said before the training
    if how == "one instrument":
        alone = train("data=table", "data.path=bars.parquet", "record=none")
        assert "CSRankNorm compares the instruments of a day" in alone.error()


@pytest.mark.slow
def test_process_inf_handles_infinite_values(train, runs, folder):
    spoilt(closes(), "infinite").to_parquet(folder / "bars.parquet", index=False)
    told = train(
        "data=table",
        "data.path=bars.parquet",
        "handler.infer_processors=[{_target_:qtorch.data.processor.ProcessInf},"
        "{_target_:qtorch.data.processor.Fillna,fields_group:feature}]",
        "handler.learn_processors=[{_target_:qtorch.data.processor.DropnaLabel},"
        "{_target_:qtorch.data.processor.ProcessInf}]",
    )
    assert told.code == 0, told.err
    assert runs()[0].status == "FINISHED"


@pytest.mark.slow
def test_a_bin_file_cut_in_the_middle(train, qtorch_cli, runs, folder):
    assert qtorch_cli("data", "import", "data=synthetic_tiny", "out=bars").code == 0
    path = sorted((folder / "bars" / "features").glob("*/close.day.bin"))[3]
    path.write_bytes(path.read_bytes()[:-6])
    told = train("data=qlib", "data.provider_uri=bars")
    assert "close.day.bin" in told.error()
    without_finished(runs)


@pytest.mark.slow
def test_predict_before_fit(train, runs, qtorch_cli):
    train("handler.label=['Ref($close,-9999)/$close']")
    (run,) = runs()
    told = qtorch_cli("predict", f"run={run.id}", "out=x.csv")
    assert "only a finished run holds a fitted model" in told.error()


@pytest.mark.slow
def test_a_full_disk_while_saving(train, runs, folder, monkeypatch):
    monkeypatch.setenv("QTORCH_TRACKING_PATIENCE", "1")
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small filesystem cannot be mounted here: {mounted.stderr.strip()}")
    try:
        told = train(f"tracking.uri=sqlite:///{disk}/runs.db", "model.network.hidden_size=400")
        assert "full" in told.error()
        import qtorch

        qtorch.init(tracking_uri=f"sqlite:///{disk}/runs.db")
        assert "FINISHED" not in [r.status for r in runs()]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
