"""Task stores for the tests: a SQLite file, a PostgreSQL server, a MongoDB server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from local_servers import postgres
from pool_workers import STARTED, kill

from qtorch.task import TaskManager

# A server's URL comes from the fixture NAME_url. The servers are slow: tests on them take half a
# minute, and starting them longer.
STORES = (
    "sqlite",
    pytest.param("postgres", marks=pytest.mark.slow),
    pytest.param("mongo", marks=pytest.mark.slow),
)
MONGO_VARIABLE, POSTGRES_VARIABLE = "QTORCH_TEST_MONGO", "QTORCH_TEST_POSTGRES"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of a PostgreSQL server: of the environment variable, else of a new server."""
    if os.environ.get(POSTGRES_VARIABLE):
        yield os.environ[POSTGRES_VARIABLE]
        return
    with postgres() as server:
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")


@pytest.fixture(scope="session")
def mongo_url() -> Iterator[str]:
    """The URL of a MongoDB server: of the environment variable, else of a new SecantusDB server."""
    if os.environ.get(MONGO_VARIABLE):
        yield os.environ[MONGO_VARIABLE]
        return
    pymongo = pytest.importorskip("pymongo", reason="a pool on MongoDB needs pymongo")
    program = Path(sys.executable).with_name("secantusd-py")
    executable = str(program) if program.exists() else shutil.which("secantusd-py")
    if executable is None:
        pytest.skip(f"no MongoDB: {MONGO_VARIABLE} is not set and SecantusDB is not installed")
    port = free_port()
    server = subprocess.Popen(
        [executable, "--port", str(port), "--storage-path", ":memory:", "--standalone"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"mongodb://127.0.0.1:{port}/qtorch_test"
    client = pymongo.MongoClient(url, serverSelectionTimeoutMS=20000)
    client.admin.command("ping")
    client.close()
    yield url
    server.terminate()
    server.wait(20)


@pytest.fixture(autouse=True)
def kill_started_processes() -> Iterator[None]:
    """Kill the processes that a test has started, also if it fails."""
    yield
    while STARTED:
        kill(STARTED.pop())


@pytest.fixture(params=STORES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of each kind of store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'pool' / 'tasks.db'}"
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def pool_name() -> str:
    """A pool name that no other test uses."""
    return f"pool-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def make_manager(url: str, pool_name: str) -> Iterator[Callable[..., TaskManager]]:
    """A function that creates managers of the test's pool; they are closed after the test."""
    managers: list[TaskManager] = []

    def make(pool: str = pool_name, **options: float) -> TaskManager:
        managers.append(TaskManager(pool, url, **{"patience": 20.0, **options}))
        return managers[-1]

    yield make
    for manager in managers:
        manager.remove()  # the servers are shared, and get slower with more tasks
        manager.close()


@pytest.fixture
def manager(make_manager: Callable[..., TaskManager]) -> TaskManager:
    """A manager of an empty pool."""
    return make_manager()
