"""The artifacts of one run, wherever its store keeps them."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qtorch.core.errors import ArgumentError, LoadObjectError, TrackingError, unknown_name
from qtorch.core.files import whole_file
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

PAUSES = (0.5, 2.0, 5.0)  # seconds between the attempts to reach a store that is away


class RunFiles:
    """Save, load and list a run's artifacts.

    Local stores are written in place, each file whole or not at all; others through MLflow's own
    repositories. Where such a store is away, the file waits in the outbox (`journal()`).
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
        self._kept: dict[str, Path] = {}  # artifacts that wait in the outbox

    @property
    def work_folder(self) -> Path:
        """A local folder of the run that persists: the run's own where the store is local."""
        if self.root is not None:
            return self.root.parent
        return cache_folder() / "runs" / self._run_id

    @property
    def checkpoint_folder(self) -> Path:
        """`checkpoints` under the artifacts of a local store, else under `work_folder`."""
        return (self.root or self.work_folder) / "checkpoints"

    def save(self, value: Any, name: str, folder: str | None) -> None:
        """Store an object under its logical name, replacing one of that name."""
        path = _checked(f"{folder}/{name}" if folder else name)
        parent = str(path.parent) if path.parent.name else None
        if self.root is not None:
            written = write_object(value, self.root / path.parent, path.name)
            for other in object_files(path.name):
                if other != written.name:
                    (written.parent / other).unlink(missing_ok=True)
            return
        with TemporaryDirectory() as scratch:
            written = write_object(value, Path(scratch), path.name)
            self._replace_others(path, written.name, parent)
            self._upload(written, parent)

    def _replace_others(self, path: PurePosixPath, kept: str, parent: str | None) -> None:
        """An object that changed its kind has another file: the old one must not be found."""
        prefix = f"{parent}/" if parent else ""
        others = {prefix + f for f in object_files(path.name)} - {prefix + kept}
        try:
            there = [p for p, _ in self._store().artifacts(self._run_id, parent)]
        except TrackingError as error:
            log.debug("cannot list the artifacts before saving %s: %s", path, error)
            return
        for other in others & set(there):
            self._store().remove(self._run_id, other)

    def put(self, local: Path, folder: str | None, *, content: bool = False) -> None:
        """Store a file or folder under its own name; with `content` what the folder holds."""
        if not local.exists():
            raise ArgumentError(f"there is no file or folder {str(local)!r} to log.")
        if folder:
            _checked(folder)
        if local.is_dir() and not content:
            folder = f"{folder}/{local.name}" if folder else local.name
        if self.root is None:
            self._upload(local, folder)
            return
        target = self.root / (folder or "")
        try:
            files = [p for p in local.rglob("*") if p.is_file()] if local.is_dir() else [local]
            for file in files:
                inside = file.relative_to(local) if local.is_dir() else Path(file.name)
                if (target / inside).resolve() == file.resolve():
                    continue  # it lies there already
                with whole_file(target / inside) as temporary:
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
                log.debug("%s is not stored yet: %s", local.name, error)
                last = error
            time.sleep(pause)
        try:
            kept = self._journal().keep_file(local, folder)
        except OSError as error:
            raise TrackingError(f"{last} The outbox takes it neither: {error}") from error
        self._kept[f"{folder}/{local.name}" if folder else local.name] = kept
        log.error("%s It is kept as %s; `qtorch tracking send` delivers it.", last, kept)

    def load(self, name: str, unpickler: Callable[..., Any] | None = None) -> Any:
        """The object of a logical name; LoadObjectError names what there is."""
        path = _checked(name)
        with TemporaryDirectory() as scratch:
            found = self._find(path, Path(scratch))
            if found is None:
                names = self.names(str(path.parent) if path.parent.name else None)
                raise LoadObjectError(
                    f"run {self._run_id}: {unknown_name('object', name, names, limit=30)}"
                )
            if found.is_dir():
                raise LoadObjectError(f"{name!r} is a folder; download_artifact fetches it.")
            if unpickler is not None and found.suffix in (".pickle", ".pkl"):
                import io

                return unpickler(io.BytesIO(pickle_body(found.read_bytes(), name))).load()
            return read_object(found, name)

    def _find(self, path: PurePosixPath, scratch: Path) -> Path | None:
        """A local file of the object: in place, kept in the outbox, or fetched to `scratch`."""
        files = [str(path.parent / f) for f in [*object_files(path.name), path.name]]
        for file in files:
            if file in self._kept:
                return self._kept[file]
            if self.root is not None and (self.root / file).exists():
                return self.root / file
        if self.root is not None:
            return None
        there = {p for p, _ in self._store().artifacts(self._run_id, _folder(path))}
        for file in files:
            if file in there:
                return Path(self._store().download(self._run_id, file, str(scratch)))
        return None

    def names(self, folder: str | None = None) -> list[str]:
        """What lies directly in a folder: objects by logical name, other files by their own."""
        if folder:
            _checked(folder)
        if self.root is not None:
            place = self.root / (folder or "")
            paths = (
                [str(p.relative_to(self.root)) for p in place.iterdir()] if place.is_dir() else []
            )
        else:
            paths = [p for p, _ in self._store().artifacts(self._run_id, folder)]
            paths += [p for p in self._kept if _folder(PurePosixPath(p)) == folder]
        shown = {p for p in paths if not PurePosixPath(p).name.startswith(".")}
        return sorted({logical_name(p) or p for p in shown})

    def fetch(self, name: str, target: str | None) -> str:
        """A local path of a file, folder or object (by its logical name); a copy in `target`."""
        path = _checked(name)
        if self.root is None:
            there = {p for p, _ in self._store().artifacts(self._run_id, _folder(path))}
            files = [str(path), *(str(path.parent / f) for f in object_files(path.name))]
            held = next((f for f in files if f in there), name)
            return self._store().download(self._run_id, held, target)
        with TemporaryDirectory() as scratch:
            found = self.root / path if (self.root / path).exists() else None
            found = found or self._find(path, Path(scratch))
        if found is None:
            names = self.names(_folder(path))
            raise LoadObjectError(f"run {self._run_id}: {unknown_name('artifact', name, names)}")
        if target is None:
            return str(found)
        copy = Path(target, path.parent, found.name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if found.is_dir():
            shutil.copytree(found, copy, dirs_exist_ok=True)
        else:
            shutil.copyfile(found, copy)
        return str(copy)


def _folder(path: PurePosixPath) -> str | None:
    return str(path.parent) if path.parent.name else None


def _checked(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts:
        raise ArgumentError(
            f"{name!r} is no name within a run: no leading '/', no '..', not empty."
        )
    return path
