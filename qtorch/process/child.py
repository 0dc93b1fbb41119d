"""Child processes: what parent and child say to each other, and how each notices the other's end.

A fork server (`qtorch.process.fork_server`) starts a child, which calls `function(request, parent)`
in a session of its own: Ctrl-C in a terminal reaches the parent alone, and the parent can kill the
child with all processes that it has started. The two exchange JSON messages through a connection of
`multiprocessing`. The protocol itself uses

- to the child: a first message with the call, `{"stop": true}`, and `{"alive": time}`; every other
  message is a request, see `Parent.next_request`;
- to the parent: `{"exit": code}` at the end, and `{"interrupted": true}` from a child that ends
  itself because the parent was silent.

All other messages belong to the callers. The end of the connection means that the other side is
gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from qtorch.core.names import locate
from qtorch.process.stops import (
    STOP_SIGNALS,
    StopRequest,
    StopSignals,
    ignore_stop_signals,
    interrupt_work,
    send_stop_signal,
)

Message = dict[str, Any]

END_SECONDS = 5.0  # for a child to end after it was killed, or has no more work
STALL_SECONDS = 60.0  # without progress in the middle of a message, the other side counts as gone
STATUS = struct.Struct("q")  # as multiprocessing's fork server sends process IDs and exit codes


@dataclass(frozen=True)
class ExitStatus:
    """How a child ended: its exit code, or minus the number of the signal that killed it.

    `code` is None if the fork server was killed and the child sent no code, or was never started.
    `is_refused`: the work was not started, because it was stopped before.
    """

    code: int | None
    is_refused: bool = False

    @property
    def description(self) -> str:
        """The end of a sentence, such as `was killed by SIGKILL` or `exited with code 1`."""
        if self.is_refused:
            return "was not started"
        if self.code is None:
            return "was lost together with the fork server"
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        return f"exited with code {self.code}"


class Child:
    """A child process as its parent sees it.

    `pid` is None until the child is started, `exit_status` until its end has been received.
    Closing it (also by the end of this process) stops the child, see `Parent`.
    """

    def __init__(self, connection: Connection, status: int) -> None:
        self.pid: int | None = None
        self.exit_status: ExitStatus | None = None
        self._connection = connection
        self._status = status  # pipe with the process ID and the exit code; -1: closed
        self._code: int | None = None
        self._exit_message: Message = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, message: Mapping[str, Any]) -> bool:
        """Send a message; return False if the child is gone or has not read for STALL_SECONDS."""
        with self._lock, contextlib.suppress(OSError):
            self._connection.send_bytes(_encode(message))
            return True
        return False

    def stop(self) -> None:
        """Ask the child to stop its work in an orderly way."""
        self.send({"stop": True})

    def ping(self) -> None:
        """Tell the child that this process is alive, without ever waiting for the child."""
        if self._lock.acquire(blocking=False):
            try:
                _send_if_writable(self._connection, {"alive": time.monotonic()})
            finally:
                self._lock.release()

    def receive(self, timeout: float | None = None) -> list[Message]:
        """Return the child's new messages; wait up to `timeout` seconds for one (None: forever).

        Sets `exit_status` when the child has ended.
        """
        if self.exit_status is not None:
            return []
        sources: list[Any] = [] if self._connection.closed else [self._connection]
        sources += [] if self._status < 0 else [self._status]
        if self._status in wait(sources, timeout):
            self._read_status()
        messages = self._read_messages()  # all of them, if the child has ended
        if self._code is not None or (self._status < 0 and self._connection.closed):
            code = self._exit_message.get("exit") if self._code is None else self._code
            self.exit_status = ExitStatus(code, self._exit_message.get("is_refused", False))
            if self.pid is not None:
                _kill_group(self.pid)  # processes that the child left running
        return messages

    def kill(self) -> None:
        """Kill the child and what it has started; a child that has not started yet never does."""
        self.receive(0.0)
        self._close_connection()
        if self.exit_status is None and self.pid is not None:
            _kill_group(self.pid)
            self._wait(END_SECONDS)
        self.close()

    def finish(self) -> None:
        """Let a child without work exit by itself; kill it if it does not within END_SECONDS."""
        self._close_connection()
        self._wait(END_SECONDS)
        self.kill()

    def close(self) -> None:
        """Close the connection; a child that still works is stopped, with time for a checkpoint."""
        self._close_connection()
        if self._status >= 0:
            os.close(self._status)
            self._status = -1
        self.exit_status = self.exit_status or ExitStatus(None)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.exit_status is None and (left := end - time.monotonic()) > 0:
            self.receive(left)

    def _read_status(self) -> None:
        """Read the process ID or the exit code, or notice that the fork server was killed."""
        data = os.read(self._status, STATUS.size)
        if data and self.pid is None:
            (self.pid,) = STATUS.unpack(data)
            return
        os.close(self._status)
        self._status = -1
        if data:
            (self._code,) = STATUS.unpack(data)
        elif self.pid is None:  # the child was never started
            self._close_connection()

    def _read_messages(self) -> list[Message]:
        messages = []
        try:
            while not self._connection.closed and self._connection.poll(0):
                message = json.loads(self._connection.recv_bytes())
                if "exit" in message:
                    self._exit_message = message
                else:
                    messages.append(message)
        except (EOFError, OSError):
            self._close_connection()
        return messages

    def _close_connection(self) -> None:
        with self._lock:  # another thread may be sending
            self._connection.close()


def _kill_group(pid: int) -> None:
    """Kill a process and the processes of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


class Parent(StopRequest):
    """The parent process as its child sees it: the second argument of the child's function.

    `call` is the first message of the parent, with the keys

    - is_interruptible: whether a stop request interrupts the main thread. Otherwise the function
      looks at `stop_requested`, and signals are ignored: the parent gets them too.
    - orphan_seconds: time to end, for example to write a checkpoint, after the parent is gone.
    - silence_timeout: seconds without a ping after which the parent counts as gone, while the child
      works (or None). Pings carry the time of the machine's monotonic clock, because they may have
      waited.

    `is_idle`: the child waits for a request, so nothing needs to be interrupted.
    """

    def __init__(self, connection: Connection, call: Message) -> None:
        super().__init__()
        self._connection, self._call = connection, call
        self._requests: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._last_alive: float = call["alive"]
        self.is_idle = False
        self._is_gone = False

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message to the parent."""
        with self._lock, contextlib.suppress(OSError):  # the parent may be gone
            self._connection.send_bytes(_encode(message))

    def next_request(self) -> Message | None:
        """Wait for the parent's next request; return None when there are no more."""
        self.is_idle = True
        request = self._requests.get()
        self.is_idle = False
        return None if self._is_gone else request

    def listen(self) -> None:
        """Start to receive messages and signals."""
        if self._call["is_interruptible"]:
            StopSignals(interrupt_work, ignores_interrupts=True).install()
        else:
            ignore_stop_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by the fork server
        threading.Thread(target=self._receive, daemon=True, name="parent").start()
        if self._call["silence_timeout"] is not None:
            threading.Thread(target=self._watch, daemon=True, name="watch-parent").start()

    def finish(self, code: int, *, is_refused: bool = False) -> int:
        """Report the end of this process and return its exit code."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        self.send({"exit": code, "is_refused": is_refused})
        if self._is_gone:
            os.killpg(0, signal.SIGKILL)  # nobody else would end what this process has started
        return code

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = json.loads(self._connection.recv_bytes())
                if "alive" in message:
                    self._last_alive = max(self._last_alive, message["alive"])
                elif "stop" in message:
                    self._stop()
                else:
                    self._requests.put(message)
        self._end()

    def _watch(self) -> None:
        timeout: float = self._call["silence_timeout"]
        while self.is_idle or time.monotonic() - self._last_alive <= timeout:
            time.sleep(0.2)
        self._end()

    def _stop(self) -> None:
        self.stop_requested = True
        if self._call["is_interruptible"]:
            send_stop_signal()

    def _end(self) -> None:
        """End this process, because the parent is gone."""
        self._is_gone = True
        self._requests.put(None)
        if self.is_idle:
            time.sleep(END_SECONDS)
        elif self._call["orphan_seconds"]:
            self._stop()
            time.sleep(self._call["orphan_seconds"])
        # If the parent was only paused, this tells it that the work did not fail by itself.
        if self._lock.acquire(timeout=0.1):
            _send_if_writable(self._connection, {"interrupted": True})
        os.killpg(0, signal.SIGKILL)


def run_child(connection: Connection, outputs: Sequence[int]) -> int:
    """Make the parent's call in this new process, and return the exit code.

    The process has the working folder, `sys.path` and `sys.argv` of its parent. It gets the call's
    environment, number of threads, and descriptors for standard output and error.
    """
    os.setsid()
    for standard, stream, output in zip((1, 2), (sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(output, standard)
        os.close(output)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty())
    try:
        call = json.loads(connection.recv_bytes())
    except EOFError:  # the parent has changed its mind
        return 0
    parent = Parent(connection, call)
    try:
        try:
            parent.listen()
            os.environ.clear()
            os.environ.update(call["environment"])
            _set_threads()
            function = locate(call["function"])
        except KeyboardInterrupt:
            return parent.finish(0, is_refused=True)
        return parent.finish(int(function(call["request"], parent) or 0))
    except BaseException:
        traceback.print_exc()
        return parent.finish(1)


def _set_threads() -> None:
    """Apply OMP_NUM_THREADS, which torch read when the fork server imported it."""
    num_threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    torch = sys.modules.get("torch")
    if torch is not None and num_threads.isdigit() and int(num_threads):
        torch.set_num_threads(int(num_threads))


def connect() -> tuple[Connection, Connection]:
    """Return the two ends of a connection: of a parent, which never waits forever, and a child."""
    parent, child = socket.socketpair()
    limit = struct.pack("ll", int(STALL_SECONDS), 0)
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        parent.setsockopt(socket.SOL_SOCKET, option, limit)
    return Connection(parent.detach()), Connection(child.detach())


def _encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, default=str).encode()


def _send_if_writable(connection: Connection, message: Mapping[str, Any]) -> None:
    """Send a short message only if that does not block."""
    with contextlib.suppress(OSError):
        poll = select.poll()
        poll.register(connection, select.POLLOUT)
        if poll.poll(0):
            connection.send_bytes(_encode(message))
