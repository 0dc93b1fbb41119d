"""Tests of `hydra/launcher=ray` on a real cluster, with workers that are killed."""

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

# Ray reads its environment variables when imported, so only look for it here.
if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed", allow_module_level=True)

RAY_VARIABLES = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",  # with Ray's default, a busy machine starves the jobs
}
RAY = Path(sys.executable).with_name("ray")


def cluster_processes(port: int) -> list[psutil.Process]:
    """Return the processes of the cluster: its servers and workers."""
    processes = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if f"127.0.0.1:{port}" in line or f"--gcs_server_port={port}" in line:
            processes.append(process)
    return processes


def running_jobs(port: int) -> list[psutil.Process]:
    """Return the workers that are running a job."""
    workers = []
    for process in cluster_processes(port):
        for candidate in (process, *process.children(recursive=True)):
            try:
                if candidate.cmdline()[:1] == ["ray::run_in_worker"]:
                    workers.append(candidate)
            except psutil.NoSuchProcess:
                continue
    return workers


def job_runs(runs: list[Any]) -> list[Any]:
    """Return the runs of jobs, without the sweep's own run."""
    return [r for r in runs if "seed" in r.list_params()]


@pytest.fixture
def cluster(tmp_path_factory, monkeypatch) -> Iterator[int]:
    """Start a cluster of two CPUs on loopback and yield its port; end its processes afterwards."""
    for name, value in RAY_VARIABLES.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path("/tmp") / f"qtr{port}"  # the paths of sockets must be short
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
        remaining = cluster_processes(port)
        for process in (*alive, *remaining):
            process.kill()
        assert not remaining


LONG = ("trainer.max_epochs=12", "callbacks=no_stop", "model.checkpoint.every_n_steps=2")
# Signals that each job's workers get, by seed; Ray retries a job once.
SIGNALS_BY_SEED = {"0": ["SIGKILL"], "1": ["SIGTERM"], "2": ["SIGKILL", "SIGKILL"]}


def claiming_pid(run: Any, folder: Path) -> int:
    """Return the process ID that has claimed a run's job."""
    task = run.list_tags()["qtorch.task_id"]
    claim = folder / "mlruns" / "claims" / f"{run.experiment_id}-{task}.json"
    return int(json.loads(claim.read_text())["process"][0])


def signal_workers(
    find_runs: Callable[[], list[Any]],
    folder: Path,
    plan: dict[str, list[str]],
    is_done: threading.Event,
) -> None:
    """Send each job's workers their planned signals, one per worker once it has logged an epoch."""
    signalled_pids: set[int] = set()
    while any(plan.values()) and not is_done.wait(0.5):
        if not (folder / "mlruns" / "mlflow.db").exists():
            continue
        for run in job_runs(find_runs()):
            signals = plan[run.list_params()["seed"]]
            try:
                pid = claiming_pid(run, folder)
                if signals and pid not in signalled_pids and "valid/loss" in run.list_metrics():
                    os.kill(pid, signal.Signals[signals[0]])
                    signalled_pids.add(pid)
                    signals.pop(0)
            except (FileNotFoundError, ProcessLookupError):
                continue


@pytest.mark.slow
def test_sweep_survives_killed_workers(cluster, train, qtorch_cli, runs, folder):
    plan = {seed: list(signals) for seed, signals in SIGNALS_BY_SEED.items()}
    is_done = threading.Event()
    thread = threading.Thread(target=signal_workers, args=(runs, folder, plan, is_done))
    thread.start()
    address = f"hydra.launcher.address=127.0.0.1:{cluster}"
    result = train(
        "-m", "hydra/launcher=ray", address, "hydra.launcher.num_cpus=1",
        "hydra.launcher.max_retries=1", "sweep.name=signals", "seed=0,1,2", *LONG,
    )  # fmt: skip
    is_done.set()
    thread.join()
    assert not any(plan.values()), result.err
    assert result.code == 1, result.err
    assert "error: job 2: Ray lost the job (max_retries=1)" in result.err
    assert len([line for line in result.out.splitlines() if "FINISHED" in line]) == 2
    assert len([line for line in result.out.splitlines() if "FAILED" in line]) == 1
    assert statuses_by_seed(runs()) == {"0": "FINISHED", "1": "FINISHED", "2": "FAILED"}
    assert not running_jobs(cluster)

    result = qtorch_cli("sweep", "resume", "signals", "retry=true", "trusted=true")
    assert result.code == 0, result.err
    assert len([line for line in result.out.splitlines() if "(retried)" in line]) == 1
    assert statuses_by_seed(runs()) == dict.fromkeys(SIGNALS_BY_SEED, "FINISHED")
    for run in job_runs(runs()):
        assert run.load_object("fit_report")["resumed_from"] is not None
        assert list(run.metric_history("valid/loss")) == list(range(12))


def statuses_by_seed(runs: list[Any]) -> dict[str, str]:
    """Return the status of each job's run, by its seed; check that a job has only one run."""
    jobs = job_runs(runs)
    assert len(jobs) == len({r.list_params()["seed"] for r in jobs})
    return {r.list_params()["seed"]: r.status for r in jobs}


@pytest.mark.slow
def test_missing_cluster_is_reported_immediately(train):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begin = time.monotonic()
    result = train(
        "-m", "hydra/launcher=ray", f"hydra.launcher.address=127.0.0.1:{port}", "seed=0,1"
    )
    assert "ray start --head" in result.error()
    assert time.monotonic() - begin < 20
