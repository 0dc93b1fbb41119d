"""Real trainings through a pool with real workers, some of which are killed."""

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

from qtorch.cli.compose import composed
from qtorch.cli.segments import with_dates
from qtorch.task import TaskManager
from qtorch.trainer import DelayTrainerR, DelayTrainerRM, TrainerR, TrainerRM

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
LEASE = 6.0


def task(*overrides: str) -> dict[str, Any]:
    """A small training with dropout, whose checkpoints lie within epochs too."""
    base = ["debug=tiny", "callbacks=no_stop", "model.checkpoint.every_n_steps=2"]
    small = ["model.network.hidden_size=16", "model.network.dropout=0.2", "trainer.max_epochs=3"]
    return with_dates(composed("train", [*base, *small, *overrides])["task"])


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-equal means: with one number of threads; the workers are started with one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def worker(start, folder):
    """`worker(*words)`: a process that works on the pool `pool`."""

    def begin(*words: str):
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        return start("worker", "pool=pool", f"lease={LEASE}", *words, PYTHONPATH=path)

    return begin


@pytest.fixture
def pool(folder) -> TaskManager:
    return TaskManager("pool", lease=LEASE)


def send(pool: TaskManager, *tasks: dict[str, Any]) -> list[str]:
    """What a trainer puts into the pool."""
    sent = TrainerRM("pool", skip_run_task=True)._sent(pool, tasks, "pool")
    return [str(s) for s in sent]


def until(condition: Callable[[], Any], child=None, patience: float = 120.0) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, child.communicate() if child and child.kill() else "late"
        assert child is None or child.poll() is None, child.communicate()
        time.sleep(0.05)


def in_mid_training(pool: TaskManager, id: str, epoch: int = 1) -> Callable[[], bool]:
    def holds() -> bool:
        found = pool.re_query(id, decode=False)
        at = (found["progress"] or {}).get("epoch")
        return found["status"] == "running" and at is not None and at >= epoch

    return holds


def told(recorder) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What a run found out: its scores, and each metric with its history."""
    history = {k: recorder.logged(k) for k in sorted(recorder.list_metrics())}
    return recorder.load_object("pred.pkl"), history


def assert_equal(one, other) -> None:
    (pred, history), (expected, its_history) = told(one), told(other)
    pd.testing.assert_frame_equal(pred, expected, check_exact=True)
    assert history == its_history


def test_the_four_ways_give_the_same_predictions_bit_for_bit(worker, pool):
    tasks = [task("model=gru"), task("seed=3")]
    process = worker("func=qtorch.trainer.run.task_train")
    ways = [
        TrainerR("here"),
        DelayTrainerR("here"),
        TrainerRM("pool", skip_run_task=True, lease=LEASE),
        DelayTrainerRM("delayed", "pool", skip_run_task=True, lease=LEASE),
    ]
    results = [way(tasks) for way in ways]
    for recorders in results[1:]:
        for one, other in zip(recorders, results[0], strict=True):
            assert one.status == "FINISHED"
            assert_equal(one, other)
    assert len({r.id for recorders in results for r in recorders}) == 8
    process.terminate()
    process.communicate(timeout=30)


@pytest.mark.parametrize("how", ["kill the worker", "kill the child", "terminate"])
def test_a_training_that_is_cut_short_goes_on_in_its_run_to_the_same_end(how, worker, pool):
    long = task("trainer.max_epochs=8")
    (id,) = send(pool, long)
    first = worker()
    until(in_mid_training(pool, id), first)
    run = pool.re_query(id, decode=False)["run"]
    if how == "kill the child":
        (zygote,) = psutil.Process(first.pid).children()
        (child,) = zygote.children()
        os.kill(child.pid, signal.SIGKILL)
        second = first
    else:
        first.send_signal(signal.SIGKILL if how == "kill the worker" else signal.SIGTERM)
        first.communicate(timeout=60)
        second = worker()
    until(lambda: pool.re_query(id, decode=False)["status"] == "done", second)
    done = pool.re_query(id)
    counts = (done["attempt"], done["errors"], done["lost"], done["preemptions"])
    expected = {"kill the worker": (2, 0, 1, 0), "kill the child": (2, 1, 0, 0)}
    assert counts == expected.get(how, (2, 0, 0, 1))
    recorder = done["res"]
    assert (recorder.id, recorder.status) == (run["recorder_id"], "FINISHED")
    assert recorder.load_object("fit_report")["resumed_from"] is not None
    (undisturbed,) = TrainerR("here")(long)
    assert_equal(recorder, undisturbed)
    (known,) = TrainerRM("pool", skip_run_task=True)(long)
    assert known.id == recorder.id


def test_a_training_on_two_devices_in_a_worker(worker, pool):
    form = ("model.network.dropout=0", "trainer.max_epochs=4", "trainer.accelerator=cpu")
    (id,) = send(pool, task(*form, "trainer=ddp"))
    process = worker()
    until(in_mid_training(pool, id), process)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 3  # the task's process and its ranks
    until(lambda: pool.re_query(id, decode=False)["status"] == "done", process)
    done = pool.re_query(id)
    (alone,) = TrainerR("here")(task(*form))
    (pred, history), (expected, its_history) = told(done["res"]), told(alone)
    pd.testing.assert_frame_equal(pred, expected, atol=1e-4)
    for key in ("train/loss", "valid/loss"):
        assert history[key] == pytest.approx(its_history[key], abs=1e-5)


def test_a_kill_between_the_trainings_end_and_the_commit(worker, pool, folder):
    (id,) = send(pool, task())
    first = worker("func=pool_steps.train_then_wait")
    until(lambda: (folder / "trained").exists(), first)
    until(lambda: pool.re_query(id, decode=False)["run"], first)
    first.kill()
    first.communicate()
    second = worker("func=pool_steps.train_then_wait")
    until(lambda: pool.re_query(id, decode=False)["status"] == "done", second)
    done = pool.re_query(id)
    assert (done["attempt"], done["lost"], done["res"].id) == (2, 1, done["run"]["recorder_id"])
    assert done["res"].status == "FINISHED"
    assert done["res"].list_tags()["qtorch.attempt"] == "1"  # nothing was done again


def test_delayed_trainings_survive_their_workers(worker, pool):
    """Two workers, one of which is killed in mid-training, another one comes."""
    trainer = DelayTrainerRM("pool", skip_run_task=True, lease=LEASE)
    tasks = [task(f"seed={s}", "trainer.max_epochs=5") for s in range(4)]
    begun = trainer.train(tasks)
    assert [r.status for r in begun] == ["SCHEDULED"] * 4
    ids = [r.list_tags()[TrainerRM.TM_ID] for r in begun]
    first, second = worker(), worker()
    until(lambda: any(in_mid_training(pool, i)() for i in ids), first)
    first.kill()
    first.communicate()
    worker()
    ended = trainer.end_train(begun)
    assert [r.id for r in ended] == [r.id for r in begun]
    assert [r.status for r in ended] == ["FINISHED"] * 4
    lost = [t for t in pool.query({}, decode=False) if t["lost"]]
    assert len(lost) == 1
    for one, other in zip(ended, TrainerR("here")(tasks), strict=True):
        assert_equal(one, other)
    assert second.poll() is None


def test_a_warm_start_is_the_same_in_a_worker(worker, pool):
    form = ("model.network.num_layers=1", "model.network.dropout=0", "trainer.max_epochs=1")
    (earlier,) = TrainerR("here")(task(*form))
    warm = task("model=gats", *form, f"model.init_from=run:{earlier.id}")
    (inline,) = TrainerR("here")(warm)
    (id,) = send(pool, warm)
    process = worker()
    until(lambda: pool.re_query(id, decode=False)["status"] == "done", process)
    recorder = pool.re_query(id)["res"]
    assert_equal(recorder, inline)
    assert recorder.list_tags()["warm_start.from"] == earlier.id
    found = recorder.load_object("fit_report")["init_from"]
    assert found == inline.load_object("fit_report")["init_from"]
    assert "rnn.weight_ih_l0" in found["weights"]


def test_a_sweep_through_the_pool(worker, qtorch_cli, runs):
    process = worker("experiment=debug")
    told = qtorch_cli(
        "train", "-m", "debug=tiny", "model=lstm,gru", "runner=rm", "pool=pool",
        "log_level=WARNING", "model.network.hidden_size=8", "trainer.max_epochs=1",
    )  # fmt: skip
    assert told.code == 0, told.err
    assert told.out.count("FINISHED") == 2
    (parent,) = [r for r in runs() if "qtorch.sweep" in r.list_tags()]
    jobs = [r for r in runs() if r.id != parent.id]
    assert {r.name for r in jobs} == {"lstm", "gru"}
    assert all(r.id in told.out for r in jobs)
    assert {r.list_tags()["mlflow.parentRunId"] for r in jobs} == {parent.id}
    process.terminate()
    process.communicate(timeout=30)
    bad = qtorch_cli(
        "train", "debug=tiny", "runner=rm", "pool=other", "wait=false", "log_level=WARNING"
    )
    assert bad.code == 0
    assert "qtorch worker pool=other" in bad.err
    assert qtorch_cli("tasks", "stat", "pool=other").out.strip() == "1 waiting"
    assert "Did you mean 'rm'" in qtorch_cli("train", "debug=tiny", "runner=rmm").error()
