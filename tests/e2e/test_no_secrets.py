"""No password and no token is in anything that the commands write, show or start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
import sqlalchemy as sa
from forked_command import ForkedCommand
from local_servers import MlflowServer, postgres

from qtorch.tracking.mlflow_store import open_store

pytestmark = pytest.mark.slow

# The passwords as a user writes them, most with characters that a URL needs percent-encoded.
SECRETS = {
    "argument": "Argu/ment@1#pw:x",
    "file": "File'pw&2%x",
    "environment": "Envi?ronment$3",
    "worker": "Worker=pw+4",
    "pool": "Pool/pw@5",
    "token": "Token6Token6Token6",
    "diff": "Diff7secret",
    "variable": "Variable8secret",
}
NEEDLES = {name: {s.encode(), quote(s, safe="").encode()} for name, s in SECRETS.items()}
TINY = ["debug=tiny", "model.network.hidden_size=8", "model.network.num_layers=1", "record=none"]


def secret_url(secret: str, address: str, user: str = "me") -> str:
    """Return a URL of an address, with a user and a secret of `SECRETS` as password."""
    scheme, _, rest = address.partition("://")
    return f"{scheme}://{user}:{quote(SECRETS[secret], safe='')}@{rest}"


class ProcessListReader(threading.Thread):
    """Collects the command lines of all processes that a command starts, but not its own."""

    def __init__(self, parent: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.parent, self.command_lines = parent, set()
        self.has_ended = threading.Event()

    def run(self) -> None:
        while not self.has_ended.wait(0.1):
            try:
                for process in self.parent.children(recursive=True):
                    self.command_lines.add(" ".join(process.cmdline()))
            except psutil.Error:
                continue


class Commands:
    """Runs commands in a folder that collects all that they write, and what they show."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.outputs = folder, []
        temporary = folder / "tmp"
        temporary.mkdir()
        self.environment = {
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "TMPDIR": str(temporary),
            "QTORCH_CACHE": str(folder / "cache"),
            "QTORCH_OUTBOX": str(folder / "outbox"),
            "QTORCH_TRACKING_TIMEOUT": "5",
            "QTORCH_TRACKING_PATIENCE": "5",
            "QTORCH_MY_TOKEN": SECRETS["variable"],
            "QTORCH_MIRROR": f"https://{SECRETS['token']}@mirror.example/data?a=b",
        }

    def run(self, *words: str, code: int = 0, is_forked: bool = True, **environment: str) -> str:
        """Run one command to its end and return its output; check its exit code.

        A forked command starts in no time, but its own process has the command line of the tests.
        """
        process: Any
        if is_forked:
            process = ForkedCommand(words, self.folder, {**self.environment, **environment}, False)
        else:
            process = subprocess.Popen(
                [sys.executable, "-m", "qtorch", *words],
                cwd=self.folder,
                env={**os.environ, **self.environment, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        reader = ProcessListReader(psutil.Process(process.pid))
        reader.start()
        try:
            output = "".join(process.communicate(timeout=180))
        finally:
            process.kill()
            reader.has_ended.set()
        assert process.returncode == code, output
        self.outputs += [output, *reader.command_lines]
        return output


@pytest.fixture
def server(tmp_path) -> Iterator[MlflowServer]:
    folder = tmp_path / "server"
    folder.mkdir()
    open_store(f"sqlite:///{folder}/server.db")
    mlflow_server = MlflowServer(folder)
    mlflow_server.start()
    yield mlflow_server
    mlflow_server.stop()


@pytest.fixture
def pool_url() -> Iterator[str]:
    """The URL of a pool on PostgreSQL, whose user has a password."""
    with postgres() as pg_server:
        yield secret_url("pool", pg_server.get_uri().replace("postgres:@", ""), "postgres").replace(
            "postgresql://", "postgresql+psycopg://"
        )


@pytest.fixture
def commands(tmp_path) -> Commands:
    """Commands in a git repository with a secret in a changed file and one in a configuration."""
    folder = tmp_path / "work"
    folder.mkdir()
    settings = folder / "settings.py"
    settings.write_text("password = None\n")
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@example.com"]
    subprocess.run([*git, "init", "-q"], cwd=folder, check=True)
    subprocess.run([*git, "add", "settings.py"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "-q", "-m", "settings"], cwd=folder, check=True)
    settings.write_text(f'password = "{SECRETS["diff"]}"\n')
    return Commands(folder)


def find_secrets(text: bytes) -> list[str]:
    return [name for name, needles in NEEDLES.items() if any(n in text for n in needles)]


def read_pool(url: str) -> str:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT * FROM qtorch_tasks")
        return "\n".join(map(str, rows))


def test_no_secret_is_written_or_shown(server, pool_url, commands, tmp_path):
    argument_uri = secret_url("argument", server.uri)
    config_file = tmp_path / "conf" / "tracking" / "mine.yaml"
    config_file.parent.mkdir(parents=True)
    config_file.write_text(json.dumps({"uri": secret_url("file", server.uri)}))  # also YAML
    environment_uri = secret_url("environment", server.uri)

    commands.run("train", *TINY, f"tracking.uri={argument_uri}")
    sweep = ["-m", *TINY, "seed=1,2", "sweep.name=two"]
    sweep += ["tracking=mine", "hydra/launcher=joblib", f"--config-dir={tmp_path / 'conf'}"]
    commands.run("train", *sweep, is_forked=False)
    commands.run("sweep", "resume", "two", "trusted=true", MLFLOW_TRACKING_URI=environment_uri)

    pool = ["pool=secret-pool", f"url={pool_url}"]
    remote = ["runner=rm", "wait=false", *pool, f"tracking.uri={argument_uri}", "seed=7"]
    commands.run("train", *TINY, *remote)
    worker_uri = secret_url("worker", server.uri, "worker")
    worker = ["worker", "max_tasks=1", "idle_timeout=5"]
    commands.run(*worker, *pool, is_forked=False, MLFLOW_TRACKING_URI=worker_uri)
    task_text = commands.run("tasks", "show", "1", *pool)
    assert "(done)" in task_text, task_text
    commands.run("tasks", "export", *pool, "out=tasks.json")

    dead_uri = secret_url("argument", "http://127.0.0.1:9")
    commands.run("train", *TINY, f"tracking.uri={dead_uri}", "--debug", code=1)
    dead_pool = secret_url("argument", "postgresql://127.0.0.1:9/x")
    commands.run("tasks", "stat", "pool=x", f"url={dead_pool}&password=x", "--debug", code=1)
    commands.run("train", "--cfg", "job", "tracking=server", MLFLOW_TRACKING_URI=environment_uri)

    assert not find_secrets(read_pool(pool_url).encode())
    for output in commands.outputs:
        assert not find_secrets(output.encode()), output
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p != config_file]
    assert len([p for p in files if p.name in ("overrides.yaml", "multirun.yaml", "job.json")]) > 5
    leaks = {
        str(p.relative_to(tmp_path)): names
        for p in files
        if p.name != "settings.py" and (names := find_secrets(p.read_bytes()))
    }
    assert not leaks
    (diff,) = {p.read_text() for p in files if p.name == "code_diff.txt"}
    assert '+password = "***"' in diff
    private_files = [
        p for p in files if p.parent.name == ".hydra" or p.name in ("multirun.yaml", "job.json")
    ]
    assert {oct(p.stat().st_mode & 0o777) for p in private_files} == {"0o600"}
