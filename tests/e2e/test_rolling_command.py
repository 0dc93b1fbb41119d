"""Tests of `qtorch rolling`: locally, through a pool, and a study with a killed worker."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from test_pool_training import E2E_FOLDER, training_condition, wait_until
from training_runs import metric_points, wait_for_epoch

from qtorch import R
from qtorch.cli.compose import compose_settings
from qtorch.data.source.qlib import QlibSource
from qtorch.model.loop.module import ScoreModule
from qtorch.study import rolling_study
from qtorch.task import TaskManager
from qtorch.tracking.recorder import PARENT_TAG
from qtorch.trainer import DelayTrainerRM, TrainerR

TINY = ("debug=tiny", "log_level=WARNING", "model.network.hidden_size=8", "step=35")
LEASE = 6.0

pytestmark = pytest.mark.usefixtures("single_thread")


def parent_and_windows(experiment: str = "debug"):
    """Return the newest study of an experiment, and its windows in order."""
    runs = list(R.list_recorders(experiment_name=experiment).values())
    tags = {r.id: r.list_tags() for r in runs}
    parent = next(r for r in runs if PARENT_TAG not in tags[r.id])
    windows = [r for r in runs if tags[r.id].get(PARENT_TAG) == parent.id]
    return parent, sorted(windows, key=lambda r: int(tags[r.id]["rolling.window"]))


@pytest.mark.slow
def test_study_locally_and_through_a_pool(qtorch_cli, folder):
    result = qtorch_cli("rolling", *TINY, f"cache={folder}/features")
    assert result.code == 0, result.err
    parent, windows = parent_and_windows()
    assert len(windows) == 4
    assert parent.name == "rolling LSTM"
    assert all(r.id in result.out for r in (parent, *windows))
    assert {"IC", "test.IC", "window.IC"} <= parent.list_metrics().keys()
    prediction = parent.load_object("pred.pkl")

    cache_text = qtorch_cli("data", "cache", f"folder={folder}/features").out
    assert "1 entry" in cache_text

    result = qtorch_cli("rolling", *TINY, "cache=false", "runner=rm", "pool=windows")
    assert result.code == 0, result.err
    pool_parent, children = parent_and_windows()
    assert pool_parent.id != parent.id
    pd.testing.assert_frame_equal(pool_parent.load_object("pred.pkl"), prediction, check_exact=True)
    assert TaskManager("windows").task_stat()["done"] == 4

    # A repeated study finds its windows finished and adopts them.
    assert qtorch_cli("rolling", *TINY, "cache=false", "runner=rm", "pool=windows").code == 0
    repeated_parent, repeated_windows = parent_and_windows()
    assert repeated_parent.id != pool_parent.id
    assert [r.id for r in repeated_windows] == [r.id for r in children]


@pytest.mark.slow
def test_horizon_and_warm_start_options(qtorch_cli, folder):
    words = ["horizon=5", "warm_start=true", "rtype=sliding", "step=70", "runner=rm"]
    result = qtorch_cli("rolling", *TINY, *words, f"cache={folder}/features")
    assert result.code == 0, result.err
    parent, windows = parent_and_windows()
    task = windows[1].load_object("task")
    assert task["dataset"]["handler"]["label"] == ["Ref($close, -6)/Ref($close, -1) - 1"]
    assert windows[1].list_tags()["warm_start.from"] == windows[0].id
    assert parent.list_params()["rolling.horizon"] == "5"
    test, valid = (task["dataset"]["segments"][s] for s in ("test", "valid"))
    days = pd.bdate_range(valid[1], test[0])
    assert len(days) - 1 == 6  # as many days as the label needs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stp=40"], "Did you mean"),
        (["runner=rmm"], "Did you mean 'rm'"),
        (["rtype=slidin"], "Did you mean 'sliding'"),
        (["step=0"], "at least one bar"),
    ],
)
def test_wrong_arguments_give_a_one_line_error(qtorch_cli, words, message):
    assert message in qtorch_cli("rolling", "debug=tiny", *words).error()


def test_help_lists_the_options(qtorch_cli):
    result = qtorch_cli("rolling", "--help")
    assert result.code == 0
    assert all(word in result.out for word in ("step", "rtype", "horizon", "warm_start", "runner"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_interrupted_study_continues_with_the_same_command(
    start, qtorch_cli, runs, folder, number, monkeypatch
):
    second_epochs, real = [], ScoreModule.on_train_epoch_start

    def start_epoch(module):
        second_epochs.extend([module] * (module.current_epoch == 1))
        while len(second_epochs) == 2 and not (folder / "signal-sent").exists():
            time.sleep(0.02)
        real(module)

    monkeypatch.setattr(ScoreModule, "on_train_epoch_start", start_epoch)
    command = ("rolling", *TINY, "step=70", "trainer.max_epochs=3", "callbacks=no_stop")
    command += ("model.checkpoint.every_n_steps=2", "model.network.dropout=0.2", "cache=false")
    child = start(*command)
    window = wait_for_epoch(
        lambda: [r for r in runs() if r.list_tags().get("rolling.window") == "1"], child
    )
    child.send_signal(number)
    (folder / "signal-sent").touch()
    _, err = child.communicate(timeout=60)
    interrupted_study, (first, second) = parent_and_windows()
    assert (first.status, second.id) == ("FINISHED", window.id)
    if number == signal.SIGKILL:
        assert "repeat the command of its rolling study" in qtorch_cli("runs").out
    else:
        assert "Continue with the same command" in err
        assert "Resume with" not in err  # one instruction
        assert interrupted_study.status == second.status == "KILLED"

    result = qtorch_cli(*command)
    assert result.code == 0, result.err
    study, windows = parent_and_windows()
    assert study.id == interrupted_study.id
    assert [r.id for r in windows] == [first.id, second.id]
    assert windows[1].load_object("fit_report")["resumed_from"] is not None
    assert windows[0].end_time == first.end_time

    assert qtorch_cli(*command, "experiment_name=undisturbed").code == 0
    undisturbed_study, undisturbed_windows = parent_and_windows("undisturbed")
    database = folder / "mlruns" / "mlflow.db"
    for run, other in zip(
        (study, *windows), (undisturbed_study, *undisturbed_windows), strict=True
    ):
        assert metric_points(database, run.id) == metric_points(database, other.id)
    assert "expected true" in qtorch_cli("rolling", *TINY, "resume=3").error()


# -- a real study ----------------------------------------------------------------------------------

STEP, WINDOWS = 20, 3


def real_task(provider: Path, model: str, cache: Path) -> dict:
    """Return a task with two years of training on 100 instruments, and 3 windows of 20 days."""
    source = QlibSource(str(provider))
    days, names = source.calendar(), sorted(source.instruments("nyse500"))[:100]
    ends = [len(days) - 1 - k for k in (WINDOWS * STEP + 360, WINDOWS * STEP + 40, WINDOWS * STEP)]
    first, train, valid = (f"{days[k]:%Y-%m-%d}" for k in ends)
    next_days = [f"{days[k + 1]:%Y-%m-%d}" for k in ends[1:]]
    settings = compose_settings(
        "rolling",
        [
            "data=qlib",
            f"data.provider_uri={provider}",
            f"model={model}",
            "dataset.step_len=10",
            "model.network.hidden_size=16",
            "model.network.dropout=0.1",
            "model.checkpoint.every_n_steps=5",
            "trainer.max_epochs=3",
            "trainer.accelerator=cpu",
            "callbacks=no_stop",
        ],
    )
    task = settings["task"]
    task["dataset"]["handler"] |= {"instruments": names, "cache": str(cache)}
    task["dataset"]["segments"] = {
        "train": [first, train],
        "valid": [next_days[0], valid],
        "test": [next_days[1], f"{days[-1]:%Y-%m-%d}"],
    }
    return task


@pytest.mark.slow
def test_real_study_survives_a_killed_worker(start, folder, market_data):
    """Train 6 windows of LSTM and GRU with two workers; one is killed, and a third one starts."""
    provider = market_data / "qlib_nyse500"
    tasks = {name: real_task(provider, name, folder / "features") for name in ("lstm", "gru")}
    options = {"step": STEP, "rtype": "sliding", "cache": str(folder / "features")}
    trainer = DelayTrainerRM("study", "pool", skip_run_task=True, lease=LEASE)
    pool = TaskManager("pool", lease=LEASE)

    def worker():
        path = os.pathsep.join([str(E2E_FOLDER), os.environ.get("PYTHONPATH", "")])
        return start("worker", "pool=pool", f"lease={LEASE}", PYTHONPATH=path)

    def is_first_worker_training():
        running = pool.query({"status": "running"}, decode=False)
        return any(
            t["worker"]["pid"] == first.pid and training_condition(pool, t["_id"])()
            for t in running
        )

    first, _ = worker(), worker()
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(
            lambda: {
                n: rolling_study(t, trainer, recorder_name=n, **options) for n, t in tasks.items()
            }
        )
        wait_until(is_first_worker_training, first, timeout=300)
        first.kill()
        first.communicate()
        worker()
        results = running.result(timeout=1500)

    assert pool.task_stat() == {**dict.fromkeys(pool.task_stat(), 0), "done": 2 * WINDOWS}
    lost_tasks = [t for t in pool.query({}) if t["lost"]]
    assert len(lost_tasks) == 1
    assert lost_tasks[0]["res"].list_tags()["qtorch.attempt"] != "1"  # resumed in its run
    for name, result in results.items():
        assert len(result.windows) == WINDOWS
        days = result.prediction.index.get_level_values("datetime").unique()
        start_day, end_day = tasks[name]["dataset"]["segments"]["test"]
        assert days.equals(
            QlibSource(str(provider)).calendar(start_day, end_day).rename("datetime")
        )
        assert result.prediction.index.is_unique
        assert {"IC", "Rank IC", "test.ICIR"} <= result.recorder.list_metrics().keys()
        local_study = rolling_study(tasks[name], TrainerR("local"), **options)
        pd.testing.assert_frame_equal(local_study.prediction, result.prediction, check_exact=True)
