"""Digests of files notice every change, and an unchanged file is read only once."""

from __future__ import annotations

import os

import pytest

from qtorch.core import content_digest
from qtorch.core.content_digest import file_digest


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(content_digest, "FRESH_SECONDS", -1.0)  # as if written long ago
    path = tmp_path / "bars.bin"
    path.write_bytes(b"one day")
    return path


def test_unchanged_file_is_read_once(path, monkeypatch):
    first = file_digest(path)
    monkeypatch.setattr("builtins.open", None)  # reading would fail
    assert file_digest(path) == file_digest(str(path)) == first


def test_change_in_place_with_the_same_size_and_time_is_noticed(path):
    first, stat = file_digest(path), path.stat()
    path.write_bytes(b"a night")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert file_digest(path) != first


def test_replacement_with_the_same_size_and_time_is_noticed(path, tmp_path):
    first, stat = file_digest(path), path.stat()
    (tmp_path / "new").write_bytes(b"a night")
    os.utime(tmp_path / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(tmp_path / "new", path)
    assert file_digest(path) != first


def test_fresh_file_is_read_again(path, monkeypatch):
    """A second change within the resolution of the file system's clock has no new time stamp."""
    monkeypatch.setattr(content_digest, "FRESH_SECONDS", 60.0)
    signature = content_digest._read_signature(path)
    first = file_digest(path)
    path.write_bytes(b"a night")
    monkeypatch.setattr(content_digest, "_read_signature", lambda _: signature)
    assert file_digest(path) != first
