"""Session defaults, atomic files, devices and seeds."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import signal
import subprocess
import sys
import threading

import pytest
import torch

from qtorch.core.errors import ConfigError, FileLockError
from qtorch.core.files import atomic_write, file_lock, remove_partial_files, write_private
from qtorch.core.runtime import MALLOC_VARIABLES, progress, resolve_device, seed_everything
from qtorch.core.session import (
    FOLDER_VARIABLE,
    resolve_path,
    session,
    session_context,
    set_defaults,
)

MEMORY_PROGRAM = """
import resource
from qtorch.core.runtime import reuse_freed_memory

def count_page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        blocks = [bytearray(1 << 20), bytearray(40 << 20)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert count_page_faults() > 10_000
with reuse_freed_memory():
    count_page_faults()
    assert count_page_faults() < 100
    with reuse_freed_memory():
        pass
    assert count_page_faults() < 100
assert count_page_faults() > 10_000
"""


def test_init_changes_only_the_arguments_that_it_gets():
    set_defaults(provider_uri="~/bars", region="cn", seed=3)
    set_defaults(tracking_uri="sqlite:///x.db")
    assert session().provider_uri.endswith("/bars")
    assert "~" not in session().provider_uri
    assert (session().region, session().seed) == ("cn", 3)
    assert session().tracking_uri == "sqlite:///x.db"
    with pytest.raises(ConfigError, match=r"unknown region 'uk'\. Valid names: cn, tw, us"):
        set_defaults(region="uk")


def test_relative_paths_start_where_the_command_began(tmp_path, monkeypatch):
    """In a job whose process works in another folder, and in Python after `init`."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert resolve_path("~/x") == tmp_path / "me" / "x"
    monkeypatch.chdir(elsewhere)
    assert resolve_path("x") == elsewhere / "x"
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert resolve_path("x") == tmp_path / "x"
    monkeypatch.delenv(FOLDER_VARIABLE)
    set_defaults(provider_uri={"day": "~/bars", "1min": "minutes"}, folder=str(tmp_path))
    assert resolve_path("x") == tmp_path / "x"
    assert session().provider_uri == {
        "day": f"{tmp_path}/me/bars", "1min": f"{tmp_path}/minutes",
    }  # fmt: skip


def test_session_context_does_not_affect_other_threads():
    set_defaults(seed=1)
    seeds = []
    with session_context(seed=2, trusted=("a",)):
        thread = threading.Thread(target=lambda: seeds.append(session().seed))
        thread.start()
        thread.join()
        assert session().seed == 2
    assert seeds == [1]
    assert session().seed == 1
    with pytest.raises(ConfigError, match="Did you mean 'seed'"), session_context(sead=1):
        pass


def test_seed_everything_and_resolve_device():
    seed_everything(5)
    first = torch.rand(3)
    seed_everything(5)
    assert torch.equal(first, torch.rand(3))
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="is not a device"):
        resolve_device("gpu!")
    with pytest.raises(ConfigError, match="CUDA devices"):
        resolve_device("cuda:99")


def test_file_system_without_locks_is_reported(tmp_path, monkeypatch):
    def refuse(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "claims.lock"
    with pytest.raises(FileLockError, match=f"cannot lock {path}: .*No locks"), file_lock(path):
        pass


def test_lock_file_is_not_created_through_a_link(tmp_path):
    """In a shared folder, a link of another user must not let this one create files elsewhere."""
    (tmp_path / "claims.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileLockError, match="cannot lock"), file_lock(tmp_path / "claims.lock"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_private_file_is_readable_by_its_owner_alone(tmp_path, monkeypatch):
    change_mode, modes = os.fchmod, []

    def note_mode(handle, mode):
        modes.append(os.fstat(handle).st_mode & 0o777)
        change_mode(handle, mode)

    monkeypatch.setattr(os, "fchmod", note_mode)
    path = tmp_path / "config.yaml"
    path.write_text("a longer old text")
    path.chmod(0o644)
    for _ in range(2):
        write_private(path, "new ÄÖ")
        assert path.read_text(encoding="utf-8") == "new ÄÖ"
        assert path.stat().st_mode & 0o777 == 0o600
        path.unlink(missing_ok=True)
    assert modes == [0o644, 0o600]  # a new file is private from its beginning


def test_atomic_write_leaves_the_old_file_on_an_error(tmp_path):
    path = tmp_path / "a" / "x.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("tw")
        raise RuntimeError
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]


def test_partial_file_of_a_killed_writer_is_removed_and_of_a_running_one_stays(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("whole")
    (tmp_path / ".other.txt").write_text("")
    pid = os.fork()
    if not pid:
        with atomic_write(path) as temporary:
            temporary.write_text("ha")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    paths = set(tmp_path.iterdir())
    assert len(paths) == 3
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        remove_partial_files(tmp_path)
        assert set(tmp_path.iterdir()) == {path, tmp_path / ".other.txt", temporary}
    remove_partial_files(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.txt", "x.txt"]
    assert path.read_text() == "one"


def test_progress_yields_every_item():
    assert list(progress(range(5), "counting")) == list(range(5))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have other limits")
def test_memory_of_freed_tensors_is_used_again():
    environment = {k: v for k, v in os.environ.items() if k not in MALLOC_VARIABLES}
    subprocess.run([sys.executable, "-c", MEMORY_PROGRAM], check=True, env=environment)
