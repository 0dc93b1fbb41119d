"""A process with its imports done, which forks one child for each piece of work.

Started as `python -m qtorch.task.zygote SOCKET ORDERS MODULE ...`: the path of a socket in a
private folder, a file descriptor on which the owner gives orders (`qtorch.task.forked`), what to
import. For trainings torch, Lightning and MLflow are imported once, before any CUDA context
exists; a child shares their memory and begins its work at once. What it did to memory, host or
GPU, goes when it ends.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import select
import selectors
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtorch.core.names import locate
from qtorch.core.stops import NOTICES, Stops

log = logging.getLogger(__name__)

FORK = "fork"  # the key of what is said of a child, beside what it says itself
GRACE_SECONDS = 60.0  # for a checkpoint, once nobody waits for the result any more
MOST_DESCRIPTORS = 8  # that a request brings along
ABANDONED = 97  # the exit code of a zygote whose owner went away before it was ready


@dataclass
class Child:
    """One forked process: the connection to who waits for it, the pipe for its orders."""

    connection: socket.socket
    orders: int


class Zygote:
    """Accepts requests, forks, reports how each child ended.

    Orders are lines. The number of a signal is for every child there is; no work is begun after
    it. The id of a process behind it: for that child alone, which is killed by SIGKILL only this
    way (who asked for it cannot know whether the id is still that child's). Where the orders end
    the owner is gone: children are stopped in order, or at once if they had been told to stop
    before.
    """

    def __init__(self, listener: socket.socket, orders: int) -> None:
        self._listener, self._orders = listener, orders
        self._children: dict[int, Child] = {}
        self._told = b""
        self._stopped = False
        self._deadline: float | None = None
        self._wake, wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner's to decide
        for number in NOTICES:
            signal.signal(number, lambda number, frame: self._stop(number))

    def serve(self) -> int:
        """Until the owner is gone and no child is left."""
        with selectors.DefaultSelector() as selector:
            for source in (self._listener, self._orders, self._wake):
                selector.register(source, selectors.EVENT_READ)
            while self._children or self._orders >= 0:
                ready = [key.fileobj for key, _ in selector.select(1.0)]
                if self._wake in ready:
                    os.read(self._wake, 4096)
                self._reap()
                if self._orders in ready and not self._obey():
                    selector.unregister(self._orders)
                    self._orders = -1
                if self._listener in ready:
                    self._accept()
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._order(signal.SIGKILL)
        return 0

    def _accept(self) -> None:
        """A request; without resources it has to wait, or fails alone."""
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            log.error("no request can be taken: %s", error)
            time.sleep(0.1)
            return
        try:
            self._fork(connection)
        except OSError as error:
            log.error("no process can be begun: %s", error)
            say(connection, {FORK: {"ended": 1}})
            connection.close()

    def is_orphaned(self) -> bool:
        """Whether the owner is gone before anything was asked."""
        ready = select.select([self._orders], [], [], 0)[0]
        return bool(ready) and not self._obey()

    def _obey(self) -> bool:
        """Carry out what was ordered; False at the end of the orders."""
        data = os.read(self._orders, 4096)
        if not data:
            self._order(signal.SIGKILL if self._stopped else signal.SIGTERM)
            self._stopped, self._deadline = True, time.monotonic() + GRACE_SECONDS
            return False
        *lines, self._told = (self._told + data).split(b"\n")
        for line in lines:
            number, *pids = map(int, line.split())
            if pids:
                self._order(number, pids)
            else:
                self._stop(number)
        return True

    def _stop(self, number: int) -> None:
        self._stopped = True
        self._order(number)

    def _order(self, number: int, pids: Iterable[int] | None = None) -> None:
        for pid in self._children if pids is None else self._children.keys() & set(pids):
            if number == signal.SIGKILL:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, number)
                continue
            with contextlib.suppress(OSError):
                os.write(self._children[pid].orders, f"{number}\n".encode())

    def _reap(self) -> None:
        for pid in list(self._children):
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                continue
            child = self._children.pop(pid)
            with contextlib.suppress(ProcessLookupError):  # what it started and did not end
                os.killpg(pid, signal.SIGKILL)
            say(child.connection, {FORK: {"ended": os.waitstatus_to_exitcode(status)}})
            child.connection.close()
            os.close(child.orders)

    def _fork(self, connection: socket.socket) -> None:
        if self._stopped or _is_gone(connection):
            say(connection, {FORK: {"refused": True}})
            connection.close()
            return
        theirs, ours = os.pipe()
        try:
            pid = os.fork()
        except OSError:
            os.close(theirs)
            os.close(ours)
            raise
        if pid:
            os.close(theirs)
            self._children[pid] = Child(connection, ours)
            return
        code = 1
        try:
            os.setsid()  # a terminal's Ctrl-C is for the owner alone; and one group to end
            os.close(ours)
            self._forget()
            code = _work(connection, theirs)
        except BaseException:
            traceback.print_exc()
        finally:
            _flush()
            os._exit(code)

    def _forget(self) -> None:
        """In the child: what belongs to the zygote."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._listener.close()
        for descriptor in (self._orders, self._wake):
            if descriptor >= 0:
                os.close(descriptor)
        for other in self._children.values():
            other.connection.close()
            os.close(other.orders)


class Asker:
    """Who asked for the work, as the work sees them.

    `asker(message)` tells them something. `stops` are the interruptions of this process;
    `descriptors` are what they sent along, beside the standard output and error.
    """

    def __init__(self, connection: socket.socket, stops: Stops, descriptors: Sequence[int]) -> None:
        self._connection, self.stops, self.descriptors = connection, stops, tuple(descriptors)

    def __call__(self, message: Mapping[str, Any]) -> None:
        say(self._connection, message)

    def try_to_say(self, message: Mapping[str, Any]) -> None:
        """Tell them, if they take it at once."""
        if _saying.acquire(timeout=0.1):
            try:
                with contextlib.suppress(OSError):
                    self._connection.send(_line(message), socket.MSG_DONTWAIT)
            finally:
                _saying.release()


def _work(connection: socket.socket, orders: int) -> int:
    """In the child: take the request, be what it says, do it."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, MOST_DESCRIPTORS)
    for standard in (1, 2):
        os.dup2(descriptors[standard - 1], standard)
        os.close(descriptors[standard - 1])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty())
    with connection.makefile("rb") as lines:
        request = json.loads(lines.readline())
    say(connection, {FORK: {"pid": os.getpid()}})
    stops = Stops()
    try:
        _watch(connection, orders, stops)
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.path[:], sys.argv[:] = request["path"], request["argv"]
        os.chdir(request["folder"])
        _set_threads()
        work = locate(request["function"])
    except KeyboardInterrupt:  # stopped before anything was begun
        say(connection, {FORK: {"refused": True}})
        return 0
    code = work(request["request"], Asker(connection, stops, descriptors[2:]))
    return int(code or 0)


def _is_gone(connection: socket.socket) -> bool:
    """Whether who asked has hung up meanwhile (a poll without events tells that alone)."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))


def _set_threads() -> None:
    """The libraries read OMP_NUM_THREADS when the zygote imported them; this job's may differ."""
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    torch = sys.modules.get("torch")
    if torch is not None and told.isdigit() and int(told):
        torch.set_num_threads(int(told))


def _watch(connection: socket.socket, orders: int, stops: Stops) -> None:
    """Have orders carried out, and stop the work where nobody waits for it any more."""

    def listen() -> None:
        with selectors.DefaultSelector() as selector:
            for source in (connection, orders):
                selector.register(source, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is connection:
                        with contextlib.suppress(OSError):
                            if connection.recv(4096):
                                continue
                        told = b""
                    else:
                        told = os.read(orders, 4096)
                    if not told:
                        _abandon(stops)
                        return
                    for number in told.split():
                        stops.stop(signal.Signals(int(number)))

    threading.Thread(target=listen, daemon=True, name="orders").start()


def _abandon(stops: Stops) -> None:
    stops.stop()
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


_saying = threading.Lock()


def say(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """A line of JSON, whole beside those of other threads."""
    line = _line(message)
    if FORK in message:
        line = b"\n" + line  # a killed child may have been in the middle of one
    with _saying, contextlib.suppress(OSError):  # who asked may be gone
        connection.sendall(line)


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, default=str).encode() + b"\n"


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def main(argv: list[str]) -> int:
    """Import, then serve; an owner that was killed leaves the folder of the socket to this."""
    try:
        return _main(argv[0], int(argv[1]), argv[2:])
    finally:
        shutil.rmtree(Path(argv[0]).parent, ignore_errors=True)


def _main(path: str, orders: int, modules: Sequence[str]) -> int:
    with socket.socket(socket.AF_UNIX) as listener:
        partial = f"{path}.new"
        listener.bind(partial)
        listener.listen(128)
        listener.setblocking(False)
        os.rename(partial, path)  # who finds it can connect, and waits for the imports
        zygote = Zygote(listener, orders)
        for name in modules:
            try:
                importlib.import_module(name)
            except Exception as error:  # another version's, or no part of this installation
                log.debug("%s: %s", name, error)
            if zygote.is_orphaned():
                return ABANDONED
        torch = sys.modules.get("torch")
        # With a context here a forked child could not use CUDA.
        assert torch is None or not torch.cuda.is_initialized()
        gc.collect()
        gc.freeze()  # the children's collections leave the shared pages alone
        _flush()  # else each child would say it again
        return zygote.serve()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
