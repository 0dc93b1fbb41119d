"""Files that are read by memory map, and which memory is a file's."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

# By address. What is mapped is shared until it is written to, which nobody does to columns.
_maps: WeakValueDictionary[int, MappedFile] = WeakValueDictionary()


class MappedFile(np.memmap):
    """A memory map that knows which file it was opened on."""

    inode: int


def map_file(path: Path) -> Tensor:
    """The bytes of a file, uint8 `[bytes]`: private to this process, shared until written to."""
    if not path.stat().st_size:
        return torch.empty(0, dtype=torch.uint8)
    found = MappedFile(path, dtype=np.uint8, mode="c")
    found.inode = path.stat().st_ino
    _maps[found.ctypes.data] = found
    return torch.from_numpy(found)


def file_of(storage: Any) -> Path | None:
    """The file that a tensor's untyped storage maps from its first byte on; None for other
    memory, and where the file is not there any more."""
    found = _maps.get(storage.data_ptr())
    if found is None or found.nbytes != storage.nbytes():
        return None
    path = Path(str(found.filename))
    try:
        known = path.stat()
    except OSError:
        return None
    same = (known.st_ino, known.st_size) == (found.inode, found.nbytes)
    return path.resolve() if same else None
