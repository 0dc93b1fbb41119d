"""Samples that other processes map: written once, read by any number without a copy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtorch.data.mapped import file_of, map_file
from qtorch.data.sample_set import Samples

DATA, OUTLINE = "samples.bin", "samples.pkl"
ALIGNMENT = 64
WASTE = 2  # of a storage of which so little is seen, only that part is written


def write_samples(given: Sequence[Samples | None], folder: Path, *, local: bool = True) -> None:
    """Write samples into `folder`: their tensors side by side into one file, the rest beside it.

    Features are laid out for gathering first. With `local` what is mapped from a file (of the
    feature cache) stays there and is only named: the readers are on this machine.
    """
    with (folder / DATA).open("wb") as data, (folder / OUTLINE).open("wb") as outline:
        writer = _Writer(outline, data, local)
        writer.dump([None if s is None else _laid_out(s) for s in given])


def read_samples(folder: Path) -> list[Samples | None]:
    """The samples again, mapped. The outline is a pickle: read none that others could write."""
    with (folder / OUTLINE).open("rb") as outline:
        found: list[Samples | None] = _Reader(outline, folder).load()
    return found


def _laid_out(samples: Samples) -> Samples:
    """The samples with features packed, windows filled, and no columns beside."""
    if len(samples):
        samples.batch(torch.zeros(1, dtype=torch.int64))  # now, once, and not in every reader
    laid = copy.copy(samples)
    laid._packed, laid._columns, laid._known = samples.packed, None, None
    return laid


class _Writer(pickle.Pickler):
    def __init__(self, outline: Any, data: Any, local: bool) -> None:
        super().__init__(outline, protocol=pickle.HIGHEST_PROTOCOL)
        self._data, self._local = data, local
        self._places: dict[tuple[int, int], tuple[str, int, int]] = {}
        self._kept: list[Tensor] = []  # an address is a key as long as its memory lives

    def persistent_id(self, thing: Any) -> Any:
        if type(thing) is not Tensor or thing.layout != torch.strided:
            return None
        tensor = thing.detach().cpu()
        storage = tensor.untyped_storage()
        seen = tensor.numel() * tensor.element_size()
        if seen * WASTE < storage.nbytes() and file_of(storage) is None:
            tensor = tensor.contiguous().clone()
            storage = tensor.untyped_storage()
        self._kept.append(tensor)
        name, begin, size = self._place(storage)
        form = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        return name, begin, size, str(tensor.dtype).removeprefix("torch."), *form

    def _place(self, storage: Any) -> tuple[str, int, int]:
        key = (storage.data_ptr(), storage.nbytes())
        if key in self._places:
            return self._places[key]
        path = file_of(storage) if self._local else None
        if path is not None:
            place = (str(path), 0, storage.nbytes())
        else:
            self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
            place = ("", self._data.tell(), storage.nbytes())
            torch.tensor([], dtype=torch.uint8).set_(storage).numpy().tofile(self._data)
        self._places[key] = place
        return place


class _Reader(pickle.Unpickler):
    def __init__(self, outline: Any, folder: Path) -> None:
        super().__init__(outline)
        self._folder = folder
        self._maps: dict[str, Tensor] = {}

    def persistent_load(self, place: Any) -> Tensor:
        name, begin, size, kind, shape, stride, offset = place
        if name not in self._maps:
            self._maps[name] = map_file(Path(name) if name else self._folder / DATA)
        dtype = getattr(torch, kind)
        if not size:
            return torch.empty(shape, dtype=dtype)
        part = self._maps[name][begin : begin + size].view(dtype)
        return torch.as_strided(part, shape, stride, part.storage_offset() + offset)
