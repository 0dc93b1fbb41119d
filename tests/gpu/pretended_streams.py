"""Streams and events of the pretended CUDA device.

Its default stream computes at once. A copy to the device on any other stream happens as late as a
GPU may do it: when a stream waits for an event that was recorded after it. Until then its numbers
are NaN or an index that is out of range, and the host must not have changed the source. A stream
that uses what another one has written, without having waited for it, raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class PretendedStream:
    """A stream; `device` is a PretendedCuda."""

    def __init__(self, device: Any, *, is_default: bool = False) -> None:
        self.device, self.is_default = device, is_default
        self.copies: list[Callable[[], object]] = []  # those that have not happened yet
        self.last_operations: dict[PretendedStream, int] = {}  # waited for, by stream

    def wait_event(self, event: PretendedEvent) -> None:
        if event.stream is None:
            return  # CUDA takes an event that was not recorded for one that has happened
        event.happen()
        self.last_operations[event.stream] = max(
            self.last_operations.get(event.stream, 0), event.operation
        )

    def wait_stream(self, stream: PretendedStream) -> None:
        event = PretendedEvent()
        event.record(stream)
        self.wait_event(event)

    def record_event(self, event: PretendedEvent | None = None) -> PretendedEvent:
        event = event or PretendedEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.device.count_wait("synchronize of a stream")
        self.device.default_stream.wait_stream(self)


class PretendedEvent:
    """An event: the work of a stream up to the moment at which it was recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stream: PretendedStream | None = None
        self.operation = 0
        self._copies: list[Callable[[], object]] = []

    def record(self, stream: PretendedStream | None = None) -> None:
        assert stream is not None, "name the stream"
        self.stream, self.operation = stream, stream.device.num_operations
        self._copies = list(stream.copies)

    def happen(self) -> None:
        assert self.stream is not None
        for copy in self._copies:
            if copy in self.stream.copies:
                self.stream.copies.remove(copy)
                copy()

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.device.count_wait("synchronize of an event")
            self.stream.device.default_stream.wait_event(self)

    def query(self) -> bool:
        """Return whether the work has happened: no copy does before a stream waits for it."""
        return self.stream is None or not any(copy in self.stream.copies for copy in self._copies)


class StreamOrder:
    """Which stream has last written each memory, by its address."""

    def __init__(self) -> None:
        self._writers: dict[int, tuple[PretendedStream, int]] = {}

    def check(self, tensors: list[Tensor], stream: PretendedStream) -> None:
        """Raise if `stream` has not waited for what another stream has written to `tensors`."""
        for tensor in tensors:
            writer, operation = self._writers.get(address(tensor), (stream, 0))
            if writer is not stream and stream.last_operations.get(writer, 0) < operation:
                raise RuntimeError("a stream uses memory that another one may not have written")

    def write(self, tensors: list[Tensor], stream: PretendedStream, operation: int) -> None:
        for tensor in tensors:
            self._writers[address(tensor)] = stream, operation


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def poison(tensor: Tensor) -> Tensor:
    """Return memory of the same form whose numbers cannot be taken for the copy's."""
    result = torch.empty_like(tensor)
    if tensor.is_floating_point():
        return result.fill_(torch.nan)
    return result.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)


def stream_functions(device: Any) -> dict[str, Any]:
    """Return what torch.cuda offers for streams."""

    @contextmanager
    def stream(chosen: PretendedStream) -> Iterator[None]:
        previous, device.current_stream = device.current_stream, chosen
        try:
            yield
        finally:
            device.current_stream = previous

    def build_stream(*args: Any, **kwargs: Any) -> PretendedStream:
        device.stream_order = device.stream_order or StreamOrder()
        return PretendedStream(device)

    return {
        "Stream": build_stream,
        "Event": PretendedEvent,
        "stream": stream,
        "set_stream": lambda chosen: setattr(device, "current_stream", chosen),
        "current_stream": lambda device_name=None: device.current_stream,
        "default_stream": lambda device_name=None: device.default_stream,
    }
