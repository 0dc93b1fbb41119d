"""Ranks by another launcher: under torchrun and srun one command is started for each rank.

The process of rank 0 does the command's work. The others do none of it: they wait until a fit of
rank 0's asks for its ranks, start theirs, and end when rank 0 does, with its exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]  # they are

from qtorch.core.errors import ConfigError
from qtorch.core.launch import World
from qtorch.core.stops import STOPS
from qtorch.model.rank_process import RankHandle, RankProcess, threads_of

VARIABLE = "QTORCH_EXTERNAL_RANKS"  # for what the command of rank 0 starts
LOOK, PATIENCE, FAREWELL = 0.2, 300.0, 10.0
SILENCE = 20.0  # seconds without a sign of life of rank 0's process, after which it is gone
END, ALIVE = "end", "alive"
GONE = (DistError, RuntimeError, ConnectionError)


@dataclass
class Launch:
    """Who starts the ranks of a fit: this process the local ranks `own`, the store's others the
    rest."""

    address: str
    own: range
    num_local: int
    local: bool
    store: Any = None
    size: int = 1

    def others(self, folder: str, digest: str) -> list[RankHandle]:
        """Ask the waiting processes for their ranks."""
        if self.store is None:
            return []
        number = self.store.add("fits", 1) - 1
        request = {"folder": folder, "digest": digest, "local": self.local}
        self.store.set(f"fit/{number}", json.dumps(request))
        return [RemoteRank(self.store, number, rank) for rank in range(1, self.size)]


def launched(num_local: int, num_nodes: int) -> Launch:
    """How the ranks of a fit on `num_nodes` nodes of `num_local` devices are started.

    Raises ConfigError where that is not what torchrun or srun has started, and for several nodes
    without either.
    """
    told = os.environ.get(VARIABLE)
    size = num_local * num_nodes
    if told is None:
        if num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes is {num_nodes}, but nobody has started this command on the "
                f"other nodes: use torchrun --nnodes {num_nodes} --nproc-per-node {num_local} -m "
                f"qtorch.cli.main train ..., or srun --nodes {num_nodes} --ntasks {size} qtorch "
                "train ..."
            )
        return Launch("127.0.0.1", range(num_local), num_local, local=True)
    world = World(**json.loads(told))
    if world.size != size:
        raise ConfigError(
            f"{world.kind} has started {world.size} processes, but the training is on {size} "
            f"devices (trainer.devices={num_local} x trainer.num_nodes={num_nodes}): give as many "
            "processes as devices."
        )
    store = _connected(world, host=False)
    return Launch(world.address, range(1), 1, num_nodes == 1, store, size)


def check_alone() -> None:
    """ConfigError where several processes were started for a fit on one device."""
    told = os.environ.get(VARIABLE)
    if told is not None:
        world = World(**json.loads(told))
        raise ConfigError(
            f"{world.kind} has started {world.size} processes, but the training is on one device: "
            f"trainer=ddp trainer.devices={world.num_local}, or one process."
        )


class RemoteRank:
    """A rank that another process of the launcher's has started."""

    def __init__(self, store: Any, number: int, rank: int) -> None:
        self.rank = rank
        self._store, self._fit = store, f"fit/{number}"
        self._heard, self._code = 0, None

    def messages(self) -> list[dict[str, Any]]:
        found = []
        while self._store.check([key := f"{self._fit}/{self.rank}/{self._heard}"]):
            found.append(json.loads(self._store.get(key)))
            self._heard += 1
        for message in [m for m in found if "exit" in m]:
            self._code = message["exit"]
            found.remove(message)
        return found

    def exit_code(self) -> int | None:
        return self._code

    def stop(self) -> None:
        self._store.set(f"{self._fit}/stop", "")

    def kill(self) -> None:
        with contextlib.suppress(*GONE):
            self._store.set(f"{self._fit}/kill", "")


@contextmanager
def hosting(world: World) -> Iterator[dict[str, int]]:
    """The command of rank 0: inside the block the others wait for its fits; at the end they are
    told its exit code, which the block puts into what it is given as "code"."""
    world = _resolved(world)
    store, before = _connected(world, host=True), os.environ.get(VARIABLE)
    os.environ[VARIABLE] = json.dumps(asdict(world))
    outcome, ended = {"code": 1}, threading.Event()
    threading.Thread(target=_live, args=(world, ended), daemon=True, name="first-rank").start()
    try:
        yield outcome
    finally:
        ended.set()
        if before is None:
            os.environ.pop(VARIABLE, None)
        with contextlib.suppress(*GONE):
            store.set(END, str(outcome["code"]))
            others = [f"left/{rank}" for rank in range(1, world.size)]
            store.wait(others, timedelta(seconds=FAREWELL))


def serve(world: World) -> int:
    """The command of every other rank; the exit code of rank 0's."""
    for stop in STOPS:  # a scheduler sends them to every process; rank 0 decides what they mean
        signal.signal(stop, signal.SIG_IGN)
    number = 0
    try:
        world = _resolved(world)
        store = _connected(world, host=False)
        first = _First(store)
        while not store.check([END]):
            if first.is_gone():
                return 1
            if store.check([f"fit/{number}"]):
                _serve_fit(store, world, number, first)
                number += 1
            time.sleep(LOOK)
        code = int(store.get(END))
        store.set(f"left/{world.rank}", "")
    except GONE:
        return 1  # the process of rank 0 is gone, and the store with it
    return code


def _serve_fit(store: Any, world: World, number: int, first: _First) -> None:
    fit = f"fit/{number}"
    request = json.loads(store.get(fit))
    threads = threads_of(1 if "OMP_NUM_THREADS" in os.environ else world.num_local)
    rank = RankProcess(
        world.rank,
        world.local_rank,
        world.size,
        threads=threads,
        folder=Path(request["folder"]),
        digest=request["digest"],
        local=request["local"],
    )
    told, asked = 0, False
    try:
        while True:
            code = rank.exit_code()
            messages = rank.messages() + ([] if code is None else [{"exit": code}])
            for message in messages:
                store.set(f"{fit}/{world.rank}/{told}", json.dumps(message))
                told += 1
            ended = store.check([f"{fit}/kill"]) or store.check([END]) or first.is_gone()
            if code is not None or ended:
                return
            if not asked and store.check([f"{fit}/stop"]):
                asked = True
                rank.stop()
            time.sleep(LOOK)
    finally:
        rank.kill()


class _First:
    """The process of rank 0, as the others hear it."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._count, self._heard = -1, time.monotonic()

    def is_gone(self) -> bool:
        """Whether it has given no sign of life for so long that it must be."""
        count = self._store.add(ALIVE, 0)
        if count != self._count:
            self._count, self._heard = count, time.monotonic()
        return time.monotonic() - self._heard > SILENCE


def _live(world: World, ended: threading.Event) -> None:
    """Signs of life of rank 0, until it has ended."""
    with contextlib.suppress(*GONE):
        store = _connected(world, host=False)
        while not ended.wait(1.0):
            store.add(ALIVE, 1)


def _resolved(world: World) -> World:
    """The world at an address that can be reached: a node of SLURM's may have a name that only
    SLURM knows."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo(world.address, world.port)
        return world
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(
            ["scontrol", "show", "node", world.address],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        if found := re.search(r"NodeAddr=(\S+)", told.stdout):
            return replace(world, address=found[1])
    return world


def _connected(world: World, *, host: bool) -> Any:
    """The store where the processes meet: torchrun's own, or one that rank 0 keeps."""
    own = host and not world.has_store
    try:
        store = TCPStore(
            world.address,
            world.port,
            is_master=own,
            wait_for_workers=False,
            timeout=timedelta(seconds=PATIENCE),
        )
        return PrefixStore(f"qtorch {world.attempt}", store)
    except GONE as error:
        raise ConfigError(
            f"the processes of {world.kind} do not meet at {world.address}:{world.port} ({error}). "
            "Set MASTER_ADDR and MASTER_PORT to an address of the first node and a free port."
        ) from error
