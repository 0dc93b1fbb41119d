"""`hydra/launcher=ray` on a real cluster: every job ends, also where a worker is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

if importlib.util.find_spec("ray") is None:  # not imported: it reads its variables then
    pytest.skip("Ray is not installed", allow_module_level=True)

QUIET = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",  # else a busy machine leaves the jobs waiting
}
RAY = Path(sys.executable).with_name("ray")


def cluster_processes(port: int) -> list[psutil.Process]:
    """What runs of the cluster: its servers, and the workers."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if f"127.0.0.1:{port}" in line or f"--gcs_server_port={port}" in line:
            found.append(process)
    return found


def running_jobs(port: int) -> list[psutil.Process]:
    """The workers in which a job is running."""
    found = []
    for process in cluster_processes(port):
        for each in (process, *process.children(recursive=True)):
            try:
                if each.cmdline()[:1] == ["ray::run_in_worker"]:
                    found.append(each)
            except psutil.NoSuchProcess:
                continue
    return found


def jobs_of(runs: list[Any]) -> list[Any]:
    """The runs that are jobs: not the sweep's own."""
    return [r for r in runs if "seed" in r.list_params()]


@pytest.fixture
def cluster(tmp_path_factory, monkeypatch) -> Iterator[int]:
    """A cluster of two CPUs on loopback; its port. Nothing of it is left afterwards."""
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path("/tmp") / f"qtr{port}"  # sockets have short names
    command = [
        str(RAY), "start", "--head", "--num-cpus", "2", "--include-dashboard=false",
        "--disable-usage-stats", "--node-ip-address", "127.0.0.1", "--port", str(port),
        "--temp-dir", str(folder), "--object-store-memory", "100000000", "--block",
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None
            assert time.monotonic() < end
            time.sleep(0.2)
        yield port
    finally:
        children = psutil.Process(server.pid).children(recursive=True)
        server.terminate()
        server.wait(30)
        _, alive = psutil.wait_procs(children, timeout=20)
        shutil.rmtree(folder, ignore_errors=True)
        left = cluster_processes(port)
        for process in (*alive, *left):
            process.kill()
        assert not left


LONG = ("trainer.max_epochs=12", "callbacks=no_stop", "model.checkpoint.every_n_steps=2")
# What happens to each job, by its seed: Ray tries each once more.
HARM = {"0": ["SIGKILL"], "1": ["SIGTERM"], "2": ["SIGKILL", "SIGKILL"]}


def worker_of(run: Any, folder: Path) -> int:
    """The process that has claimed a run's job."""
    task = run.list_tags()["qtorch.task_id"]
    claim = folder / "mlruns" / "claims" / f"{run.experiment_id}-{task}.json"
    return int(json.loads(claim.read_text())["process"][0])


def harm(
    find_runs: Callable[[], list[Any]],
    folder: Path,
    plan: dict[str, list[str]],
    over: threading.Event,
) -> None:
    """Send each job's worker, and the next one's, what the plan has, once it has a checkpoint."""
    harmed: set[int] = set()
    while any(plan.values()) and not over.wait(0.5):
        if not (folder / "mlruns" / "mlflow.db").exists():
            continue
        for run in jobs_of(find_runs()):
            left = plan[run.list_params()["seed"]]
            try:
                pid = worker_of(run, folder)
                if left and pid not in harmed and "valid/loss" in run.list_metrics():
                    os.kill(pid, signal.Signals[left[0]])
                    harmed.add(pid)
                    left.pop(0)
            except (FileNotFoundError, ProcessLookupError):
                continue


@pytest.mark.slow
def test_a_sweep_on_a_cluster_survives_workers_that_end(cluster, train, qtorch_cli, runs, folder):
    plan = {seed: list(signals) for seed, signals in HARM.items()}
    over = threading.Event()
    harming = threading.Thread(target=harm, args=(runs, folder, plan, over))
    harming.start()
    address = f"hydra.launcher.address=127.0.0.1:{cluster}"
    told = train(
        "-m", "hydra/launcher=ray", address, "hydra.launcher.num_cpus=1",
        "hydra.launcher.max_retries=1", "sweep.name=harm", "seed=0,1,2", *LONG,
    )  # fmt: skip
    over.set()
    harming.join()
    assert not any(plan.values()), told.err
    assert told.code == 1, told.err
    assert "error: job 2: Ray lost it (max_retries=1)" in told.err
    assert len([line for line in told.out.splitlines() if "FINISHED" in line]) == 2
    assert len([line for line in told.out.splitlines() if "FAILED" in line]) == 1
    assert ends(runs()) == {"0": "FINISHED", "1": "FINISHED", "2": "FAILED"}
    assert not running_jobs(cluster)

    told = qtorch_cli("sweep", "resume", "harm", "retry=true")
    assert told.code == 0, told.err
    assert len([line for line in told.out.splitlines() if "(retried)" in line]) == 1
    assert ends(runs()) == dict.fromkeys(HARM, "FINISHED")
    for run in jobs_of(runs()):
        assert run.load_object("fit_report")["resumed_from"] is not None
        assert list(run.logged("valid/loss")) == list(range(12))


def ends(found: list[Any]) -> dict[str, str]:
    """The status of each job's run, by its seed; a job has one."""
    jobs = jobs_of(found)
    assert len(jobs) == len({r.list_params()["seed"] for r in jobs})
    return {r.list_params()["seed"]: r.status for r in jobs}


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_told_at_once(train):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = time.monotonic()
    told = train("-m", "hydra/launcher=ray", f"hydra.launcher.address=127.0.0.1:{port}", "seed=0,1")
    assert "ray start --head" in told.error()
    assert time.monotonic() - begin < 20
