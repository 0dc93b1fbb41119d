"""`hydra/launcher=ray` on a real cluster: every job ends, also where a worker is killed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
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


@pytest.mark.slow
def test_a_sweep_on_a_cluster_survives_a_killed_worker(cluster, train, runs, folder):
    killed: list[int] = []

    def kill_one() -> None:
        end = time.monotonic() + 120
        while not killed and time.monotonic() < end:
            if (folder / "mlruns" / "mlflow.db").exists() and jobs_of(runs()):
                for process in running_jobs(cluster):
                    os.kill(process.pid, 9)
                    killed.append(process.pid)
                    return
            time.sleep(0.1)

    killer = threading.Thread(target=kill_one)
    killer.start()
    told = train(
        "-m", "hydra/launcher=ray", f"hydra.launcher.address=127.0.0.1:{cluster}",
        "hydra.launcher.num_cpus=1", "seed=0,1,2,3", "trainer.max_epochs=2",
    )  # fmt: skip
    killer.join()
    assert killed
    assert told.code == 0, told.err
    rows = [line for line in told.out.splitlines() if "FINISHED" in line]
    assert len(rows) == 4
    finished = [r for r in jobs_of(runs()) if r.status == "FINISHED"]
    assert sorted(r.list_params()["seed"] for r in finished) == ["0", "1", "2", "3"]
    pids = {p.pid for p in running_jobs(cluster)}
    assert not pids


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_told_at_once(train):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = time.monotonic()
    told = train("-m", "hydra/launcher=ray", f"hydra.launcher.address=127.0.0.1:{port}", "seed=0,1")
    assert "ray start --head" in told.error()
    assert time.monotonic() - begin < 20
