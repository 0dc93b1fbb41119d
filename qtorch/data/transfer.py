"""Copies between host memory and a GPU that neither of them waits for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on `device`.

    A copy to a GPU is made while this process goes on: the tensor is pinned first, because the
    driver waits for memory that is not.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class CopyStream:
    """A stream of a GPU for copies, which run while another stream computes.

    The streams are ordered by events: what is used on one was finished on the other. Copies are
    made from pinned memory, which is used again as soon as its last copies are done: usually there
    are two sets of it, one that the host fills while the GPU copies the other. If neither is free
    there is a third one, because the host never waits.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped in torch
        self._used_memory: list[tuple[torch.cuda.Event, list[Tensor]]] = []  # with its copies' end

    def send(self, tensors: Sequence[Tensor]) -> PendingCopies:
        """Start copies of tensors of the host to the device."""
        memory = self._take_memory()
        for place, tensor in enumerate(tensors):
            if place == len(memory):
                memory.append(_pin_bytes(tensor.nbytes))
            elif memory[place].numel() < tensor.nbytes:
                memory[place] = _pin_bytes(tensor.nbytes)
        with torch.cuda.stream(self._stream):
            copies = [
                _write_copy(part, tensor).to(self.device, non_blocking=True)
                for part, tensor in zip(memory, tensors, strict=False)
            ]
            is_done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # untyped in torch
            is_done.record(self._stream)
        self._used_memory.append((is_done, memory))
        return PendingCopies(copies, is_done)

    def _take_memory(self) -> list[Tensor]:
        """Return pinned memory whose copies are done, or nothing."""
        for place, (is_done, memory) in enumerate(self._used_memory):
            if is_done.query():  # type: ignore[no-untyped-call]  # untyped in torch
                del self._used_memory[place]
                return memory
        return []


def _pin_bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8).pin_memory()


def _write_copy(memory: Tensor, tensor: Tensor) -> Tensor:
    """Return a copy of a tensor at the beginning of `memory`, which is bytes."""
    copy = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


class PendingCopies:
    """Copies on the device that may still be under way."""

    def __init__(self, copies: list[Tensor], is_done: torch.cuda.Event) -> None:
        self._copies, self._is_done = copies, is_done

    def receive(self) -> list[Tensor]:
        """Return the copies: what the current stream does from now on waits for them."""
        for copy in self._copies:
            stream = torch.cuda.current_stream(copy.device)
            stream.wait_event(self._is_done)
            copy.record_stream(stream)  # its memory belongs to the stream of the copies
        return self._copies


class BlockFetcher:
    """Copies finished blocks to host memory while the GPU computes the next one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped in torch
        self._pending: tuple[Tensor, Tensor, torch.cuda.Event] | None = None

    def add(self, values: Tensor, target: Tensor) -> None:
        """Copy the block before this one; `values` become `target` later."""
        is_computed = torch.cuda.Event()  # type: ignore[no-untyped-call]  # untyped in torch
        is_computed.record(torch.cuda.current_stream(self._device))
        self.finish()
        self._pending = values, target, is_computed

    def finish(self) -> None:
        """Copy the last block, and wait for it."""
        if self._pending is None:
            return
        values, target, is_computed = self._pending
        self._pending = None
        self._stream.wait_event(is_computed)
        with torch.cuda.stream(self._stream):
            target.copy_(values)
