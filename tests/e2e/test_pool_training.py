"""Tests of real trainings through a pool with real workers, some of which are killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from qtorch.cli.compose import compose_settings
from qtorch.task import TaskManager
from qtorch.trainer import DelayTrainerR, DelayTrainerRM, TrainerR, TrainerRM
from qtorch.trainer.segments import resolve_segments

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_thread")]

E2E_FOLDER = Path(__file__).parent
LEASE = 6.0


def task(*overrides: str) -> dict[str, Any]:
    """Return a small training with dropout, and with checkpoints within epochs."""
    base = ["debug=tiny", "callbacks=no_stop", "model.checkpoint.every_n_steps=2"]
    small = ["model.network.hidden_size=16", "model.network.dropout=0.2", "trainer.max_epochs=3"]
    return resolve_segments(compose_settings("train", [*base, *small, *overrides])["task"])


@pytest.fixture
def worker(start, folder):
    """Return `worker(*words)`: start a process that works on the pool `pool`."""

    def begin(*words: str):
        path = os.pathsep.join([str(E2E_FOLDER), os.environ.get("PYTHONPATH", "")])
        return start("worker", "pool=pool", f"lease={LEASE}", *words, PYTHONPATH=path)

    return begin


@pytest.fixture
def pool(folder) -> TaskManager:
    return TaskManager("pool", lease=LEASE)


def submit(pool: TaskManager, *tasks: dict[str, Any]) -> list[str]:
    """Submit tasks to the pool as a trainer does; return their IDs."""
    task_ids = TrainerRM("pool", skip_run_task=True)._submit_tasks(pool, tasks, "pool")
    return [str(i) for i in task_ids]


def wait_until(condition: Callable[[], Any], child=None, timeout: float = 120.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            if child is not None:
                child.kill()
            raise AssertionError("timeout" if child is None else child.communicate())
        assert child is None or child.poll() is None, child.communicate()
        time.sleep(0.05)


def training_condition(pool: TaskManager, id: str, epoch: int = 1) -> Callable[[], bool]:
    """Return a condition that holds while the task's training is at or after an epoch."""

    def has_reached_epoch() -> bool:
        task = pool.re_query(id, decode=False)
        current_epoch = (task["progress"] or {}).get("epoch")
        return task["status"] == "running" and current_epoch is not None and current_epoch >= epoch

    return has_reached_epoch


def run_results(recorder) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the results of a run: its scores, and each metric with its history."""
    history = {k: recorder.metric_history(k) for k in sorted(recorder.list_metrics())}
    return recorder.load_object("pred.pkl"), history


def assert_equal(run, expected_run) -> None:
    (pred, history), (expected_pred, expected_history) = run_results(run), run_results(expected_run)
    pd.testing.assert_frame_equal(pred, expected_pred, check_exact=True)
    assert history == expected_history


def test_all_trainers_give_bit_equal_predictions(worker, pool):
    tasks = [task("model=gru"), task("seed=3")]
    process = worker("func=qtorch.trainer.run.task_train")
    trainers = [
        TrainerR("local"),
        DelayTrainerR("local"),
        TrainerRM("pool", skip_run_task=True, lease=LEASE),
        DelayTrainerRM("delayed", "pool", skip_run_task=True, lease=LEASE),
    ]
    results = [trainer(tasks) for trainer in trainers]
    for recorders in results[1:]:
        for run, expected_run in zip(recorders, results[0], strict=True):
            assert run.status == "FINISHED"
            assert_equal(run, expected_run)
    assert len({r.id for recorders in results for r in recorders}) == 8
    process.terminate()
    process.communicate(timeout=30)


@pytest.mark.parametrize("interruption", ["kill the worker", "kill the child", "terminate"])
def test_interrupted_training_resumes_its_run_with_equal_results(interruption, worker, pool):
    long_task = task("trainer.max_epochs=8")
    (id,) = submit(pool, long_task)
    first = worker()
    wait_until(training_condition(pool, id), first)
    run = pool.re_query(id, decode=False)["run"]
    if interruption == "kill the child":
        # Beside the fork server, multiprocessing starts a resource tracker, without children.
        (child,) = (c for own in psutil.Process(first.pid).children() for c in own.children())
        os.kill(child.pid, signal.SIGKILL)
        second = first
    else:
        first.send_signal(signal.SIGKILL if interruption == "kill the worker" else signal.SIGTERM)
        first.communicate(timeout=60)
        second = worker()
    wait_until(lambda: pool.re_query(id, decode=False)["status"] == "done", second)
    finished_task = pool.re_query(id)
    counts = (
        finished_task["attempt"],
        finished_task["errors"],
        finished_task["lost"],
        finished_task["preemptions"],
    )
    expected_counts = {"kill the worker": (2, 0, 1, 0), "kill the child": (2, 1, 0, 0)}
    assert counts == expected_counts.get(interruption, (2, 0, 0, 1))
    recorder = finished_task["res"]
    assert (recorder.id, recorder.status) == (run["recorder_id"], "FINISHED")
    assert recorder.load_object("fit_report")["resumed_from"] is not None
    (uninterrupted_run,) = TrainerR("local")(long_task)
    assert_equal(recorder, uninterrupted_run)
    (reused_run,) = TrainerRM("pool", skip_run_task=True)(long_task)
    assert reused_run.id == recorder.id


def test_worker_trains_on_two_devices(worker, pool):
    overrides = ("model.network.dropout=0", "trainer.max_epochs=4", "trainer.accelerator=cpu")
    (id,) = submit(pool, task(*overrides, "trainer=ddp"))
    process = worker()
    wait_until(training_condition(pool, id), process)
    descendants = psutil.Process(process.pid).children(recursive=True)
    assert len(descendants) >= 3  # the task's process and its ranks
    wait_until(lambda: pool.re_query(id, decode=False)["status"] == "done", process)
    finished_task = pool.re_query(id)
    (single_device_run,) = TrainerR("local")(task(*overrides))
    (pred, history), (expected_pred, expected_history) = (
        run_results(finished_task["res"]),
        run_results(single_device_run),
    )
    pd.testing.assert_frame_equal(pred, expected_pred, atol=1e-4)
    for key in ("train/loss", "valid/loss"):
        assert history[key] == pytest.approx(expected_history[key], abs=1e-5)


def test_kill_between_training_and_commit(worker, pool, folder):
    (id,) = submit(pool, task())
    first = worker("func=pool_steps.train_then_wait")
    wait_until(lambda: (folder / "trained").exists(), first)
    wait_until(lambda: pool.re_query(id, decode=False)["run"], first)
    first.kill()
    first.communicate()
    second = worker("func=pool_steps.train_then_wait")
    wait_until(lambda: pool.re_query(id, decode=False)["status"] == "done", second)
    finished_task = pool.re_query(id)
    assert (finished_task["attempt"], finished_task["lost"], finished_task["res"].id) == (
        2,
        1,
        finished_task["run"]["recorder_id"],
    )
    assert finished_task["res"].status == "FINISHED"
    assert finished_task["res"].list_tags()["qtorch.attempt"] == "1"  # nothing was repeated


def test_delayed_trainings_survive_a_killed_worker(worker, pool):
    """Of two workers, one is killed in the middle of a training, and a third one starts."""
    trainer = DelayTrainerRM("pool", skip_run_task=True, lease=LEASE)
    tasks = [task(f"seed={s}", "trainer.max_epochs=5") for s in range(4)]
    prepared_runs = trainer.train(tasks)
    assert [r.status for r in prepared_runs] == ["SCHEDULED"] * 4
    ids = [r.list_tags()[TrainerRM.TM_ID] for r in prepared_runs]
    first, second = worker(), worker()
    wait_until(lambda: any(training_condition(pool, i)() for i in ids), first)
    first.kill()
    first.communicate()
    worker()
    finished_runs = trainer.end_train(prepared_runs)
    assert [r.id for r in finished_runs] == [r.id for r in prepared_runs]
    assert [r.status for r in finished_runs] == ["FINISHED"] * 4
    lost_tasks = [t for t in pool.query({}, decode=False) if t["lost"]]
    assert len(lost_tasks) == 1
    for run, expected_run in zip(finished_runs, TrainerR("local")(tasks), strict=True):
        assert_equal(run, expected_run)
    assert second.poll() is None


def test_warm_start_is_the_same_in_a_worker(worker, pool):
    overrides = ("model.network.num_layers=1", "model.network.dropout=0", "trainer.max_epochs=1")
    (earlier,) = TrainerR("local")(task(*overrides))
    warm_task = task("model=gats", *overrides, f"model.init_from=run:{earlier.id}")
    (local_run,) = TrainerR("local")(warm_task)
    (id,) = submit(pool, warm_task)
    process = worker()
    wait_until(lambda: pool.re_query(id, decode=False)["status"] == "done", process)
    recorder = pool.re_query(id)["res"]
    assert_equal(recorder, local_run)
    assert recorder.list_tags()["warm_start.from"] == earlier.id
    init_report = recorder.load_object("fit_report")["init_from"]
    assert init_report == local_run.load_object("fit_report")["init_from"]
    assert "rnn.weight_ih_l0" in init_report["weights"]


def test_sweep_through_a_pool(worker, qtorch_cli, runs):
    process = worker("experiment=debug")
    result = qtorch_cli(
        "train", "-m", "debug=tiny", "model=lstm,gru", "runner=rm", "pool=pool",
        "log_level=WARNING", "model.network.hidden_size=8", "trainer.max_epochs=1",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert result.out.count("FINISHED") == 2
    (parent,) = [r for r in runs() if "qtorch.sweep" in r.list_tags()]
    jobs = [r for r in runs() if r.id != parent.id]
    assert {r.name for r in jobs} == {"lstm", "gru"}
    assert all(r.id in result.out for r in jobs)
    assert {r.list_tags()["mlflow.parentRunId"] for r in jobs} == {parent.id}
    process.terminate()
    process.communicate(timeout=30)
    submit_result = qtorch_cli(
        "train", "debug=tiny", "runner=rm", "pool=other", "wait=false", "log_level=WARNING"
    )
    assert submit_result.code == 0
    assert "qtorch worker pool=other" in submit_result.err
    assert qtorch_cli("tasks", "stat", "pool=other").out.strip() == "1 waiting"
    assert "Did you mean 'rm'" in qtorch_cli("train", "debug=tiny", "runner=rmm").error()
