"""A worker's child process, seen from its supervisor."""

from __future__ import annotations

import atexit
import contextlib
import inspect
import json
import logging
import os
import queue
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtorch.core.errors import QtorchError, TrustError
from qtorch.core.names import locate
from qtorch.core.runtime import configure_logging
from qtorch.core.trust import check_config_trust
from qtorch.process.fork_server import CLOSE_SECONDS, TRAINING_MODULES, ForkServerClient, Message
from qtorch.process.heartbeat import RUN, beat, listen
from qtorch.process.stops import StopHandler
from qtorch.task.definition import decode_result, encode_result

if TYPE_CHECKING:
    from qtorch.process.fork_server import Reply


log = logging.getLogger(__name__)

CHILD_FUNCTION = "qtorch.task.worker_process.serve_tasks"
END_SECONDS = 5.0  # for a child without further work to exit
SEND_SECONDS = 1.0  # default time for a child to accept a message
POLL_SECONDS = 0.2
SIGNAL_SECONDS = 1.0  # a scheduler signals every process; the child may get its signal first
FENCE_FRACTION = 0.8  # of the lease: a child kills itself after that time of silence


class ChildLauncher:
    """Starts the child processes of a worker, forked so that none repeats the imports.

    `functions` are the import paths of the functions that run tasks. If all are qtorch's own, the
    fork server imports what trainings need. A user's function is imported by each child, because
    its modules might not survive a fork. `output` is a file for the output of the fork server.
    """

    def __init__(self, functions: Collection[str] = (), output: Path | None = None) -> None:
        is_own = bool(functions) and all(name.startswith("qtorch.") for name in functions)
        self._modules = TRAINING_MODULES if is_own else ()
        self._output = output
        self._servers: list[ForkServerClient] = []  # only the last one starts new children
        self._lock = threading.Lock()

    def start(
        self, environment: Mapping[str, str], silence_timeout: float, output: Path | None = None
    ) -> ChildProcess:
        """Start a child process; raise ForkError if that is impossible."""
        with self._lock:
            while self._servers and self._servers[-1].has_exited:
                self._servers.pop().close()
            if not self._servers or self._servers[-1].is_stopped:
                self._servers.append(ForkServerClient(*self._modules, output=self._output))
            server = self._servers[-1]
        return ChildProcess(server, environment, silence_timeout, output)

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Stop the fork servers and the children that still run, within `timeout` seconds each."""
        with self._lock:
            while self._servers:
                self._servers.pop().close(timeout)


class ChildProcess:
    """A process that runs `serve_tasks`, in its own session, with a command pipe.

    `environment` is added to that of this process. `output` is a file for the child's output, which
    else goes to the output of this process. `silence_timeout`: see `Link`.
    """

    def __init__(
        self,
        server: ForkServerClient,
        environment: Mapping[str, str],
        silence_timeout: float,
        output: Path | None = None,
    ) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._is_closed = False
        folder = os.getcwd()  # importable, as with `python -m`
        is_complete = folder in sys.path or sys.flags.safe_path
        path = sys.path if is_complete else [folder, *sys.path]
        with contextlib.ExitStack() as stack:
            commands, self._commands = os.pipe()
            stack.callback(os.close, commands)
            os.set_blocking(self._commands, False)
            output_descriptors = (1, 2)
            if output is not None:
                file = stack.enter_context(output.open("ab")).fileno()
                output_descriptors = (file, file)
            try:
                self._call = server.fork(
                    CHILD_FUNCTION,
                    {"silence_timeout": silence_timeout, "last_alive": time.monotonic()},
                    environment=environment,
                    path=path,
                    descriptors=(*output_descriptors, commands),
                )
            except BaseException:
                os.close(self._commands)
                raise

    @property
    def is_started(self) -> bool:
        """Whether the fork server has reported the child's process id."""
        return self._call.pid is not None

    @property
    def has_ended(self) -> bool:
        """Whether the child's end has been reported."""
        return self._call.exit_status is not None

    def send(
        self,
        message: Mapping[str, Any],
        timeout: float = SEND_SECONDS,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Send a message to the child; return False if it does not accept it in time or is gone."""
        line = json.dumps(message).encode() + b"\n"
        end = time.monotonic() + timeout
        with self._lock:
            try:
                while (
                    line and not self._is_closed and time.monotonic() < end and not is_cancelled()
                ):
                    if select.select([], [self._commands], [], min(timeout, POLL_SECONDS))[1]:
                        line = line[os.write(self._commands, line) :]
            except OSError as error:
                log.debug("cannot send a message to the child: %s", error)
                return False
        return not line

    def ping(self) -> None:
        """Tell the child that this process is alive, without waiting for it to read the message."""
        if not self._lock.acquire(blocking=False):
            return  # another thread sends a message or closes the pipe
        try:
            if not self._is_closed and select.select([], [self._commands], [], 0)[1]:
                # The message is short, so a writable pipe accepts it as a whole.
                os.write(self._commands, f'{{"alive": {time.monotonic()}}}\n'.encode())
        except OSError as error:
            log.debug("cannot send a message to the child: %s", error)
        finally:
            self._lock.release()

    def receive(self, timeout: float) -> list[Message] | None:
        """Return the child's new messages; wait up to `timeout` seconds. None if it has ended."""
        messages = self._call.receive(timeout)
        if self._call.exit_status is not None and self._call.exit_status.is_refused:
            self._server.is_stopped = True  # only the server got a scheduler's signal
        return messages or (None if self.has_ended else [])

    def describe_exit(self) -> str:
        """Return a phrase such as `was killed by SIGKILL` or `exited with code 1`."""
        return (
            "is running" if self._call.exit_status is None else self._call.exit_status.description
        )

    @property
    def is_server_failure(self) -> bool:
        """Whether the child ended because the fork server refused to start it, or is gone."""
        return self._call.exit_status is not None and self._call.exit_status.code is None

    def stop_server(self) -> None:
        """End the fork server, which has not started this child in time."""
        self._server.is_stopped = True
        self._server.close(0.0)

    def kill(self) -> None:
        """Kill the child and the processes that it has started."""
        self._server.kill(self._call)
        self._close()

    def finish(self) -> None:
        """Let the child exit by itself, and kill it if it does not within END_SECONDS."""
        self._close()
        end = time.monotonic() + END_SECONDS
        while not self.has_ended and time.monotonic() < end:
            self._call.receive(END_SECONDS)
        self.kill()

    def _close(self) -> None:
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                os.close(self._commands)


class Link:
    """The pipe from the supervisor, and the connection to it (`qtorch.process.fork_server.Reply`).

    `silence_timeout`: seconds without a message after which the supervisor counts as gone.
    `last_alive`: when the supervisor was last alive, by the machine's monotonic clock. Its messages
    carry this time too, because they may have waited in the pipe.
    """

    def __init__(
        self, commands: int, silence_timeout: float, last_alive: float, reply: Reply
    ) -> None:
        self._commands, self._silence_timeout, self._reply = commands, silence_timeout, reply
        self._requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._last_alive = last_alive
        self._is_closed = False
        self.is_busy = False

    def start(self) -> None:
        """Start the threads that read commands and watch the supervisor."""
        for function in (self._read_commands, self._watch_supervisor):
            threading.Thread(target=function, daemon=True, name=f"link-{function.__name__}").start()

    def next_request(self) -> dict[str, Any] | None:
        """Wait for the next task; return None when there are no more."""
        self.is_busy = False
        request = self._requests.get()
        self.is_busy = request is not None
        return None if self._is_closed else request

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message to the supervisor."""
        self._reply(message)

    def beat(self, stage: str, details: dict[str, Any]) -> None:
        """Forward a heartbeat to the supervisor (a listener of `qtorch.process.heartbeat`)."""
        if stage == RUN:
            self.send({"run": details})
        else:
            self.send({"beat": {"stage": stage, **details}})

    def _read_commands(self) -> None:
        try:
            with os.fdopen(self._commands, "rb") as lines:
                for line in lines:
                    command = json.loads(line)
                    self._last_alive = max(self._last_alive, command.get("alive", 0.0))
                    if command.get("stop"):
                        self._reply.stop_handler.interrupt()
                    elif "func" in command:
                        self._requests.put(command)
        finally:
            self._close()

    def _watch_supervisor(self) -> None:
        while True:
            time.sleep(0.2)  # messages that wait in the pipe must be read first
            if time.monotonic() - self._last_alive > self._silence_timeout:
                self._close()
                return

    def _close(self) -> None:
        self._is_closed = True
        if self.is_busy:
            # If the supervisor was only paused, this tells it that the task did not fail by itself.
            self._reply.try_send({"interrupted": True})
            _kill_process_group()
        self._requests.put(None)


def _kill_process_group() -> None:
    """Kill this process and the processes that it has started; a forked child leads its group."""
    os.killpg(0, signal.SIGKILL)


def run_request(
    request: Mapping[str, Any], stop_handler: StopHandler, link: Link
) -> dict[str, Any]:
    """Run one task and return the message about its outcome.

    The message is one of
    - `{"result": JSON}`;
    - `{"error": text, "traceback": text}`: the task failed;
    - `{"interrupted": true}`;
    - `{"refused": text}`: the definition names something untrusted or nonexistent, so that a
      further attempt is useless;
    - `{"unusable": text}`: this process cannot run tasks, which is not the task's fault.

    `{"ready": true}` is sent before the task's function is called.
    """
    try:
        beat("importing")
        function = locate(request["func"])
    except KeyboardInterrupt:
        return {"interrupted": True}
    except BaseException as error:
        return {"unusable": f"cannot import {request['func']}: {format_error(error)}"}
    try:
        link.send({"ready": True})
        definition = request["definition"]
        try:
            check_config_trust(definition)
        except QtorchError as error:
            return {"refused": str(error)}
        stored_result = request.get("res")
        first = definition if stored_result is None else decode_result(json.dumps(stored_result))
        options = filter_options(function, request["options"])
        return {"result": json.loads(encode_result(function(first, **options)))}
    except TrustError as error:
        return {"refused": str(error)}
    except BaseException as error:
        if not isinstance(error, Exception) and stop_handler.count_signals():
            return {"interrupted": True}
        return {"error": format_error(error), "traceback": traceback.format_exc()}


def filter_options(function: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not None and that a function accepts."""
    values = {k: v for k, v in options.items() if v is not None}
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return values
    return {k: v for k, v in values.items() if k in {p.name for p in parameters}}


def format_error(error: BaseException) -> str:
    """Return the message of a qtorch error, or type and message of another error, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, QtorchError) and text else f"{type(error).__name__}: {text}"


def serve_tasks(request: Mapping[str, Any], reply: Reply) -> int:
    """Run tasks until the supervisor has no more; called by the fork server in a child."""
    link = Link(reply.descriptors[0], request["silence_timeout"], request["last_alive"], reply)
    try:
        link.start()
        configure_logging(os.environ.get("QTORCH_WORKER_LOG", "INFO"))
        with listen(link.beat):
            while (task := link.next_request()) is not None:
                outcome = run_request(task, reply.stop_handler, link)
                link.send(outcome)
                if task.get("last") or not {"result", "refused"} & outcome.keys():
                    break  # exit to free all memory; after an error, also to drop corrupt state
    except KeyboardInterrupt:
        log.debug("stopped while idle")
    atexit._run_exitfuncs()  # ends runs that a user's function left open; os._exit would not
    return 0
