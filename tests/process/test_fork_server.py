"""Children of the fork server: what they inherit, what they leave, how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from qtorch.process.child import ExitStatus
from qtorch.process.fork_server import ForkError, ForkServer
from qtorch.process.stops import CommandLock, is_command_stopped

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow  # the imports of the fork server take seconds


@pytest.fixture(autouse=True)
def steps_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def server():
    """A fork server without imports, which starts at once."""
    server = ForkServer()
    yield server
    server.close()


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_messages(child):
    """Return the child's next messages."""
    while child.exit_status is None:
        messages = child.receive(10.0)
        if messages:
            return messages
    return []


def wait_for_end(child):
    """Return the child's exit status and all messages until then."""
    messages = []
    while child.exit_status is None:
        messages += child.receive(10.0)
    return child.exit_status, messages


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


def test_killed_child_is_reported_and_the_next_child_works(server):
    messages = []
    exit_status = server.call("fork_steps.die", {}, messages.append)
    assert exit_status.code == -signal.SIGKILL
    assert exit_status.description == "was killed by SIGKILL"
    assert messages == [{"run": "started"}]
    assert server.call("fork_steps.create_file", {"path": os.devnull}).code == 0


def test_module_that_cannot_be_imported_is_ignored(monkeypatch, tmp_path):
    import qtorch.trainer.preload as preload

    (tmp_path / "failing_part.py").write_text("raise ValueError")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(preload, "MODULES", ("no_such_part", "failing_part", "json"))
    preload.import_modules()


def test_backend_of_a_notebook_is_not_imported(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://of_a_notebook")
    server, messages = ForkServer("matplotlib"), []
    assert server.call("fork_steps.name_backend", {}, messages.append) == ExitStatus(0)
    assert messages == [{"backend": "agg"}]
    server.close()


def test_script_without_a_main_guard(tmp_path):
    """The child does not run the caller's script again."""
    script = tmp_path / "script.py"
    script.write_text(
        "from qtorch.process.fork_server import fork_server\n"
        "print('started', flush=True)\n"
        "print(fork_server().call('fork_steps.die', {}).description)\n"
    )
    process = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == "started\nwas killed by SIGKILL\n"


def test_killing_a_child_does_not_affect_another_child(server):
    children = [server.start("fork_steps.wait_for_stop", {}) for _ in range(2)]
    messages = [wait_for_messages(child) for child in children]
    assert [m[0]["waiting"] for m in messages] == [child.pid for child in children]
    children[0].kill()
    assert children[0].exit_status == ExitStatus(-signal.SIGKILL)
    with pytest.raises(ProcessLookupError):
        os.kill(children[0].pid, 0)
    assert children[1].receive(0.0) == []
    os.kill(children[1].pid, signal.SIGTERM)
    assert wait_for_end(children[1])[0] == ExitStatus(0)


def test_child_that_is_killed_before_its_start_never_starts(tmp_path):
    server = ForkServer("torch")  # the imports of the server take seconds
    child = server.start("fork_steps.create_file", {"path": str(tmp_path / "first")})
    child.kill()
    assert server.call("fork_steps.create_file", {"path": str(tmp_path / "next")}) == ExitStatus(0)
    assert [p.name for p in tmp_path.iterdir()] == ["next"]
    server.close()


def test_error_of_the_function_is_reported_as_exit_code(server, capfd):
    assert server.call("fork_steps.no_such_function", {}).code == 1
    assert "no_such_function" in capfd.readouterr().err


def test_child_is_stopped_once_however_many_signals_arrive(server):
    child = server.start("fork_steps.wait_for_stop", {})
    wait_for_messages(child)
    os.kill(child.pid, signal.SIGTERM)  # a scheduler signals every process too
    child.stop()
    child.stop()
    assert wait_for_end(child) == (ExitStatus(0), [{"stops": 1, "thread": True}])


def test_child_continues_without_its_server_and_the_next_child_gets_a_new_one(server):
    child = server.start("fork_steps.wait_for_stop", {})
    wait_for_messages(child)
    server_id = server._forkserver_pid
    os.kill(server_id, signal.SIGKILL)
    assert child.receive(0.5) == []
    assert child.exit_status is None
    assert server.call("fork_steps.die", {}).code == -signal.SIGKILL
    assert server._forkserver_pid != server_id
    child.stop()
    assert wait_for_end(child) == (ExitStatus(0), [{"stops": 1, "thread": True}])


def test_child_of_a_closed_connection_ends_with_all_its_processes(server, tmp_path):
    child = server.start(
        "fork_steps.start_sleep", {"path": str(tmp_path / "pid")}, orphan_seconds=0.0
    )
    wait_for_messages(child)
    pid = int((tmp_path / "pid").read_text())
    child.close()
    end = time.monotonic() + 5.0
    while is_alive(pid):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_silence_of_the_parent_ends_the_child(server):
    child = server.start("fork_steps.wait_for_stop", {}, orphan_seconds=0.0, silence_timeout=1.0)
    wait_for_messages(child)
    for _ in range(6):
        child.ping()
        assert child.receive(0.25) == []
    assert child.exit_status is None
    assert wait_for_end(child) == (ExitStatus(-signal.SIGKILL), [{"interrupted": True}])


def test_stopped_child_does_not_block_the_parent(server):
    child = server.start("fork_steps.wait_for_stop", {})
    wait_for_messages(child)
    os.kill(child.pid, signal.SIGSTOP)
    begin = time.monotonic()
    for _ in range(3000):
        child.ping()
    child.kill()
    assert time.monotonic() - begin < 5
    assert child.exit_status == ExitStatus(-signal.SIGKILL)


def test_command_lock_stops_the_jobs_of_other_processes(server):
    lock = CommandLock()
    call = ("fork_steps.wait_for_stop", {})
    messages: list = []
    threading.Timer(1.0, lock.release).start()
    exit_status = server.call(
        *call, messages.append, is_stopped=lambda: is_command_stopped(lock.path)
    )
    assert exit_status == ExitStatus(0)
    assert messages[1:] == [{"stops": 1, "thread": True}]
    refused = server.call(*call, is_stopped=lambda: is_command_stopped(lock.path))
    assert refused == ExitStatus(None, is_refused=True)
    lock.close()


def test_server_that_cannot_start_processes(server, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    monkeypatch.setattr("multiprocessing.spawn._python_exe", b"/no/such/python")
    with pytest.raises(ForkError, match=r"sweep.isolate=false"):
        for _ in range(3):
            assert server.call("fork_steps.die", {}).code is None
            time.sleep(0.2)
