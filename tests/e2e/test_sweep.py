"""A sweep as a thing: its run and its jobs, taken up again, interrupted, shown."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from qtorch.core.identity import task_id
from qtorch.study.sweep_job import FIT_FROM_TAG
from qtorch.tracking.lineage import PARENT_TAG
from qtorch.tracking.outbox import ATTEMPT_TAG

pytestmark = pytest.mark.slow


@pytest.fixture
def jobs(runs):
    """`jobs()`: the runs that are no sweep's own."""

    def found():
        return [r for r in runs() if "qtorch.sweep" not in r.list_tags()]

    return found


def sweeps(runs):
    return [r for r in runs() if "qtorch.sweep" in r.list_tags()]


def committed(folder) -> str:
    """The commit of a folder under git."""
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), (*who, "commit", "-q", "--allow-empty", "-m", "begin")):
        subprocess.run(["git", *words], cwd=folder, check=True)
    told = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True
    )
    return told.stdout.strip()


def trained_at(run) -> int:
    return Path(run.download_artifact("params.pkl")).stat().st_mtime_ns


def rows_of(told, *words) -> list[str]:
    return [line for line in told.out.splitlines() if all(w in line for w in words)]


def test_a_sweep_is_one_run_that_the_same_command_takes_up_again(
    warm, train, runs, jobs, qtorch_cli, folder, monkeypatch
):
    commit = committed(folder)
    command = ("-m", "model.network.hidden_size=8,-1", "seed=0,1")
    told = train(*command)
    assert told.code == 1
    (parent,) = sweeps(runs)
    name = parent.list_tags()["qtorch.sweep"]
    assert parent.status == "FAILED"
    assert parent.name == f"sweep {name}"
    assert parent.list_tags()["mlflow.source.git.commit"] == commit
    assert set(command[1:]) <= set(parent.list_tags()["qtorch.sweep.overrides"].split())
    assert parent.list_tags()["qtorch.sweep.count"] == "4"
    children = jobs()
    assert {r.list_tags()[PARENT_TAG] for r in children} == {parent.id}
    assert sorted(r.status for r in children) == ["FAILED"] * 2 + ["FINISHED"] * 2
    for run in children:
        assert run.list_tags()["qtorch.task_id"] == task_id(run.load_object("task"))
    assert len(rows_of(told, "seed=", "FINISHED")) == len(rows_of(told, "seed=", "FAILED")) == 2
    assert "hidden_size=8       2 " in told.out  # the seeds as a group
    assert "all with: debug=tiny" in told.out
    assert len([line for line in told.err.splitlines() if line.startswith("error: job ")]) == 2

    before = {r.id: trained_at(r) for r in children if r.status == "FINISHED"}
    told = train(*command)
    assert told.code == 1
    assert {r.id for r in jobs()} == {r.id for r in children}
    assert {r.id: trained_at(r) for r in jobs() if r.status == "FINISHED"} == before
    assert len(rows_of(told, "(skipped)")) == 2
    assert "sweep.retry=true" in told.err
    assert [p.id for p in sweeps(runs)] == [parent.id]

    monkeypatch.chdir(folder.parent)  # from another folder: the store is known
    told = qtorch_cli("sweep", "resume", name, "retry=true")
    monkeypatch.chdir(folder)
    assert told.code == 1
    assert len(rows_of(told, "(skipped)")) == 2
    attempts = {r.status: r.list_tags()[ATTEMPT_TAG] for r in jobs()}
    assert attempts == {"FINISHED": "1", "FAILED": "2"}
    assert {r.id for r in jobs()} == {r.id for r in children}

    told = train("-m", "model.network.hidden_size=8", "seed=0,1,2")
    assert told.code == 0, told.err
    assert len(jobs()) == 5  # one new value, one new run
    assert len(rows_of(told, "(skipped)")) == 2
    assert {p.status for p in sweeps(runs)} == {"FINISHED", "FAILED"}

    told = train("-m", "model.network.hidden_size=8", "seed=0,1", "record=none")
    assert told.code == 0, told.err
    assert len(rows_of(told, "(records only)")) == 2
    made = [r for r in jobs() if FIT_FROM_TAG in r.list_tags()]
    assert {r.list_tags()[FIT_FROM_TAG] for r in made} == set(before)
    for run in made:
        fitted = next(r for r in children if r.id == run.list_tags()[FIT_FROM_TAG])
        assert run.load_object("fit_report") == fitted.load_object("fit_report")
        assert run.logged("valid/loss") == fitted.logged("valid/loss")
        assert run.load_object("params.pkl").fit_report_ == fitted.load_object("fit_report")
        assert not list(run.checkpoint_dir().iterdir())

    # the same job alone
    assert train("model.network.hidden_size=8", "seed=1").code == 0
    alone = next(r for r in jobs() if PARENT_TAG not in r.list_tags())
    same = next(r for r in children if r.list_tags()["qtorch.task_id"] == task_of(alone))
    assert alone.list_metrics() == same.list_metrics()
    shown(qtorch_cli, name, parent.id)


def task_of(run) -> str:
    return run.list_tags()["qtorch.task_id"]


def shown(qtorch_cli, name, id):
    """What `qtorch sweep` tells of the first sweep."""
    told = qtorch_cli("sweep", "show", name)
    assert told.code == 0, told.err
    assert len(rows_of(told, "seed=", "FAILED")) == 2
    assert "4 jobs, 2 finished, 2 failed" in told.out
    told = qtorch_cli("sweep", "best", id, "metric=valid.IC")
    assert "best by valid.IC" in told.out
    assert "hidden_size=8" in told.out
    told = qtorch_cli("sweep", "best", name, "metric=valid.ICC")
    assert "Did you mean 'valid.IC'" in told.error()
    told = qtorch_cli("sweep", "list")
    assert name in told.out
    assert "Did you mean" in qtorch_cli("sweep", "show", name + "x").error()
    assert "Did you mean 'resume'" in qtorch_cli("sweep", "resum", name).err
    assert "retry" in qtorch_cli("sweep", "--help").out


LONG = ("trainer.max_epochs=48", "callbacks=no_stop", "model.network.dropout=0.2")
STEPS = ("model.checkpoint.every_n_steps=2", "model.network.hidden_size=8")


def wait_for_epoch(jobs, child, epoch, patience=240.0):
    end = time.monotonic() + patience
    while time.monotonic() < end:
        assert child.poll() is None, child.communicate()
        for run in jobs():
            if epoch in run.logged("valid/loss"):
                return run
        time.sleep(0.1)
    raise AssertionError("the training did not get anywhere")


def below(pid: int) -> list[int]:
    """The processes that descend from one."""
    told = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in told.stdout.splitlines()]
    found, fresh = [], [pid]
    while fresh:
        fresh = [p for p, parent in pairs if parent in fresh]
        found += fresh
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def history(run) -> dict:
    return {k: run.logged(k) for k in sorted(run.list_metrics())}


def test_a_sweep_that_is_interrupted_and_killed_ends_as_one_that_was_not(
    warm, start, train, runs, jobs, qtorch_cli
):
    job = ("train", "debug=tiny", "log_level=WARNING", "-m", *LONG, *STEPS, "seed=0,1")
    child = start(*job, own_group=True)
    run = wait_for_epoch(jobs, child, 1)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted twice" not in err
    (parent,) = sweeps(runs)
    name = parent.list_tags()["qtorch.sweep"]
    assert f"qtorch sweep resume {name}" in err
    assert [r.status for r in jobs()] == ["KILLED"]
    assert parent.status == "KILLED"
    stood = max(run.logged("valid/loss"))

    child = start(*job, own_group=True)
    wait_for_epoch(jobs, child, stood + 2)
    others = below(child.pid)
    child.kill()  # -9: the jobs' processes notice
    child.communicate()
    end = time.monotonic() + 60
    while any(map(is_alive, others)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_alive, others))
    assert [r.status for r in jobs()] == ["KILLED"]

    told = qtorch_cli("sweep", "resume", name)
    assert told.code == 0, told.err
    found = {r.list_params()["seed"]: r for r in jobs()}
    assert len(jobs()) == 2
    assert found["0"].id == run.id
    assert len(rows_of(told, "(resumed)")) == 1
    assert sweeps(runs)[0].status == "FINISHED"
    plan = parent.load_object("sweep")
    assert plan["commands"][0]["words"][0] == "debug=tiny"

    assert train("debug=tiny", *LONG, *STEPS, "seed=0").code == 0
    alone = next(r for r in jobs() if PARENT_TAG not in r.list_tags())
    assert history(alone) == history(found["0"])


def test_a_job_that_the_kernel_ends_is_failed_and_takes_no_other_along(
    warm, train, jobs, folder, monkeypatch
):
    (folder / "greedy.py").write_text(
        "import os, signal\nfrom qtorch.nn import LSTM\n\n\nclass Greedy(LSTM):\n"
        "    def __init__(self, *args, **kwargs):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("QTORCH_TRUSTED", "greedy")
    told = train("-m", "model.network._target_=greedy.Greedy,qtorch.nn.GRU")
    assert told.code == 1
    assert "was ended by SIGKILL" in told.err
    ends = {r.status: r.list_tags().get("error", "") for r in jobs()}
    assert sorted(ends) == ["FAILED", "FINISHED"]
    assert "SIGKILL" in ends["FAILED"]


def test_an_error_of_the_launcher_does_not_lose_the_table(warm, train, runs, jobs, folder):
    (folder / "out").mkdir()
    (folder / "out" / "1").touch()  # where the second job's folder would be
    told = train("-m", "hydra.sweep.dir=out", "seed=0,1")
    assert told.code == 1
    assert "out/1" in told.error()
    assert len(rows_of(told, " 0 ", "FINISHED")) == 1
    assert [r.status for r in jobs()] == ["FINISHED"]
    assert [p.status for p in sweeps(runs)] == ["FAILED"]


def test_two_processes_begin_one_sweep_at_once(folder, runs):
    from multiprocessing import get_context

    from qtorch import R

    R.get_exp(experiment_name="debug")  # the store is there
    context = get_context("fork")
    barrier = context.Barrier(4)
    children = [context.Process(target=begin_one, args=(barrier,)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [c.exitcode for c in children] == [0] * 4
    (parent,) = sweeps(runs)
    assert len(parent.load_object("sweep")["commands"]) == 1


def begin_one(barrier):
    from qtorch.study.sweep import begin_sweep, end_sweep

    barrier.wait()
    recorder = begin_sweep("race", "debug", ["seed=0,1"], told=["seed=0,1"], folder=".")
    end_sweep(recorder)


ODD = """
import json, os, signal
from pathlib import Path
from qtorch.nn import LSTM


class Odd(LSTM):
    def __init__(self, d_feat=6, **kwargs):
        Path("seen.json").write_text(json.dumps(os.environ.get("CUDA_VISIBLE_DEVICES")))
        if not Path("spared").exists():
            os.kill(os.getppid(), signal.SIGKILL)  # submitit's, which would tell of the end
            os.kill(os.getpid(), signal.SIGKILL)
        super().__init__(d_feat, **kwargs)
"""


def test_submitit_gives_each_job_that_is_left_a_process_by_itself(
    warm, train, jobs, folder, monkeypatch
):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    (folder / "odd.py").write_text(ODD)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("QTORCH_TRUSTED", "odd")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    command = ("-m", "model=gru", "hydra/launcher=submitit_local")
    networks = "model.network._target_=odd.Odd,qtorch.nn.GRU"
    told = train(*command, networks)
    assert told.code == 1
    # The lost one was waited for, and the others too: it may be taken up, and none has failed.
    assert len(rows_of(told, "Odd", "KILLED")) == len(rows_of(told, "GRU", "FINISHED")) == 1
    assert "error: job 0: job " in told.err
    assert "has ended without a result" in told.err
    assert "0_log.err" in told.err
    assert (folder / "seen.json").read_text() == '"5,7"'

    (folder / "spared").touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    submitted = len(list(folder.rglob("*_submitted.pkl")))
    told = train(*command, f"{networks},no.Net")
    assert told.code == 1
    assert len(rows_of(told, " 0 ", "Odd", "FINISHED (resumed)")) == 1, told
    assert len(rows_of(told, " 1 ", "GRU", "FINISHED (skipped)")) == 1
    assert len(rows_of(told, " 2 ", "no.Net", "FAILED")) == 1
    assert len(list(folder.rglob("*_submitted.pkl"))) == submitted + 2  # of the jobs that were left
    assert len([p for p in folder.rglob("job.json") if p.parent.name == "2"]) == 1
    assert (folder / "seen.json").read_text() == "null"

    told = train(*command, f"{networks},no.Net")
    assert told.code == 1
    assert len(list(folder.rglob("*_submitted.pkl"))) == submitted + 2
    assert len(rows_of(told, "(skipped)")) == 2
    assert "error: job 2: " in told.err
    assert "sweep.retry=true" in told.err
    assert len(jobs()) == 3


def test_a_launcher_that_is_not_installed_is_told_before_anything_begins(
    qtorch_cli, runs, monkeypatch
):
    from hydra.core.plugins import Plugins

    joblib = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
    monkeypatch.delitem(Plugins.instance().class_name_to_class, joblib)
    told = qtorch_cli("train", "-m", "debug=tiny", "hydra/launcher=joblib", "seed=0,1")
    assert "pip install 'qtorch[sweep]'" in told.error()
    assert not sweeps(runs)
