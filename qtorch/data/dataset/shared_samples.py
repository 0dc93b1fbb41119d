"""Samples shared between processes: written once and memory-mapped by any number of readers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtorch.data.dataset.samples import Samples
from qtorch.data.panel.stored_view import find_mapped_file, map_file

DATA, OUTLINE = "samples.bin", "samples.pkl"
ALIGNMENT = 64  # bytes; mapped numbers must begin at a multiple of their size
# If a tensor uses less than 1 / MAX_WASTE of its storage, only the used part is written.
MAX_WASTE = 2


def write_samples(
    sample_sets: Sequence[Samples | None], folder: Path, *, local: bool = True
) -> None:
    """Write samples into `folder`: all tensors in one file, everything else in a pickle beside it.

    Features are packed for gathering first. With `local`, tensors that are mapped from a file (of
    the feature cache) are not copied but referenced by path: the readers are on this machine.
    """
    with (folder / DATA).open("wb") as data, (folder / OUTLINE).open("wb") as outline:
        writer = _Writer(outline, data, local)
        writer.dump([None if s is None else _pack_samples(s) for s in sample_sets])


def read_samples(folder: Path) -> list[Samples | None]:
    """Read the samples by memory map.

    The outline is a pickle: only read a folder that no one else can write to.
    """
    with (folder / OUTLINE).open("rb") as outline:
        sample_sets: list[Samples | None] = _Reader(outline, folder).load()
    return sample_sets


def _pack_samples(samples: Samples) -> Samples:
    """Return a copy of the samples with packed features, filled windows and no source columns."""
    if len(samples):
        # Pack now, once, instead of in every reader.
        samples.batch(torch.zeros(1, dtype=torch.int64))
    result = copy.copy(samples)
    result._feature_pack, result._columns, result._cached_table = samples.feature_pack, None, None
    return result


class _Writer(pickle.Pickler):
    def __init__(self, outline: Any, data: Any, local: bool) -> None:
        super().__init__(outline, protocol=pickle.HIGHEST_PROTOCOL)
        self._data, self._local = data, local
        self._locations: dict[tuple[int, int], tuple[str, int, int]] = {}
        self._live_tensors: list[Tensor] = []  # kept alive, as storages are identified by address

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) is not Tensor or obj.layout != torch.strided:
            return None
        tensor = obj.detach().cpu()
        storage = tensor.untyped_storage()
        used_bytes = tensor.numel() * tensor.element_size()
        if used_bytes * MAX_WASTE < storage.nbytes() and find_mapped_file(storage) is None:
            tensor = tensor.contiguous().clone()
            storage = tensor.untyped_storage()
        self._live_tensors.append(tensor)
        name, begin, size = self._write_storage(storage)
        form = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        return name, begin, size, str(tensor.dtype).removeprefix("torch."), *form

    def _write_storage(self, storage: Any) -> tuple[str, int, int]:
        key = (storage.data_ptr(), storage.nbytes())
        if key in self._locations:
            return self._locations[key]
        path = find_mapped_file(storage) if self._local else None
        if path is not None:
            location = (str(path), 0, storage.nbytes())
        else:
            self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
            location = ("", self._data.tell(), storage.nbytes())
            torch.tensor([], dtype=torch.uint8).set_(storage).numpy().tofile(self._data)
        self._locations[key] = location
        return location


class _Reader(pickle.Unpickler):
    def __init__(self, outline: Any, folder: Path) -> None:
        super().__init__(outline)
        self._folder = folder
        self._maps: dict[str, Tensor] = {}

    def persistent_load(self, location: Any) -> Tensor:
        name, begin, size, kind, shape, stride, offset = location
        if name not in self._maps:
            self._maps[name] = map_file(Path(name) if name else self._folder / DATA)
        dtype = getattr(torch, kind)
        if not size:
            return torch.empty(shape, dtype=dtype)
        part = self._maps[name][begin : begin + size].view(dtype)
        return torch.as_strided(part, shape, stride, part.storage_offset() + offset)
