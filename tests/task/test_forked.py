"""Children of the fork server: what they inherit, what they leave, how they end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from qtorch.process.fork_server import ExitStatus, ForkError, ForkServerClient, call_fork_server

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow  # the imports of the fork server take seconds


@pytest.fixture(autouse=True)
def steps_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def test_child_inherits_the_environment_of_its_caller(fork_server, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORK_TEST", "mine")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    messages = []
    exit_status = fork_server.call("fork_steps.describe", {"a": 1}, messages.append)
    assert exit_status == ExitStatus(3)
    assert messages == [
        {
            "request": {"a": 1},
            "folder": str(tmp_path),
            "variable": "mine",
            "argv": sys.argv,
            "threads": 2,
            "group": True,
        }
    ]
    assert "printed by the child" in capfd.readouterr().out


def test_memory_of_a_child_does_not_affect_the_next_child(fork_server):
    messages = []
    for value in (1, 2):
        assert fork_server.call(
            "fork_steps.remember", {"value": value}, messages.append
        ) == ExitStatus(0)
    assert messages == [{"before": None}, {"before": None}]


def test_killed_child_is_reported_and_the_next_child_works(fork_server):
    messages = []
    exit_status = fork_server.call("fork_steps.die", {}, messages.append)
    assert exit_status.code == -signal.SIGKILL
    assert exit_status.description == "was killed by SIGKILL"
    assert messages == [{"run": "started"}]
    assert fork_server.call("fork_steps.remember", {"value": 0}).code == 0


def test_module_that_cannot_be_imported_is_ignored(monkeypatch, tmp_path):
    """Covers a missing and a failing module; and matplotlib ignores a notebook's backend."""
    (tmp_path / "failing_part.py").write_text("raise ValueError")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "module://of_a_notebook")
    server = ForkServerClient("no_such_part", "failing_part", "matplotlib")
    messages: list = []
    assert server.call("fork_steps.name_backend", {}, messages.append) == ExitStatus(0)
    assert messages == [{"backend": "agg"}]
    server.close()


def test_killing_a_child_does_not_affect_another_child(fork_server):
    calls = [fork_server.fork("fork_steps.wait_for_stop", {}) for _ in range(2)]
    messages = [call.receive(10.0) or call.receive(10.0) for call in calls]
    assert [m[0]["waiting"] for m in messages] == [call.pid for call in calls]
    fork_server.kill(calls[0])
    assert calls[0].exit_status == ExitStatus(-signal.SIGKILL)
    with pytest.raises(ProcessLookupError):
        os.kill(calls[0].pid, 0)
    assert calls[1].receive(0.0) == []
    os.kill(calls[1].pid, signal.SIGTERM)
    while calls[1].exit_status is None:
        calls[1].receive(10.0)
    assert calls[1].exit_status == ExitStatus(0)


def test_call_that_is_killed_before_its_start_never_starts(tmp_path):
    server = ForkServerClient("torch")  # the imports of the server take seconds
    call = server.fork("fork_steps.create_file", {"path": str(tmp_path / "first")})
    server.kill(call)
    assert server.call("fork_steps.create_file", {"path": str(tmp_path / "next")}) == ExitStatus(0)
    assert [p.name for p in tmp_path.iterdir()] == ["next"]
    server.close()


def test_error_of_the_function_is_reported_as_exit_code(fork_server, capfd):
    assert fork_server.call("fork_steps.no_such_function", {}).code == 1
    assert "no_such_function" in capfd.readouterr().err


def test_stop_reaches_every_child_once_and_no_call_starts_after_it():
    server = ForkServerClient("torch")
    messages: dict[int, list] = {0: [], 1: []}
    exit_statuses: dict[int, ExitStatus] = {}

    def call(k: int) -> None:
        exit_statuses[k] = call_fork_server(
            server.address, "fork_steps.wait_for_stop", {}, messages[k].append
        )

    threads = [threading.Thread(target=call, args=(k,)) for k in messages]
    for thread in threads:
        thread.start()
    while not all(messages.values()):
        threads[0].join(0.05)
    os.kill(messages[0][0]["waiting"], signal.SIGTERM)  # a scheduler signals every process too
    server.stop(signal.SIGTERM)
    server.stop(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert [m[1] for m in messages.values()] == [{"stops": 1, "thread": True}] * 2
    assert list(exit_statuses.values()) == [ExitStatus(0)] * 2
    assert server.call("fork_steps.describe", {}) == ExitStatus(None, is_refused=True)
    server.close()
    with pytest.raises(ForkError, match=r"sweep.isolate=false"):
        call_fork_server(server.address, "fork_steps.describe", {})
