"""The ranks that other processes of torchrun or srun start: messages, errors, environment."""

from __future__ import annotations

import os
import pickle
from dataclasses import fields

import pytest
from torch.distributed import HashStore

from qtorch.core.errors import ConfigError
from qtorch.core.session import Session
from qtorch.model.devices import launcher, ranks
from qtorch.model.devices.launcher import WORLD_VARIABLE, RemoteRank, host_ranks
from qtorch.model.devices.rank_process import rank_threads
from qtorch.model.devices.rank_training import REQUEST, RankRequest, read_request
from qtorch.process.child import ExitStatus
from qtorch.process.fork_server import ForkError
from qtorch.process.launch import SRUN, World

WORLD = World(SRUN, rank=1, size=2, local_rank=1, num_local=2, address="127.0.0.1", port=20000)


class FakeRank:
    """A rank that sends two messages and ends."""

    def __init__(self) -> None:
        self.exit_status: ExitStatus | None = None

    def receive(self, timeout: float | None = None) -> list[dict[str, int]]:
        self.exit_status = ExitStatus(0)
        return [{"beat": 1}, {"done": 2}]

    def kill(self) -> None:
        pass


@pytest.fixture
def store() -> HashStore:
    """A store with the request of one fit."""
    store = HashStore()
    store.set("fit/0", '{"folder": "folder", "digest": "d", "is_single_node": true}')
    return store


def test_messages_of_a_remote_rank_are_deleted_once_they_are_read(store, monkeypatch) -> None:
    monkeypatch.setattr(launcher, "start_rank", lambda *_, **__: FakeRank())
    num_keys = store.num_keys()
    launcher._run_rank(store, WORLD, 0, launcher._RankZeroMonitor(store))
    rank = RemoteRank(store, 0, 1)
    assert rank.receive() == [{"beat": 1}, {"done": 2}]
    assert rank.exit_status == ExitStatus(0)
    assert store.num_keys() == num_keys


def test_rank_that_cannot_be_started_is_reported_to_rank_zero(store, monkeypatch) -> None:
    def fail(*arguments, **options):
        raise ForkError("the fork server cannot start a process: no memory.")

    monkeypatch.setattr(launcher, "start_rank", fail)
    launcher._run_rank(store, WORLD, 0, launcher._RankZeroMonitor(store))
    rank = RemoteRank(store, 0, 1)
    (message,) = rank.receive()
    assert message["error"]["message"] == "the fork server cannot start a process: no memory."
    assert rank.exit_status == ExitStatus(1)


def test_world_of_an_outer_command_is_restored(monkeypatch) -> None:
    monkeypatch.setattr(launcher, "_connect_store", lambda world, *, host: HashStore())
    monkeypatch.setattr(launcher, "EXIT_SECONDS", 0.1)
    monkeypatch.setenv(WORLD_VARIABLE, "outer")
    with host_ranks(WORLD):
        assert os.environ[WORLD_VARIABLE] != "outer"
    assert os.environ[WORLD_VARIABLE] == "outer"


@pytest.mark.parametrize(
    ("variable", "is_launched", "threads"),
    [(None, False, 4), (None, True, 4), ("8", False, 4), ("8", True, 8)],
)
def test_threads_are_divided_once(monkeypatch, variable, is_launched, threads) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert rank_threads(2, is_launched=is_launched) == threads


def test_request_to_the_ranks_is_private_and_no_other_is_read(tmp_path) -> None:
    values = dict.fromkeys(field.name for field in fields(RankRequest))
    request = RankRequest(**{**values, "session": Session()})
    with ranks._rank_folder(tmp_path) as folder:
        digest = request.write(folder, [], is_single_node=True)
        modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, folder / REQUEST)}
        assert modes == {folder.name: 0o700, REQUEST: 0o600}
        (folder / REQUEST).write_bytes(pickle.dumps(([], b"of somebody else")))
        with pytest.raises(ConfigError, match="is not the request that this rank was started with"):
            read_request(folder, digest)
    assert list(tmp_path.iterdir()) == []
