"""The worker process: runs tasks in child processes and renews their leases.

The worker itself imports no torch and stays small. Each slot (`qtorch.task.slot`) is a thread with
a child process. The main thread handles signals and displays the slots; another thread tells the
children regularly that this process is alive.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qtorch.core.stops import SCHEDULER_SIGNALS, STOP_SIGNALS
from qtorch.task.devices import CPU, device_environment
from qtorch.task.process import ChildLauncher
from qtorch.task.slot import Slot, SlotStatus, WorkerControl, WorkerOptions

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
FORWARD_SECONDS = 0.3  # a scheduler signals the children too; let its signal arrive first
HURRY_SECONDS = 3.0  # to end after a second Ctrl-C
CLOSE_SECONDS = 15.0  # for the fork server to exit; it may be in the middle of an import
THREADS, TRACKING = "OMP_NUM_THREADS", "MLFLOW_TRACKING_URI"

Show = Callable[[Sequence[SlotStatus]], None]


class Supervisor:
    """Runs the tasks of a pool with one child process for each of `devices`.

    `show` is called four times per second with the status of each slot. `logs` is a folder for the
    output of the children and the fork server, which else goes to the output of this process.
    """

    def __init__(
        self,
        options: WorkerOptions,
        devices: Sequence[str] = (CPU,),
        *,
        show: Show | None = None,
        logs: Path | None = None,
    ) -> None:
        self.options, self.show = options, show
        self.control = WorkerControl(options.max_tasks)
        self._signals: list[tuple[int, float]] = []
        host = socket.gethostname()
        output = None if logs is None else logs / "imports.log"
        self.launcher = ChildLauncher(options.functions.values(), output)
        self.slots = []
        for k, device in enumerate(devices):
            slot = Slot(
                options,
                self.control,
                SlotStatus(f"slot {k}", device),
                worker=f"{host}:{os.getpid()}:{k}",
                launcher=self.launcher,
                environment={
                    **device_environment(device),
                    **_thread_environment(devices),
                    **({TRACKING: options.tracking_uri} if options.tracking_uri else {}),
                },
                output=None if logs is None else logs / f"slot{k}.log",
            )
            self.slots.append(slot)

    def run(self) -> int:
        """Run until there is no more work; return the exit code.

        The code is 0 at the end of the work, 128 + the signal that stopped it, or 1 if a slot
        failed. After a stop signal the trainings write a checkpoint and their tasks are returned
        to the pool; a second Ctrl-C ends the process immediately. A task that finishes meanwhile
        is committed.
        """
        with self._handle_signals():
            for slot in self.slots:
                slot.start()
            threading.Thread(target=self._ping, daemon=True, name="ping").start()
            while any(slot.is_alive() for slot in self.slots):
                self._process_signals()
                if self.show is not None:
                    self.show([slot.status for slot in self.slots])
                time.sleep(TICK_SECONDS)
            self.launcher.close(HURRY_SECONDS if self.control.hurry.is_set() else CLOSE_SECONDS)
        if self._signals:
            return 128 + self._signals[0][0]
        return int(any(slot.error is not None for slot in self.slots))

    def _ping(self) -> None:
        """Tell the children that this process is alive, also while a terminal blocks its output."""
        while True:
            for slot in self.slots:
                slot.ping()
            time.sleep(TICK_SECONDS)

    def _process_signals(self) -> None:
        if not self._signals:
            return
        number, signal_time = self._signals[0]
        seconds = time.monotonic() - signal_time
        if seconds > FORWARD_SECONDS and not self.control.stop.is_set():
            name = signal.Signals(number).name
            log.warning(
                "%s: returning tasks to the pool; press Ctrl-C again to exit immediately", name
            )
            self.control.stop.set()
        interrupts = [at for each, at in self._signals[1:] if each not in SCHEDULER_SIGNALS]
        if interrupts:
            self.control.stop.set()
            self.control.hurry.set()
            if time.monotonic() - interrupts[0] > HURRY_SECONDS:
                self._exit_now(number)

    def _exit_now(self, number: int) -> None:
        """Exit although a slot still waits for the pool's store; its lease will expire."""
        try:
            for slot in self.slots:
                child = slot.child
                if child is not None:
                    child.kill()
        finally:
            os._exit(128 + number)

    @contextmanager
    def _handle_signals(self) -> Iterator[None]:
        def record_signal(number: int, frame: FrameType | None) -> None:
            self._signals.append((number, time.monotonic()))
            self.control.is_draining = True

        previous_handlers = {n: signal.signal(n, record_signal) for n in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)


def _thread_environment(devices: Sequence[str]) -> dict[str, str]:
    """Divide the CPU cores among several children, unless OMP_NUM_THREADS is set."""
    if THREADS in os.environ or len(devices) == 1:
        return {}
    return {THREADS: str(max(1, len(os.sched_getaffinity(0)) // len(devices)))}
