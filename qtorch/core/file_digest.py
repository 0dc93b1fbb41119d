"""Digests inside files: a change of any byte after writing is noticed when the file is read.

A writer puts PLACEHOLDER where the file format has room for text that other programs ignore: into
the first field of a JSON text (also of one in the header of a safetensors file or pickle), the
comment at the end of a zip, or the key-value metadata in the footer of a parquet file.
`insert_digest` then replaces it by the digest of all other bytes of the file.

The digest is a CRC-32, because a large checkpoint is written often: it notices every change of up
to 32 adjacent bits, and overlooks one of 4 billion other damages. It is no protection against
somebody who changes a file on purpose.
"""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path
from typing import BinaryIO

from qtorch.core.errors import DataError

_NAME, _NUM_DIGITS = b"qtorch-crc32-", 8
_LENGTH = len(_NAME) + _NUM_DIGITS
PLACEHOLDER = _NAME.decode() + "0" * _NUM_DIGITS
_HEAD_LENGTH = 512
_CHUNK_LENGTH = 1 << 20


def insert_digest(file: BinaryIO) -> None:
    """Replace the placeholder in a file, opened for reading and writing, by the file's digest."""
    position = _find_digest(file)
    assert position is not None, "the writer has put a placeholder into the file"
    digest = _compute_digest(file, position)
    file.seek(position)
    file.write(digest)


def check_digest(content: Path | bytes) -> bool:
    """Check a file, or the bytes of one; return False if it has no digest.

    Raises DataError if it has one, but of other bytes.
    """
    with _open(content) as file:
        position = _find_digest(file)
        if position is None:
            return False
        file.seek(position)
        if file.read(_LENGTH) != _compute_digest(file, position):
            raise DataError(
                "the bytes do not match the digest that was stored with them: the file was damaged "
                "or edited after it was written. Restore it from a copy, or create it again."
            )
    return True


def has_digest(content: Path | bytes) -> bool:
    """Whether a file, or the bytes of one, has a digest, which is not checked here."""
    with _open(content) as file:
        return _find_digest(file) is not None


def _open(content: Path | bytes) -> BinaryIO:
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")


def _find_digest(file: BinaryIO) -> int | None:
    """Return the position of the digest, or of the placeholder.

    The user's data may contain another one, but not in front of the first field of a JSON text, in
    the comment of a zip, or behind the metadata of a parquet file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    magic = file.read(4)
    start, length = 0, _HEAD_LENGTH
    if magic == b"PK\x03\x04":
        start, length = size - _LENGTH, _LENGTH
    elif magic == b"PAR1":
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
        start = size - 8 - length
    start = max(0, start)
    file.seek(start)
    block = file.read(length)
    position = block.rfind(_NAME) if start else block.find(_NAME)
    return None if position < 0 or start + position + _LENGTH > size else start + position


def _compute_digest(file: BinaryIO, position: int) -> bytes:
    """Return the digest of all bytes but the digest's own."""
    digest = 0
    size = file.seek(0, os.SEEK_END)
    for start, end in ((0, position), (position + _LENGTH, size)):
        file.seek(start)
        while chunk := file.read(min(_CHUNK_LENGTH, end - file.tell())):
            digest = zlib.crc32(chunk, digest)
    return _NAME + f"{digest:0{_NUM_DIGITS}x}".encode()
