"""Fixtures that notice when a hostile object runs code."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hostile_things import EVIL_MODULES, write_evil_module

from qtorch import R
from qtorch.cli.main import main

# Harmless programs that qtorch and its libraries start themselves.
KNOWN_PROGRAMS = {"git", "uname", "ldconfig"}
WRITING_MODES = set("wax+")
WRITING_EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.symlink")
RUNNING_EVENTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")


class AuditLog:
    """What Python's audit events say about code that a hostile object could run."""

    def __init__(self) -> None:
        self.is_recording = False
        self.events: list[str] = []
        sys.addaudithook(self._record)  # cannot be removed

    def _record(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.is_recording:
            return
        is_import = event == "import" and str(args[0]).partition(".")[0] in EVIL_MODULES
        is_program = event == "subprocess.Popen" and Path(str(args[0])).name not in KNOWN_PROGRAMS
        is_write = event in WRITING_EVENTS or (event == "open" and _is_writing(*args[1:3]))
        is_foreign = is_write and not isinstance(args[0], int) and _is_foreign(args[0])
        if is_import or is_program or is_foreign or event in RUNNING_EVENTS:
            self.events.append(f"{event} {args!r:.200}")


def _is_writing(mode: str | None, flags: int) -> bool:
    return bool(WRITING_MODES & set(mode or "")) or bool(flags & (os.O_WRONLY | os.O_RDWR))


def _is_foreign(path: Any) -> bool:
    """Whether a file lies outside of the folders of this test."""
    text = os.path.abspath(os.fsdecode(path))
    own_folders = (tempfile.gettempdir(), "/dev/", "/proc/")
    return "/__pycache__/" not in text and not text.startswith(own_folders)


_audit_log = AuditLog()


def forget_evil_modules() -> list[str]:
    """Remove the modules that only hostile objects name; return those that were imported."""
    names = [name for name in sys.modules if name.partition(".")[0] in EVIL_MODULES]
    for name in names:
        del sys.modules[name]
    return names


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return `watch()`: a block in which a hostile object must not run any code.

    The working folder holds a hostile module, as if the user had started in a folder of a stranger.
    """
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOSTILE_MARK", str(tmp_path / "mark"))
    write_evil_module(folder)
    monkeypatch.syspath_prepend(folder)

    @contextmanager
    def block(title: Any = "") -> Iterator[None]:
        forget_evil_modules()
        _audit_log.events.clear()
        _audit_log.is_recording = True
        try:
            yield
        finally:
            _audit_log.is_recording = False
        assert not _audit_log.events, (title, _audit_log.events)
        # There is no audit event for `importlib.import_module`.
        assert not forget_evil_modules(), f"{title} imported a module"
        assert not (tmp_path / "mark").exists(), f"{title} ran code"

    return block


@pytest.fixture(scope="session")
def folder_of_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished tiny run, and a finished sweep of one job."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("QTORCH_OUTBOX", str(folder / "outbox"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        small = ("debug=tiny", "log_level=WARNING", "model=mlp", "record=none")
        sweep = ("sweep.name=theirs", "sweep.isolate=false", "seed=1")
        with R.uri_context(f"sqlite:///{folder}/mlruns/mlflow.db"):
            assert main(["train", *small]) == 0
            assert main(["train", "-m", *small, *sweep]) == 0
    return folder


@pytest.fixture
def store(folder_of_runs: Path, tmp_path: Path, watch: Any) -> Iterator[Path]:
    """The folder with the finished runs; their artifacts are restored after the test."""
    artifacts, backup = folder_of_runs / "mlruns" / "artifacts", tmp_path / "backup"
    shutil.copytree(artifacts, backup)
    with R.uri_context(f"sqlite:///{folder_of_runs}/mlruns/mlflow.db"):
        yield folder_of_runs
    shutil.copytree(backup, artifacts, dirs_exist_ok=True)
    for path in artifacts.rglob("*"):
        if path.is_file() and not (backup / path.relative_to(artifacts)).exists():
            path.unlink()
