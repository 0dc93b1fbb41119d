"""Digests of data files; a process reads an unchanged file only once."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import TypeAlias

from qtorch.core.session import resolve_path

Signature: TypeAlias = tuple[int, ...]

# A file may change again without a new time stamp while its last change is as recent as this
# (coarse clocks of file systems), so the digest of such a file is not kept.
FRESH_SECONDS = 2.0
READ_BYTES = 2**22

_digests: dict[str, tuple[Signature, bytes]] = {}


def file_digest(path: str | Path | os.DirEntry[str]) -> bytes:
    """Return the BLAKE2b digest of a file's content.

    The digest of an earlier call is used if size, modification time, change time and inode are
    the same. The change time is set by the operating system, so that a file which was changed in
    place, with its old size and modification time, is read again.
    """
    name = os.path.abspath(path)
    signature, is_fresh = _read_signature(path)
    if name in _digests and _digests[name][0] == signature:
        return _digests[name][1]
    hasher = hashlib.blake2b(digest_size=16)
    with open(name, "rb") as file:
        while part := file.read(READ_BYTES):
            hasher.update(part)
    if not is_fresh:
        _digests[name] = (signature, hasher.digest())
    return hasher.digest()


def digest_text(path: str | Path) -> str:
    """Return the digest as text, `missing` if there is no such file."""
    try:
        return file_digest(resolve_path(path)).hex()
    except FileNotFoundError:
        return "missing"


def _read_signature(path: str | Path | os.DirEntry[str]) -> tuple[Signature, bool]:
    """Return what tells a file's versions apart, and whether its last change is very recent."""
    stat = path.stat() if isinstance(path, os.DirEntry) else os.stat(path)
    is_fresh = time.time() - stat.st_ctime < FRESH_SECONDS
    return (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino), is_fresh
