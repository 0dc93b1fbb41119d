"""Files that are read by memory map, and the lookup from memory to file."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

# Maps by address. Mapped pages are shared until they are written to, and columns never are.
_maps: WeakValueDictionary[int, MappedFile] = WeakValueDictionary()


class MappedFile(np.memmap):
    """A memory map that remembers which file it was opened on."""

    inode: int


def map_file(path: Path) -> Tensor:
    """Map a file's bytes as uint8 `[bytes]`, private to this process but shared until written."""
    if not path.stat().st_size:
        return torch.empty(0, dtype=torch.uint8)
    mapped_file = MappedFile(path, dtype=np.uint8, mode="c")
    mapped_file.inode = path.stat().st_ino
    _maps[mapped_file.ctypes.data] = mapped_file
    return torch.from_numpy(mapped_file)


def find_mapped_file(storage: Any) -> Path | None:
    """Return the file that a tensor's untyped storage maps from its first byte on.

    None for other memory, and if the file no longer exists.
    """
    mapped_file = _maps.get(storage.data_ptr())
    if mapped_file is None or mapped_file.nbytes != storage.nbytes():
        return None
    path = Path(str(mapped_file.filename))
    try:
        file_stat = path.stat()
    except OSError:
        return None
    is_same_file = (file_stat.st_ino, file_stat.st_size) == (mapped_file.inode, mapped_file.nbytes)
    return path.resolve() if is_same_file else None
