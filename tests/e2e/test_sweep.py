"""Tests of sweeps: their runs and jobs, resuming, interruption, and the `qtorch sweep` command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from training_runs import metric_points, wait_for_epoch

from qtorch.core.identity import task_id
from qtorch.study.sweep_job import FIT_FROM_TAG
from qtorch.tracking.delivery import ATTEMPT_TAG
from qtorch.tracking.recorder import PARENT_TAG

pytestmark = pytest.mark.slow


@pytest.fixture
def jobs(runs):
    """Return `jobs()`: the runs that are not a sweep's own run."""

    def list_jobs():
        return [r for r in runs() if "qtorch.sweep" not in r.list_tags()]

    return list_jobs


def sweeps(runs):
    return [r for r in runs() if "qtorch.sweep" in r.list_tags()]


def create_commit(folder) -> str:
    """Initialize a git repository in a folder and return its commit."""
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), (*identity, "commit", "-q", "--allow-empty", "-m", "begin")):
        subprocess.run(["git", *words], cwd=folder, check=True)
    result = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


def training_time(run) -> int:
    return Path(run.download_artifact("params.pkl")).stat().st_mtime_ns


def matching_rows(result, *words) -> list[str]:
    return [line for line in result.out.splitlines() if all(w in line for w in words)]


def test_repeated_command_resumes_its_sweep(
    session_fork_server, train, runs, jobs, qtorch_cli, folder, monkeypatch
):
    commit = create_commit(folder)
    command = ("-m", "model.network.hidden_size=8,-1", "seed=0,1")
    result = train(*command)
    assert result.code == 1
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
    assert (
        len(matching_rows(result, "seed=", "FINISHED"))
        == len(matching_rows(result, "seed=", "FAILED"))
        == 2
    )
    assert "hidden_size=8       2 " in result.out  # the group of seeds
    assert "common overrides: debug=tiny" in result.out
    assert len([line for line in result.err.splitlines() if line.startswith("error: job ")]) == 2

    training_times = {r.id: training_time(r) for r in children if r.status == "FINISHED"}
    result = train(*command)
    assert result.code == 1
    assert {r.id for r in jobs()} == {r.id for r in children}
    assert {r.id: training_time(r) for r in jobs() if r.status == "FINISHED"} == training_times
    assert len(matching_rows(result, "(skipped)")) == 2
    assert "sweep.retry=true" in result.err
    assert [p.id for p in sweeps(runs)] == [parent.id]

    monkeypatch.chdir(folder.parent)  # from another folder: the command finds the store
    result = qtorch_cli("sweep", "resume", name, "retry=true")
    monkeypatch.chdir(folder)
    assert result.code == 1
    assert len(matching_rows(result, "(skipped)")) == 2
    attempts = {r.status: r.list_tags()[ATTEMPT_TAG] for r in jobs()}
    assert attempts == {"FINISHED": "1", "FAILED": "2"}
    assert {r.id for r in jobs()} == {r.id for r in children}

    result = train("-m", "model.network.hidden_size=8", "seed=0,1,2")
    assert result.code == 0, result.err
    assert len(jobs()) == 5  # one new value, one new run
    assert len(matching_rows(result, "(skipped)")) == 2
    assert {p.status for p in sweeps(runs)} == {"FINISHED", "FAILED"}

    result = train("-m", "model.network.hidden_size=8", "seed=0,1", "record=none")
    assert result.code == 0, result.err
    assert len(matching_rows(result, "(records only)")) == 2
    record_runs = [r for r in jobs() if FIT_FROM_TAG in r.list_tags()]
    assert {r.list_tags()[FIT_FROM_TAG] for r in record_runs} == set(training_times)
    for run in record_runs:
        fitted_run = next(r for r in children if r.id == run.list_tags()[FIT_FROM_TAG])
        assert run.load_object("fit_report") == fitted_run.load_object("fit_report")
        assert run.metric_history("valid/loss") == fitted_run.metric_history("valid/loss")
        assert run.load_object("params.pkl").fit_report_ == fitted_run.load_object("fit_report")
        assert not list(run.checkpoint_dir().iterdir())

    # The same job without a sweep.
    assert train("model.network.hidden_size=8", "seed=1").code == 0
    single_run = next(r for r in jobs() if PARENT_TAG not in r.list_tags())
    sweep_run = next(r for r in children if r.list_tags()["qtorch.task_id"] == task_tag(single_run))
    assert single_run.list_metrics() == sweep_run.list_metrics()
    check_sweep_command(qtorch_cli, name, parent.id)


def task_tag(run) -> str:
    return run.list_tags()["qtorch.task_id"]


def check_sweep_command(qtorch_cli, name, id):
    """Check what `qtorch sweep` prints about the first sweep."""
    result = qtorch_cli("sweep", "show", name)
    assert result.code == 0, result.err
    assert len(matching_rows(result, "seed=", "FAILED")) == 2
    assert "4 jobs, 2 finished, 2 failed" in result.out
    result = qtorch_cli("sweep", "best", id, "metric=valid.IC")
    assert "best by valid.IC" in result.out
    assert "hidden_size=8" in result.out
    result = qtorch_cli("sweep", "best", name, "metric=valid.ICC")
    assert "Did you mean 'valid.IC'" in result.error()
    result = qtorch_cli("sweep", "list")
    assert name in result.out
    assert "Did you mean" in qtorch_cli("sweep", "show", name + "x").error()
    assert "Did you mean 'resume'" in qtorch_cli("sweep", "resum", name).err
    assert "retry" in qtorch_cli("sweep", "--help").out


# An epoch takes seconds while the file `slow` exists, so that a signal comes in the middle.
SLOW_NETWORK = """
import time
from pathlib import Path
from qtorch.nn import LSTM


class Slow(LSTM):
    def forward(self, x):
        time.sleep(0.15 * Path("slow").exists())
        return super().forward(x)
"""
LONG = ("trainer.max_epochs=10", "callbacks=no_stop", "model.network.dropout=0.2")
STEPS = ("model.checkpoint.every_n_steps=2", "model.network.hidden_size=8")


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_interrupted_and_killed_sweep_gives_equal_results(
    session_fork_server, start, train, runs, jobs, qtorch_cli, folder, monkeypatch
):
    (folder / "slow_network.py").write_text(SLOW_NETWORK)
    (folder / "slow").touch()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("QTORCH_TRUSTED", "slow_network")
    settings = (*LONG, *STEPS, "model.network._target_=slow_network.Slow")
    job = ("train", "debug=tiny", "log_level=WARNING", "-m", *settings, "seed=0,1")
    child = start(*job, new_session=True)
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
    # Not of `run`, which has read its metrics before the end.
    last_epoch = max(jobs()[0].metric_history("valid/loss"))

    child = start(*job, new_session=True)
    wait_for_epoch(jobs, child, last_epoch + 2)
    descendants = psutil.Process(child.pid).children(recursive=True)
    child.kill()  # SIGKILL: the jobs' processes notice it
    child.communicate()
    end = time.monotonic() + 60
    while any(map(is_alive, descendants)) and time.monotonic() < end:
        time.sleep(0.05)
    assert descendants
    assert not any(map(is_alive, descendants))
    assert [r.status for r in jobs()] == ["KILLED"]

    (folder / "slow").unlink()
    result = qtorch_cli("sweep", "resume", name)
    assert result.code == 0, result.err
    runs_by_seed = {r.list_params()["seed"]: r for r in jobs()}
    assert len(jobs()) == 2
    assert runs_by_seed["0"].id == run.id
    assert len(matching_rows(result, "(resumed)")) == 1
    assert sweeps(runs)[0].status == "FINISHED"
    plan = parent.load_object("sweep")
    assert plan["commands"][0]["words"][0] == "debug=tiny"

    assert train("debug=tiny", *settings, "seed=0").code == 0
    single_run = next(r for r in jobs() if PARENT_TAG not in r.list_tags())
    database = folder / "mlruns" / "mlflow.db"
    sweep_points = metric_points(database, runs_by_seed["0"].id)
    assert metric_points(database, single_run.id) == sweep_points


def test_mode_in_a_file_and_folders_of_jobs_change_nothing(
    session_fork_server, train, jobs, qtorch_cli, folder
):
    experiments = folder / "conf" / "experiment"
    experiments.mkdir(parents=True)
    (experiments / "seeds.yaml").write_text(
        "# @package _global_\n"
        "hydra: {mode: MULTIRUN, job: {chdir: true}, sweeper: {params: {seed: '0,1'}}}\n"
    )
    words = (f"--config-dir={folder / 'conf'}", "experiment=seeds", "record=none", "sweep.name=two")
    result = train(*words)
    assert result.code == 0, result.err
    assert len(matching_rows(result, "FINISHED")) == 2
    assert [r.status for r in jobs()] == ["FINISHED"] * 2
    assert [p.relative_to(folder) for p in folder.rglob("mlflow.db")] == [Path("mlruns/mlflow.db")]
    assert "all finished" in qtorch_cli("sweep", "show", "two").out


def test_killed_job_fails_alone(session_fork_server, train, jobs, folder, monkeypatch):
    (folder / "fatal.py").write_text(
        "import os, signal\nfrom qtorch.nn import LSTM\n\n\nclass Fatal(LSTM):\n"
        "    def __init__(self, *args, **kwargs):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("QTORCH_TRUSTED", "fatal")
    result = train("-m", "model.network._target_=fatal.Fatal,qtorch.nn.GRU")
    assert result.code == 1
    assert "was killed by SIGKILL" in result.err
    errors = {r.status: r.list_tags().get("error", "") for r in jobs()}
    assert sorted(errors) == ["FAILED", "FINISHED"]
    assert "SIGKILL" in errors["FAILED"]


def test_launcher_error_keeps_the_table(session_fork_server, train, runs, jobs, folder):
    (folder / "out").mkdir()
    (folder / "out" / "1").touch()  # blocks the folder of the second job
    result = train("-m", "hydra.sweep.dir=out", "seed=0,1")
    assert result.code == 1
    assert "out/1" in result.error()
    assert len(matching_rows(result, " 0 ", "FINISHED")) == 1
    assert [r.status for r in jobs()] == ["FINISHED"]
    assert [p.status for p in sweeps(runs)] == ["FAILED"]


def test_concurrent_starts_share_one_sweep(folder, runs):
    from multiprocessing import get_context

    from qtorch import R

    R.get_exp(experiment_name="debug")  # create the store
    context = get_context("fork")
    barrier = context.Barrier(4)
    children = [context.Process(target=start_and_end_sweep, args=(barrier,)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [c.exitcode for c in children] == [0] * 4
    (parent,) = sweeps(runs)
    assert len(parent.load_object("sweep")["commands"]) == 1


def start_and_end_sweep(barrier):
    from qtorch.study.sweep import end_sweep, start_sweep

    barrier.wait()
    recorder = start_sweep("race", "debug", ["seed=0,1"], overrides=["seed=0,1"], folder=".")
    end_sweep(recorder)


FATAL_NETWORK = """
import json, os, signal
from pathlib import Path
from qtorch.nn import LSTM


class Fatal(LSTM):
    def __init__(self, d_feat=6, **kwargs):
        Path("visible_devices.json").write_text(json.dumps(os.environ.get("CUDA_VISIBLE_DEVICES")))
        if not Path("survive").exists():
            os.kill(os.getppid(), signal.SIGKILL)  # submitit's process, which would report the end
            os.kill(os.getpid(), signal.SIGKILL)
        super().__init__(d_feat, **kwargs)
"""


def test_submitit_runs_each_unfinished_job_in_its_own_process(
    session_fork_server, train, jobs, folder, monkeypatch
):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    (folder / "fatal.py").write_text(FATAL_NETWORK)
    monkeypatch.delitem(sys.modules, "fatal", raising=False)  # that of another test
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("QTORCH_TRUSTED", "fatal")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    command = ("-m", "model=gru", "hydra/launcher=submitit_local")
    networks = "model.network._target_=fatal.Fatal,no.Net"
    result = train(*command, networks)
    assert result.code == 1
    # The launcher has waited for all jobs. The lost one can be resumed, the other one has failed.
    assert (
        len(matching_rows(result, "Fatal", "KILLED"))
        == len(matching_rows(result, "no.Net", "FAILED"))
        == 1
    )
    assert "error: job 0: job " in result.err
    assert "ended without a result" in result.err
    assert "0_log.err" in result.err
    assert (folder / "visible_devices.json").read_text() == '"5,7"'
    num_submitted = len(list(folder.rglob("*_submitted.pkl")))
    assert num_submitted == 2

    (folder / "survive").touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    result = train(*command, networks)
    assert result.code == 1
    assert len(matching_rows(result, " 0 ", "Fatal", "FINISHED (resumed)")) == 1, result
    # Only the unfinished job was submitted.
    assert len(list(folder.rglob("*_submitted.pkl"))) == num_submitted + 1
    assert (folder / "visible_devices.json").read_text() == "null"
    assert "error: job 1: " in result.err
    assert "sweep.retry=true" in result.err

    result = train(*command, networks)
    assert result.code == 1
    assert len(matching_rows(result, " 0 ", "Fatal", "FINISHED (skipped)")) == 1, result
    assert len(list(folder.rglob("*_submitted.pkl"))) == num_submitted + 1, result
    assert len(jobs()) == 2


def test_missing_launcher_is_reported_before_the_sweep_starts(qtorch_cli, runs, monkeypatch):
    from hydra.core.plugins import Plugins

    joblib = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
    monkeypatch.delitem(Plugins.instance().class_name_to_class, joblib)
    result = qtorch_cli("train", "-m", "debug=tiny", "hydra/launcher=joblib", "seed=0,1")
    assert "pip install 'hydra-joblib-launcher>=" in result.error()
    assert not sweeps(runs)


def test_killed_sweep_counts_as_killed_and_is_resumed(start, runs, qtorch_cli):
    """The sweep's own run has no process any more either: `kill -9` let nobody end it."""
    child = start("train", "-m", "debug=tiny", "trainer.max_epochs=200", "seed=0,1")
    wait_for_epoch(runs, child)
    child.kill()
    child.communicate()
    (sweep,) = sweeps(runs)
    assert sweep.status == "RUNNING"
    deadline = time.monotonic() + 60
    while (result := qtorch_cli("runs", "status=running")).out.count("debug"):
        assert time.monotonic() < deadline, result.out
        time.sleep(0.2)
    table = qtorch_cli("runs").out
    assert f"resume run {sweep.id[:12]}: qtorch sweep resume {sweep.id}" in table
    assert "KILLED (its process is gone)" in qtorch_cli("sweep", "list").out
