"""A worker: a small process without torch that has its children train, and keeps their leases.

One thread for each place (`qtorch.task.slot`), a child in each; this module's main thread minds
the signals and shows what they do, another one tells the children that this process lives.
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

from qtorch.core.stops import NOTICES, STOPS
from qtorch.task.devices import CPU, device_environment
from qtorch.task.process import Children
from qtorch.task.slot import Orders, Slot, View, WorkerOptions

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
FORWARD_SECONDS = 0.3  # a scheduler's signal reaches the children too: let it be there first
HURRY_SECONDS = 3.0
CLOSE_SECONDS = 15.0  # for the process of the imports to end: it may be in the middle of one
THREADS, TRACKING = "OMP_NUM_THREADS", "MLFLOW_TRACKING_URI"

Show = Callable[[Sequence[View]], None]


class Supervisor:
    """Works off a pool with one child for each of `devices`, until nothing is left to do.

    `show` is called four times a second with what each place does. `logs` is a folder for what
    the children and their imports print (else it goes where this process prints).
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
        self.orders = Orders(options.max_tasks)
        self._signals: list[tuple[int, float]] = []
        host = socket.gethostname()
        output = None if logs is None else logs / "imports.log"
        self.children = Children(options.functions.values(), output)
        self.slots = []
        for k, device in enumerate(devices):
            slot = Slot(
                options,
                self.orders,
                View(f"slot {k}", device),
                worker=f"{host}:{os.getpid()}:{k}",
                children=self.children,
                environment={
                    **device_environment(device),
                    **_threads(devices),
                    **({TRACKING: options.tracking_uri} if options.tracking_uri else {}),
                },
                output=None if logs is None else logs / f"slot{k}.log",
            )
            self.slots.append(slot)

    def run(self) -> int:
        """The exit code: 0 at the end of the work, 128 + the signal that stopped it, 1 if a place
        broke down.

        A scheduler's notice or Ctrl-C has the trainings keep a checkpoint, gives their tasks back
        and ends; a Ctrl-C after it ends at once. A task that was finished meanwhile is committed.
        """
        with self._listening():
            for slot in self.slots:
                slot.start()
            threading.Thread(target=self._ping, daemon=True, name="ping").start()
            while any(slot.is_alive() for slot in self.slots):
                self._mind_signals()
                if self.show is not None:
                    self.show([slot.view for slot in self.slots])
                time.sleep(TICK_SECONDS)
            self.children.close(HURRY_SECONDS if self.orders.hurry.is_set() else CLOSE_SECONDS)
        if self._signals:
            return 128 + self._signals[0][0]
        return int(any(slot.error is not None for slot in self.slots))

    def _ping(self) -> None:
        """Tell the children that this process lives, also while a terminal is held up."""
        while True:
            for slot in self.slots:
                slot.ping()
            time.sleep(TICK_SECONDS)

    def _mind_signals(self) -> None:
        if not self._signals:
            return
        number, when = self._signals[0]
        since = time.monotonic() - when
        if since > FORWARD_SECONDS and not self.orders.stop.is_set():
            name = signal.Signals(number).name
            log.warning("%s: tasks go back to the pool; Ctrl-C once more ends at once", name)
            self.orders.stop.set()
        again = [at for each, at in self._signals[1:] if each not in NOTICES]
        if again:
            self.orders.stop.set()
            self.orders.hurry.set()
            if time.monotonic() - again[0] > HURRY_SECONDS:
                self._leave(number)

    def _leave(self, number: int) -> None:
        """End although a place still waits (for the pool's store); its lease will run out."""
        try:
            for slot in self.slots:
                child = slot.child
                if child is not None:
                    child.kill()
        finally:
            os._exit(128 + number)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self._signals.append((number, time.monotonic()))
            self.orders.ending = True

        before = {n: signal.signal(n, note) for n in STOPS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _threads(devices: Sequence[str]) -> dict[str, str]:
    """Several children that compute on the CPU share its cores."""
    if THREADS in os.environ or len(devices) == 1:
        return {}
    return {THREADS: str(max(1, len(os.sched_getaffinity(0)) // len(devices)))}
