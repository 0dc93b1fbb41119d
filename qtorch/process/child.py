"""Child processes: what parent and child say to each other, and how each notices the other's end.

A fork server (`qtorch.process.fork_server`) starts a child, which calls `function(request, parent)`
in a session of its own: Ctrl-C in a terminal reaches the parent alone, and the parent can kill the
child with all processes that it has started. The two exchange JSON messages through a connection of
`multiprocessing`. The protocol itself uses

- to the child: a first message with the call, `{"stop": signal}` with the signal that the parent
  received (0: none), and `{"alive": time}`; every other message is a request, see
  `Parent.next_request`;
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
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from qtorch.core.names import import_object
from qtorch.core.secrets import redact_urls
from qtorch.process.stops import (
    STOP_SIGNALS,
    StopRequest,
    StopSignals,
    ignore_stop_signals,
    interrupt_work,
    received_signals,
    send_stop_signal,
)

Message = dict[str, Any]

END_SECONDS = 5.0  # for a child to end after it was killed, or has no more work
WATCH_SECONDS = 0.2  # between two checks whether the parent is silent
STALL_SECONDS = 60.0  # without progress in the middle of a message, the other side counts as gone
UNREAD = -(2**63)  # in place of a process ID or an exit code that was not received yet


@dataclass(frozen=True)
class ExitStatus:
    """How a child ended.

    `code` is its exit code, or minus the number of the signal that killed it. Without a code,
    `reason` tells why there is none.
    """

    code: int | None
    reason: str = ""

    @classmethod
    def from_code(cls, code: int | None) -> ExitStatus:
        """Return the status of a child that has ended; without a code, nobody knows how."""
        return LOST_CHILD if code is None else cls(code)

    @property
    def is_refused(self) -> bool:
        """Whether the work was stopped before it began."""
        return self == REFUSED_CALL

    @property
    def description(self) -> str:
        """The end of a sentence, such as `was killed by SIGKILL` or `exited with code 1`."""
        if self.code is None:
            return self.reason
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        return f"exited with code {self.code}"


# The fork server was killed before it started the child, or before it sent the code.
LOST_CHILD = ExitStatus(None, "was lost together with the fork server")
# The work was stopped before it began, so that nothing has happened.
REFUSED_CALL = ExitStatus(None, "was stopped before it began")
# The parent has closed the connection without waiting for the child's end.
ABANDONED_CHILD = ExitStatus(None, "was left to end by itself")


class Child:
    """A child process as its parent sees it; `exit_status` is None until its end is received.

    There are four ways to end it:

    - `stop` asks a child to end its work in an orderly way, and returns at once;
    - `wait_or_kill` lets a child without work exit by itself, and kills it after END_SECONDS;
    - `kill` kills a child and all that it has started, and waits for its end;
    - `abandon` (also the end of a `with` block, or of this process) closes the connection without
      waiting: a child that works gets `orphan_seconds`, see `Parent`.

    `server_pid` is the process ID of the fork server that was asked to start the child.
    """

    def __init__(self, connection: Connection, status_pipe: int, server_pid: int) -> None:
        self.exit_status: ExitStatus | None = None
        self.server_pid = server_pid
        self._connection = connection
        self._status_pipe = status_pipe  # sends the process ID and the exit code; -1: closed
        self._pid_field, self._code_field = array("q", [UNREAD]), array("q", [UNREAD])
        self._exit_message: Message = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    @property
    def pid(self) -> int | None:
        """The process ID; None until the fork server has started the child."""
        return None if self._pid_field[0] == UNREAD else self._pid_field[0]

    def send(self, message: Mapping[str, Any]) -> bool:
        """Send a message; return False if the child is gone or has not read for STALL_SECONDS."""
        with self._lock:
            try:
                self._connection.send_bytes(_encode(message))
            except OSError:
                # Half of the message may be in the connection; nothing can follow it. What the
                # child has sent, perhaps just before its end, can still be read.
                _end_sending(self._connection)
                return False
        return True

    def stop(self) -> None:
        """Ask the child to stop its work in an orderly way."""
        self.send({"stop": received_signals[0] if received_signals else 0})

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
        sources += [] if self._status_pipe < 0 else [self._status_pipe]
        if self._status_pipe in wait(sources, timeout):
            self._read_status()
        messages = self._read_messages()  # all of them, if the child has ended
        code = None if self._code_field[0] == UNREAD else self._code_field[0]
        if code is not None or (self._status_pipe < 0 and self._connection.closed):
            if self._exit_message.get("is_refused"):
                self.exit_status = REFUSED_CALL
            else:
                message_code = self._exit_message.get("exit")
                self.exit_status = ExitStatus.from_code(message_code if code is None else code)
            if self.pid is not None:
                _kill_group(self.pid)  # processes that the child left running
        return messages

    def kill(self) -> None:
        """Kill the child and what it has started; a child that is not started yet never works."""
        self.receive(0.0)
        self._close_connection()
        if self.exit_status is None and self.pid is not None:
            _kill_group(self.pid)
            self._wait(END_SECONDS)
        self.abandon()

    def wait_or_kill(self) -> None:
        """Let a child without work exit by itself; kill it if it does not within END_SECONDS."""
        self._close_connection()
        self._wait(END_SECONDS)
        self.kill()

    def abandon(self) -> None:
        """Close the connection; a child that still works is stopped, with time for a checkpoint."""
        self._close_connection()
        if self._status_pipe >= 0:
            os.close(self._status_pipe)
            self._status_pipe = -1
        self.exit_status = self.exit_status or ABANDONED_CHILD

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.exit_status is None and (left := end - time.monotonic()) > 0:
            self.receive(left)

    def _read_status(self) -> None:
        """Read the process ID or the exit code, or notice that the fork server was killed."""
        is_pid = self.pid is None
        # A Ctrl-C right after this line loses nothing, because the number is in its field already.
        num_bytes = os.readv(self._status_pipe, [self._pid_field if is_pid else self._code_field])
        if is_pid and num_bytes:
            return
        os.close(self._status_pipe)
        self._status_pipe = -1
        if is_pid:  # the child was never started
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

    The child is idle until `begin_work`, and while it waits for a request: then it stays, however
    long the parent is silent, and needs no time to end.
    """

    def __init__(self, connection: Connection, call: Message) -> None:
        super().__init__()
        self._connection, self._call = connection, call
        self._requests: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._send_lock = threading.Lock()
        self._news = threading.Condition()  # for `begin_work`, when the following change
        self._last_alive: float = call["alive"]
        self._has_read_all = False
        self._is_idle = True
        self._is_gone = False

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message to the parent."""
        with self._send_lock, contextlib.suppress(OSError):  # the parent may be gone
            self._connection.send_bytes(_encode(message))

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

    def begin_work(self) -> bool:
        """Wait until the parent is known to be alive; return False if it is gone.

        The process may have been started long after it was requested, by a slow fork server. What
        has arrived meanwhile is read first: the parent may be gone, or may have sent pings until
        there was no room for more. Without a fresh ping the work does not begin, because the parent
        may have lost its lease.
        """
        with self._news:
            self._news.wait_for(
                lambda: self._is_gone or (self._has_read_all and not self._is_parent_silent())
            )
            if self._is_gone:
                return False
            self._is_idle = False
            return True

    def next_request(self) -> Message | None:
        """Wait for the parent's next request; return None when there are no more."""
        self.finish_work()
        request = self._requests.get()
        return request if request is not None and self.begin_work() else None

    def finish_work(self) -> None:
        """Be idle: nothing needs to be interrupted if the parent is gone."""
        self._is_idle = True

    def report_exit(self, code: int, *, is_refused: bool = False) -> int:
        """Report the end of this process and return its exit code."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        self.send({"exit": code, "is_refused": is_refused})
        if self._is_gone:
            os.killpg(0, signal.SIGKILL)  # nobody else would end what this process has started
        return code

    def _receive(self) -> None:
        try:
            while True:
                with self._news:
                    self._has_read_all = not self._connection.poll(0)
                    self._news.notify_all()
                message = json.loads(self._connection.recv_bytes())
                if "alive" in message:
                    self._last_alive = max(self._last_alive, message["alive"])
                elif "stop" in message:
                    self._stop(int(message["stop"]))
                else:
                    self._requests.put(message)
        except (EOFError, OSError):
            pass  # the parent has closed the connection, or its process has ended
        finally:
            self._end_as_orphan()

    def _watch(self) -> None:
        while self._is_idle or not self._is_parent_silent():
            time.sleep(WATCH_SECONDS)
        self._end_as_orphan()

    def _is_parent_silent(self) -> bool:
        timeout: float | None = self._call["silence_timeout"]
        return timeout is not None and time.monotonic() - self._last_alive > timeout

    def _stop(self, signal_of_parent: int = 0) -> None:
        self.stop_requested = True
        if self._call["is_interruptible"]:
            send_stop_signal(signal_of_parent)

    def _end_as_orphan(self) -> None:
        """End this process, because the parent is gone."""
        with self._news:
            is_idle, self._is_gone = self._is_idle, True
            self._news.notify_all()
        if is_idle:
            # The main thread exits by itself, which gives a user's exit functions a chance.
            self._requests.put(None)
            time.sleep(END_SECONDS)
        elif self._call["orphan_seconds"]:
            # A training may take that long to reach the end of a step and to write a checkpoint.
            self._stop()
            time.sleep(self._call["orphan_seconds"])
        # Otherwise, nothing that the work still does is wanted: another process may have begun it.
        # If the parent was only paused, this tells it that the work did not fail by itself.
        if self._send_lock.acquire(timeout=0.1):
            _send_if_writable(self._connection, {"interrupted": True})
        os.killpg(0, signal.SIGKILL)


def child_main(connection: Connection, outputs: Sequence[int]) -> int:
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
            function = import_object(call["function"])
            can_begin = parent.begin_work()
        except KeyboardInterrupt:
            can_begin = False
        if not can_begin:
            return parent.report_exit(0, is_refused=True)
        return parent.report_exit(int(function(call["request"], parent) or 0))
    except BaseException:
        sys.stderr.write(redact_urls(traceback.format_exc()))
        return parent.report_exit(1)


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


def _end_sending(connection: Connection) -> None:
    """Close the connection for sending only: the other side reads the end of it."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_WR)


def _encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, default=str).encode()


def _send_if_writable(connection: Connection, message: Mapping[str, Any]) -> None:
    """Send a short message only if that does not block."""
    with contextlib.suppress(OSError):
        poll = select.poll()
        poll.register(connection, select.POLLOUT)
        if poll.poll(0):
            connection.send_bytes(_encode(message))
