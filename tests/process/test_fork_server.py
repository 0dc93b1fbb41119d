"""Children of the fork server: what they inherit, what they leave, how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import qtorch.process.fork_server as fork_server_module
from qtorch.process.child import REFUSED_CALL, ExitStatus
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


def wait_for_messages(child, seconds=20.0):
    """Return the child's next messages, or none at its end."""
    end = time.monotonic() + seconds
    while child.exit_status is None and time.monotonic() < end:
        child.ping()
        messages = child.receive(0.1)
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


def test_imports_of_the_server_are_left_out_of_garbage_collections():
    server, messages = ForkServer("decimal"), []
    try:
        assert server.call("fork_steps.describe_memory", {}, messages.append).code == 0
    finally:
        server.close()
    (report,) = messages
    assert report["enabled"]
    assert not report["enabled below"]
    assert report["frozen"] > 1000


def test_error_of_the_function_is_reported_as_exit_code(server, capfd):
    assert server.call("fork_steps.no_such_function", {}).code == 1
    assert "no_such_function" in capfd.readouterr().err
    assert server.call("fork_steps.raise_error", {"text": "http://me:s3cret@host"}).code == 1
    assert "ValueError: http://me:***@host" in capfd.readouterr().err


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
    child.abandon()
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


@pytest.fixture
def slow_server(server):
    """A fork server that does not start children until SIGCONT, as while it imports modules."""
    server.ensure_running()
    os.kill(server._forkserver_pid, signal.SIGSTOP)
    return server


def test_child_of_a_slow_fork_server_waits_for_a_fresh_ping(slow_server):
    """Pings that did not fit into the connection meanwhile were dropped."""
    child = slow_server.start("fork_steps.wait_for_stop", {}, silence_timeout=0.5)
    for _ in range(200):
        child.ping()
    time.sleep(1.0)
    os.kill(child.server_pid, signal.SIGCONT)
    assert "waiting" in wait_for_messages(child)[0]
    child.kill()


def test_child_whose_parent_is_silent_since_its_request_does_not_begin(slow_server, tmp_path):
    path = tmp_path / "file"
    child = slow_server.start("fork_steps.create_file", {"path": str(path)}, silence_timeout=0.5)
    time.sleep(1.0)
    os.kill(child.server_pid, signal.SIGCONT)
    assert child.receive(1.0) == []
    assert (child.exit_status, path.exists()) == (None, False)
    child.ping()
    assert wait_for_end(child)[0] == ExitStatus(0)
    assert path.exists()


def test_message_that_does_not_fit_ends_the_connection(server, monkeypatch):
    """Nothing can be sent after half a message, and the child must not wait for the rest of it."""
    monkeypatch.setattr("qtorch.process.child.STALL_SECONDS", 1.0)
    child = server.start("fork_steps.wait_for_stop", {}, orphan_seconds=0.0)
    wait_for_messages(child)
    os.kill(child.pid, signal.SIGSTOP)
    assert not child.send({"text": "x" * 10_000_000})
    os.kill(child.pid, signal.SIGCONT)
    assert not child.send({"text": "x"})
    assert wait_for_end(child)[0] == ExitStatus(-signal.SIGKILL)


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
    assert refused == REFUSED_CALL
    lock.close()


def test_server_that_cannot_start_processes(server, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    monkeypatch.setattr("multiprocessing.spawn._python_exe", b"/no/such/python")
    end = time.monotonic() + 60
    with pytest.raises(ForkError, match=r"sweep.isolate=false"):
        while time.monotonic() < end:  # a call before the server has ended is a lost child
            assert server.call("fork_steps.die", {}).code is None
            time.sleep(0.2)


def test_other_threads_close_the_server_only_between_requests(server, monkeypatch):
    ensure_running = ForkServer.ensure_running

    def ensure_slowly(self):
        ensure_running(self)
        thread = threading.Thread(target=self.close)
        thread.start()
        thread.join(0.3)

    monkeypatch.setattr(ForkServer, "ensure_running", ensure_slowly)
    server.call("fork_steps.create_file", {"path": os.devnull})


def test_server_that_was_replaced_is_not_closed_again(server):
    call = ("fork_steps.create_file", {"path": os.devnull})
    first = server.start(*call)
    wait_for_end(first)
    server.close(first.server_pid)
    second = server.start(*call)
    server.close(first.server_pid)
    assert wait_for_end(second)[0] == ExitStatus(0)
    assert second.server_pid == server._forkserver_pid != first.server_pid


def test_child_does_not_get_the_environment_of_a_starting_server(server, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "mine")
    is_changed = threading.Event()

    def start_server():
        with fork_server_module._lock, fork_server_module._server_environment():
            is_changed.set()
            time.sleep(0.3)

    thread = threading.Thread(target=start_server)
    thread.start()
    is_changed.wait()
    messages = []
    assert (
        server.call("fork_steps.report_variable", {"name": "MPLBACKEND"}, messages.append).code == 0
    )
    thread.join()
    assert messages == [{"value": "mine"}]


@contextmanager
def send_interrupts(*delays):
    """Interrupt the main thread after these seconds, as Ctrl-C does."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    timers = [threading.Timer(d, os.kill, (os.getpid(), signal.SIGINT)) for d in delays]
    for timer in timers:
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.join()
        signal.signal(signal.SIGINT, previous)


def test_interruption_loses_no_message(server, tmp_path):
    """Not even if it arrives while an earlier message is handled."""
    sent_file = tmp_path / "sent"
    messages, begin_event, interrupt_event = [], threading.Event(), threading.Event()

    def handle(message):
        begin_event.set()
        assert interrupt_event.wait(60)
        messages.append(message)

    def interrupt():
        begin_event.wait()
        while not sent_file.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        interrupt_event.set()

    thread = threading.Thread(target=interrupt)
    with send_interrupts(), pytest.raises(KeyboardInterrupt):
        thread.start()
        server.call("fork_steps.send_many", {"count": 5, "sent": str(sent_file)}, handle)
    assert [m["number"] for m in messages] == [0, 1, 2, 3, 4]


def test_second_ctrl_c_kills_the_child_of_a_call(server):
    messages = []
    begin = time.monotonic()
    with send_interrupts(1.0, 2.0), pytest.raises(KeyboardInterrupt):
        server.call("fork_steps.ignore_stops", {}, messages.append)
    assert time.monotonic() - begin < 8
    assert not is_alive(messages[0]["pid"])
