"""Ranks that another launcher starts: torchrun and srun start one command for each rank.

The process of rank 0 runs the command. The others do not: they wait until a fit of rank 0 needs its
ranks, start theirs, and exit when rank 0 does, with its exit code.

The processes talk through the keys of a store. Rank 0 writes, if nothing else is said:

- `fits`: how many fits it has requested; `fit/N`: the request of fit N, as JSON;
- `fit/N/stop`, `fit/N/kill`: the ranks of fit N stop after their current step, or are killed;
- `fit/N/R/K`: message K of rank R, written by the process of rank R and deleted by rank 0; the last
  one is `{"exit": code}`;
- `alive`: the number of heartbeats of rank 0;
- `end`: the exit code of rank 0; `left/R`: the process of rank R has read it, written by itself.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
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

from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]  # missing in torch's stubs

from qtorch.core.errors import ConfigError, QtorchError
from qtorch.model.devices.rank_process import RankHandle, rank_threads, start_rank
from qtorch.process.child import Child, ExitStatus
from qtorch.process.launch import World
from qtorch.process.stops import ignore_stop_signals

log = logging.getLogger(__name__)

# Tells the child processes of rank 0's command about the world.
WORLD_VARIABLE = "QTORCH_EXTERNAL_RANKS"
POLL_SECONDS, CONNECT_SECONDS, EXIT_SECONDS = 0.2, 300.0, 10.0
HEARTBEAT_TIMEOUT = 20.0  # seconds without a heartbeat after which rank 0 counts as dead
EXIT_KEY, HEARTBEAT_KEY = "end", "alive"
CONNECTION_ERRORS = (DistError, ConnectionError)


@dataclass
class Launch:
    """How the ranks of a fit are started.

    This process starts its `own_ranks`, each with a number of `threads`; the other launched
    processes, reached through `store`, start the rest.
    """

    address: str
    own_ranks: range
    size: int
    threads: int
    is_single_node: bool
    store: Any = None

    def start_remote_ranks(self, folder: str, digest: str) -> list[RankHandle]:
        """Ask the waiting processes to start their ranks."""
        if self.store is None:
            return []
        number = self.store.add("fits", 1) - 1
        request = {"folder": folder, "digest": digest, "is_single_node": self.is_single_node}
        self.store.set(f"fit/{number}", json.dumps(request))
        return [RemoteRank(self.store, number, rank) for rank in range(1, self.size)]


def plan_launch(num_local: int, num_nodes: int) -> Launch:
    """Decide how the ranks of a fit on `num_nodes` nodes with `num_local` devices each are started.

    Raises ConfigError as `check_launch` does.
    """
    world = check_launch(num_local, num_nodes)
    size = num_local * num_nodes
    if world is None:
        return Launch(
            address="127.0.0.1",
            own_ranks=range(num_local),
            size=size,
            threads=rank_threads(num_local),
            is_single_node=True,
        )
    return Launch(
        address=world.address,
        own_ranks=range(1),
        size=size,
        threads=rank_threads(world.num_local, is_launched=True),
        is_single_node=num_nodes == 1,
        store=_connect_store(world, host=False),
    )


def check_launch(num_local: int, num_nodes: int) -> World | None:
    """Return what torchrun or srun has started; None if the fit starts its ranks itself.

    Raises ConfigError if they have started another number of processes, and for several nodes
    without either.
    """
    world_json = os.environ.get(WORLD_VARIABLE)
    size = num_local * num_nodes
    if world_json is None:
        if num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes is {num_nodes}, but this command was not started on the "
                f"other nodes: use torchrun --nnodes {num_nodes} --nproc-per-node {num_local} -m "
                f"qtorch.cli.main train ..., or srun --nodes {num_nodes} --ntasks {size} qtorch "
                "train ..."
            )
        return None
    world = World(**json.loads(world_json))
    if world.size != size:
        raise ConfigError(
            f"{world.kind} has started {world.size} processes, but the training uses {size} "
            f"devices (trainer.devices={num_local} x trainer.num_nodes={num_nodes}): start one "
            "process for each device."
        )
    return world


def is_launched() -> bool:
    """Whether torchrun or srun has started the ranks, each with the GPUs that it may use."""
    return WORLD_VARIABLE in os.environ


def check_single_process() -> None:
    """Raise ConfigError if several processes were started for a fit on one device."""
    world_json = os.environ.get(WORLD_VARIABLE)
    if world_json is not None:
        world = World(**json.loads(world_json))
        raise ConfigError(
            f"{world.kind} has started {world.size} processes, but the training uses one device: "
            f"set trainer=ddp trainer.devices={world.num_local}, or start one process."
        )


class RemoteRank:
    """A rank that another process of the launcher has started."""

    def __init__(self, store: Any, number: int, rank: int) -> None:
        self.exit_status: ExitStatus | None = None
        self._store, self._fit_number, self._rank = store, number, rank
        self._num_messages = 0

    def receive(self, timeout: float | None = None) -> list[dict[str, Any]]:
        messages = []
        while self._store.check([key := self._message_key()]):
            message = json.loads(self._store.get(key))
            self._store.delete_key(key)  # otherwise the store grows with every heartbeat
            self._num_messages += 1
            if "exit" in message:
                self.exit_status = ExitStatus.from_code(message["exit"])
            else:
                messages.append(message)
        return messages

    def _message_key(self) -> str:
        return _message_key(self._fit_number, self._rank, self._num_messages)

    def stop(self) -> None:
        self._store.set(f"fit/{self._fit_number}/stop", "")

    def kill(self) -> None:
        with contextlib.suppress(*CONNECTION_ERRORS):
            self._store.set(f"fit/{self._fit_number}/kill", "")


def _message_key(fit_number: int, rank: int, message_number: int) -> str:
    return f"fit/{fit_number}/{rank}/{message_number}"


@contextmanager
def host_ranks(world: World) -> Iterator[dict[str, int]]:
    """Context manager for the command of rank 0, inside which the other processes wait for fits.

    It yields a dict; the block stores its exit code there as "code", and the other processes exit
    with it.
    """
    world = _resolve_address(world)
    store, previous_value = _connect_store(world, host=True), os.environ.get(WORLD_VARIABLE)
    os.environ[WORLD_VARIABLE] = json.dumps(asdict(world))
    outcome, is_finished = {"code": 1}, threading.Event()
    threading.Thread(
        target=_send_heartbeats, args=(world, is_finished), daemon=True, name="first-rank"
    ).start()
    try:
        yield outcome
    finally:
        is_finished.set()
        os.environ.pop(WORLD_VARIABLE, None)
        if previous_value is not None:
            os.environ[WORLD_VARIABLE] = previous_value
        with contextlib.suppress(*CONNECTION_ERRORS):
            store.set(EXIT_KEY, str(outcome["code"]))
            farewell_keys = [f"left/{rank}" for rank in range(1, world.size)]
            store.wait(farewell_keys, timedelta(seconds=EXIT_SECONDS))


def serve_ranks(world: World) -> int:
    """Run the command of a rank other than 0: start ranks on request; return rank 0's exit code."""
    ignore_stop_signals()  # schedulers send them to every process; rank 0 handles them
    fit_number = 0
    try:
        world = _resolve_address(world)
        store = _connect_store(world, host=False)
        rank_zero = _RankZeroMonitor(store)
        while not store.check([EXIT_KEY]):
            if rank_zero.is_gone():
                return 1
            if store.check([f"fit/{fit_number}"]):
                _run_rank(store, world, fit_number, rank_zero)
                fit_number += 1
            time.sleep(POLL_SECONDS)
        code = int(store.get(EXIT_KEY))
        store.set(f"left/{world.rank}", "")
    except CONNECTION_ERRORS:
        return 1  # rank 0 has died, and its store with it
    return code


def _run_rank(store: Any, world: World, fit_number: int, rank_zero: _RankZeroMonitor) -> None:
    """Run the rank of this process for one fit, and pass on its messages to rank 0."""
    numbers = itertools.count()

    def send(message: dict[str, Any]) -> None:
        store.set(_message_key(fit_number, world.rank, next(numbers)), json.dumps(message))

    try:
        rank = _start_own_rank(world, json.loads(store.get(f"fit/{fit_number}")))
    except QtorchError as error:
        from qtorch.model.devices.rank_training import serialize_error  # it imports the model

        log.error("cannot start rank %d: %s", world.rank, error)
        send({"error": serialize_error(error)})
        send({"exit": 1})
        return
    is_stop_sent = False
    try:
        while True:
            for message in rank.receive(0.0):
                send(message)
            if rank.exit_status is not None:
                send({"exit": rank.exit_status.code})
                return
            if store.check([f"fit/{fit_number}/kill"]) or store.check([EXIT_KEY]):
                return
            if rank_zero.is_gone():
                return
            if not is_stop_sent and store.check([f"fit/{fit_number}/stop"]):
                is_stop_sent = True
                rank.stop()
            time.sleep(POLL_SECONDS)
    finally:
        rank.kill()


def _start_own_rank(world: World, request: dict[str, Any]) -> Child:
    return start_rank(
        world.rank,
        world.local_rank,
        world.size,
        threads=rank_threads(world.num_local, is_launched=True),
        folder=Path(request["folder"]),
        digest=request["digest"],
        is_single_node=request["is_single_node"],
    )


class _RankZeroMonitor:
    """Watch the heartbeats of rank 0."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._count, self._last_heartbeat = -1, time.monotonic()

    def is_gone(self) -> bool:
        """Whether rank 0 has sent no heartbeat for HEARTBEAT_TIMEOUT seconds."""
        count = self._store.add(HEARTBEAT_KEY, 0)
        if count != self._count:
            self._count, self._last_heartbeat = count, time.monotonic()
        return time.monotonic() - self._last_heartbeat > HEARTBEAT_TIMEOUT


def _send_heartbeats(world: World, is_finished: threading.Event) -> None:
    """Send heartbeats of rank 0 until `is_finished` is set."""
    with contextlib.suppress(*CONNECTION_ERRORS):
        store = _connect_store(world, host=False)
        while not is_finished.wait(1.0):
            store.add(HEARTBEAT_KEY, 1)


def _resolve_address(world: World) -> World:
    """Return the world with a reachable address: SLURM node names may be known to SLURM only."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo(world.address, world.port)
        return world
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        output = subprocess.run(
            ["scontrol", "show", "node", world.address],
            capture_output=True,
            text=True,
            timeout=CONNECT_SECONDS,
            check=True,
        )
        if match := re.search(r"NodeAddr=(\S+)", output.stdout):
            return replace(world, address=match[1])
    return world


def _connect_store(world: World, *, host: bool) -> Any:
    """Connect to the store where the processes meet: torchrun's, or one that rank 0 hosts."""
    is_master = host and not world.has_store
    try:
        store = TCPStore(
            world.address,
            world.port,
            is_master=is_master,
            wait_for_workers=False,
            timeout=timedelta(seconds=CONNECT_SECONDS),
        )
        return PrefixStore(f"qtorch {world.attempt}", store)
    except CONNECTION_ERRORS as error:
        raise ConfigError(
            f"processes of {world.kind} cannot connect to {world.address}:{world.port} ({error}). "
            "Set MASTER_ADDR and MASTER_PORT to an address of the first node and a free port."
        ) from error
