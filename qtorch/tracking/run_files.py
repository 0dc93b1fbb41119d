"""The artifacts of one run, in a local folder or in a remote store."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qtorch.core.errors import ArgumentError, LoadObjectError, TrackingError, unknown_name
from qtorch.core.files import atomic_write
from qtorch.tracking.artifacts import (
    logical_name,
    object_files,
    pickle_body,
    read_object,
    write_object,
)
from qtorch.tracking.errors import RefusedError
from qtorch.tracking.locations import cache_folder, local_folder

if TYPE_CHECKING:
    from qtorch.tracking.mlflow_store import MLflowStore
    from qtorch.tracking.outbox import Journal

log = logging.getLogger(__name__)

PAUSES = (0.5, 2.0, 5.0)  # seconds between attempts to reach an unreachable store


class RunFiles:
    """Save, load and list a run's artifacts.

    A local store is written in place, each file atomically; any other store through MLflow's own
    artifact repositories. If such a store is unreachable, the file is copied to the outbox
    (`journal()`) and sent later.
    """

    def __init__(
        self,
        store: Callable[[], MLflowStore],
        run_id: str,
        artifact_uri: str,
        journal: Callable[[], Journal],
    ) -> None:
        self._store, self._run_id, self._journal = store, run_id, journal
        self.root = local_folder(artifact_uri)
        self._outbox_copies: dict[str, Path] = {}  # copies of artifacts that are still to be sent

    @property
    def work_folder(self) -> Path:
        """A persistent local folder of the run: in a local store its own, else one in the cache."""
        if self.root is not None:
            return self.root.parent
        return cache_folder() / "runs" / self._run_id

    @property
    def checkpoint_folder(self) -> Path:
        """`checkpoints` under the artifacts of a local store, else under `work_folder`."""
        return (self.root or self.work_folder) / "checkpoints"

    def save(self, value: Any, name: str, folder: str | None) -> None:
        """Save an object under its logical name, replacing an earlier one of that name."""
        path = _validate_path(f"{folder}/{name}" if folder else name)
        parent = str(path.parent) if path.parent.name else None
        if self.root is not None:
            new_path = write_object(value, self.root / path.parent, path.name)
            for file in object_files(path.name):
                if file != new_path.name:
                    (new_path.parent / file).unlink(missing_ok=True)
            return
        with TemporaryDirectory() as scratch:
            new_path = write_object(value, Path(scratch), path.name)
            self._remove_other_files(path, new_path.name, parent)
            self._upload(new_path, parent)

    def _remove_other_files(self, path: PurePosixPath, new_file: str, parent: str | None) -> None:
        """Remove the files of an object that was saved before in another format."""
        prefix = f"{parent}/" if parent else ""
        other_files = {prefix + f for f in object_files(path.name)} - {prefix + new_file}
        try:
            stored_files = [p for p, _ in self._store().artifacts(self._run_id, parent)]
        except TrackingError as error:
            log.debug("cannot list the artifacts before saving %s: %s", path, error)
            return
        for file in other_files & set(stored_files):
            self._store().remove(self._run_id, file)

    def save_path(self, local: Path, folder: str | None, *, content: bool = False) -> None:
        """Save a file or folder under its own name; with `content` the content of the folder."""
        if not local.exists():
            raise ArgumentError(f"no file or folder {str(local)!r} to log.")
        if folder:
            _validate_path(folder)
        if local.is_dir() and not content:
            folder = f"{folder}/{local.name}" if folder else local.name
        if self.root is None:
            self._upload(local, folder)
            return
        target = self.root / (folder or "")
        try:
            files = [p for p in local.rglob("*") if p.is_file()] if local.is_dir() else [local]
            for file in files:
                relative_path = file.relative_to(local) if local.is_dir() else Path(file.name)
                if (target / relative_path).resolve() == file.resolve():
                    continue  # the file is already in place
                with atomic_write(target / relative_path) as temporary:
                    shutil.copyfile(file, temporary)
        except OSError as error:
            raise TrackingError(
                f"{local.name!r} could not be written to {target}: {error}"
            ) from error

    def _upload(self, local: Path, folder: str | None) -> None:
        for pause in (*PAUSES, None):
            try:
                self._store().upload(self._run_id, local, folder)
                return
            except RefusedError:
                raise
            except TrackingError as error:
                if pause is None:
                    break
                log.debug("the upload of %s failed: %s", local.name, error)
                last_error = error
            time.sleep(pause)
        try:
            copy = self._journal().save_file(local, folder)
        except OSError as error:
            raise TrackingError(
                f"{last_error} The copy in the outbox failed too: {error}"
            ) from error
        self._outbox_copies[f"{folder}/{local.name}" if folder else local.name] = copy
        log.error(
            "%s The artifact was saved to %s; send it with `qtorch tracking send`.",
            last_error,
            copy,
        )

    def load(self, name: str, unpickler: Callable[..., Any] | None = None) -> Any:
        """Load the object with a logical name; LoadObjectError lists the names that exist."""
        path = _validate_path(name)
        with TemporaryDirectory() as scratch:
            file = self._find(path, Path(scratch))
            if file is None:
                names = self.names(str(path.parent) if path.parent.name else None)
                raise LoadObjectError(
                    f"run {self._run_id}: {unknown_name('object', name, names, limit=30)}"
                )
            if file.is_dir():
                raise LoadObjectError(f"{name!r} is a folder; use download_artifact.")
            if unpickler is not None and file.suffix in (".pickle", ".pkl"):
                import io

                return unpickler(io.BytesIO(pickle_body(file.read_bytes(), name))).load()
            return read_object(file, name)

    def _find(self, path: PurePosixPath, scratch: Path) -> Path | None:
        """Return the object's local file: in place, in the outbox, or downloaded to `scratch`."""
        files = [str(path.parent / f) for f in [*object_files(path.name), path.name]]
        for file in files:
            if file in self._outbox_copies:
                return self._outbox_copies[file]
            if self.root is not None and (self.root / file).exists():
                return self.root / file
        if self.root is not None:
            return None
        stored_files = {p for p, _ in self._store().artifacts(self._run_id, _parent_folder(path))}
        for file in files:
            if file in stored_files:
                return Path(self._store().download(self._run_id, file, str(scratch)))
        return None

    def names(self, folder: str | None = None) -> list[str]:
        """List a folder (not recursively): objects by logical name, other files by file name."""
        if folder:
            _validate_path(folder)
        if self.root is not None:
            directory = self.root / (folder or "")
            paths = (
                [str(p.relative_to(self.root)) for p in directory.iterdir()]
                if directory.is_dir()
                else []
            )
        else:
            paths = [p for p, _ in self._store().artifacts(self._run_id, folder)]
            paths += [p for p in self._outbox_copies if _parent_folder(PurePosixPath(p)) == folder]
        visible_paths = {p for p in paths if not PurePosixPath(p).name.startswith(".")}
        return sorted({logical_name(p) or p for p in visible_paths})

    def fetch(self, name: str, target: str | None) -> str:
        """Return the local path of a file, folder or object, or of a copy of it in `target`."""
        path = _validate_path(name)
        if self.root is None:
            stored_files = {
                p for p, _ in self._store().artifacts(self._run_id, _parent_folder(path))
            }
            files = [str(path), *(str(path.parent / f) for f in object_files(path.name))]
            stored_name = next((f for f in files if f in stored_files), name)
            return self._store().download(self._run_id, stored_name, target)
        with TemporaryDirectory() as scratch:
            source = self.root / path if (self.root / path).exists() else None
            source = source or self._find(path, Path(scratch))
        if source is None:
            names = self.names(_parent_folder(path))
            raise LoadObjectError(f"run {self._run_id}: {unknown_name('artifact', name, names)}")
        if target is None:
            return str(source)
        copy = Path(target, path.parent, source.name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, copy)
        return str(copy)


def _parent_folder(path: PurePosixPath) -> str | None:
    return str(path.parent) if path.parent.name else None


def _validate_path(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts:
        raise ArgumentError(
            f"{name!r} is not a valid artifact name: it is empty, starts with '/' or contains '..'."
        )
    return path
