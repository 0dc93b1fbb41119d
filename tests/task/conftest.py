"""Stores for the pool's tests: a file, a PostgreSQL server, a MongoDB server over its wire."""

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
from pool_workers import STARTED, end, postgres

from qtorch.task import TaskManager

STORES = (  # the servers take half a minute of a run, and more to start
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
    """A PostgreSQL server of the session: the one that the environment names, else one of ours."""
    if os.environ.get(POSTGRES_VARIABLE):
        yield os.environ[POSTGRES_VARIABLE]
        return
    with postgres() as server:
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")


@pytest.fixture(scope="session")
def mongo_url() -> Iterator[str]:
    """A MongoDB server of the session: the one that the environment names, else SecantusDB."""
    if os.environ.get(MONGO_VARIABLE):
        yield os.environ[MONGO_VARIABLE]
        return
    pymongo = pytest.importorskip("pymongo", reason="a pool on MongoDB needs pymongo")
    program = Path(sys.executable).with_name("secantusd-py")
    found = str(program) if program.exists() else shutil.which("secantusd-py")
    if found is None:
        pytest.skip(f"no MongoDB: {MONGO_VARIABLE} names none and SecantusDB is not installed")
    port = free_port()
    server = subprocess.Popen(
        [found, "--port", str(port), "--storage-path", ":memory:", "--standalone"],
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
def no_process_is_left() -> Iterator[None]:
    """What a test has started ends with it, however that ends."""
    yield
    while STARTED:
        end(STARTED.pop())


@pytest.fixture(params=STORES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of each store in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'pool' / 'tasks.db'}"
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def pool_name() -> str:
    """A pool that no other test uses."""
    return f"pool-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def make_manager(url: str, pool_name: str) -> Iterator[Callable[..., TaskManager]]:
    """Managers of the test's pool, closed at its end; each with connections of its own."""
    made: list[TaskManager] = []

    def make(pool: str = pool_name, **options: float) -> TaskManager:
        made.append(TaskManager(pool, url, **{"patience": 20.0, **options}))
        return made[-1]

    yield make
    for manager in made:
        manager.remove()  # servers are shared, and slower the more they hold
        manager.close()


@pytest.fixture
def manager(make_manager: Callable[..., TaskManager]) -> TaskManager:
    """A manager of an empty pool."""
    return make_manager()
