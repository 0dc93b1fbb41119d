"""Artifacts: Python objects as files under logical names, and the files of a run.

`write_object` and `read_object` choose the format of an object:

| object | file | loading needs trust in |
|---|---|---|
| DataFrame, Series | parquet | nothing |
| plain data (numbers, text, dates, dicts, lists, ...) | JSON | nothing |
| NumPy array, tensor, dict of tensors | safetensors | nothing |
| has `to_state` / `from_state` (Model, Dataset) | JSON; safetensors if it has tensors | its class |
| dict, list or tuple of the above | zip of the above | as for its parts |
| anything else | pickle | the file itself: `trusted_pickle` |

The logical name `pred.pkl` becomes the file `pred.pkl.parquet`, `task` becomes
`task.object.json`. The logical name can be derived from the file name, and a file that a user
logged by hand is never mistaken for an object. Each file records its format version and, from
format 2 on, a digest of its bytes (`qtorch.core.file_digest`), so that a damaged one is refused.

`RunFiles` puts these files where the run's store wants them.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qtorch.core.errors import (
    ArgumentError,
    ConfigError,
    DataError,
    LoadObjectError,
    TrackingError,
    TrustError,
    unknown_name_message,
)
from qtorch.core.file_digest import PLACEHOLDER, check_digest, has_digest, insert_digest
from qtorch.core.files import atomic_write, cache_folder
from qtorch.core.names import import_path
from qtorch.core.plain import resolve_config
from qtorch.core.secrets import complete_tree, redact_tree
from qtorch.core.serial import State, Stateful
from qtorch.core.trust import as_stored_text, load_pickle, locate
from qtorch.tracking.frames import NotTabularError, frame_header, read_frame, write_frame
from qtorch.tracking.locations import local_folder
from qtorch.tracking.lossless_json import NotPlainError, decode, encode
from qtorch.tracking.store_types import RefusedError, artifact_paths

if TYPE_CHECKING:
    from qtorch.tracking.delivery import Sender
    from qtorch.tracking.mlflow_store import MLflowStore


log = logging.getLogger(__name__)

FORMAT = 2  # format 1 has no digest
SUFFIXES = (".parquet", ".json", ".safetensors", ".zip", ".pickle")
_OBJECT_FILE = re.compile(r"^(?:(.*\.pkl)|(.*)\.object)\.(?:parquet|json|safetensors|zip|pickle)$")
_PICKLE_HEAD = b"qtorch pickle "
_KEY = "qtorch"
PAUSES = (0.5, 2.0, 5.0)  # seconds between attempts to reach an unreachable store


def logical_name(path: str) -> str | None:
    """Return the logical name of an object's file; None for any other file."""
    match = _OBJECT_FILE.match(path)
    return (match[1] or match[2]) if match else None


def object_files(name: str) -> list[str]:
    """Return every file name that an object with this logical name can have."""
    stem = name if name.endswith(".pkl") else f"{name}.object"
    return [stem + suffix for suffix in SUFFIXES]


def _file_name(name: str, suffix: str) -> str:
    """Return the file name of an object with this logical name in one format."""
    return object_files(name)[SUFFIXES.index(suffix)]


def write_object(value: Any, folder: Path, name: str) -> Path:
    """Write one object under its logical name and return the path of its file.

    The file is written atomically. Hydra's configurations are stored as dicts and lists. Raises
    TrackingError if writing fails (a full disk) or if the object cannot be stored in any format.
    """
    value = _without_configs(value)
    last_error: Exception | None = None
    for suffix, write in _writers(value):
        target = folder / _file_name(name, suffix)
        try:
            with atomic_write(target) as temporary:
                write(value, temporary)
                with temporary.open("rb+") as file:
                    insert_digest(file)
            return target
        except (NotTabularError, NotPlainError) as error:  # try the next format
            last_error = error
        except OSError as error:
            raise TrackingError(f"{name!r} could not be written to {target}: {error}") from error
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            if suffix != ".pickle":
                raise
            raise TrackingError(
                f"{name!r} ({type(value).__qualname__}) cannot be stored: {error}. Add "
                "to_state and from_state to its class, or make it picklable."
            ) from error
    raise TrackingError(f"{name!r} cannot be stored: {last_error}")


def _without_configs(value: Any) -> Any:
    """Return a value with Hydra's configurations as dicts and lists."""
    try:
        return resolve_config(value)
    except ValueError as error:  # an interpolation without a value
        log.debug("a configuration is stored as a pickle: %s", error)
        return value


def _writers(value: Any) -> list[tuple[str, Callable[[Any, Path], None]]]:
    """Return the file formats to try, in order; the first that can hold the value is used."""
    if isinstance(value, pd.DataFrame | pd.Series):
        return [(".parquet", _write_parquet), (".pickle", _write_pickle)]
    if isinstance(value, Stateful) and not isinstance(value, type):
        try:
            state = value.to_state()
            write = _state_writer(type(value), state)
        except (ConfigError, NotPlainError) as error:
            log.debug("a %s is stored as a pickle: %s", type(value).__qualname__, error)
            return [(".pickle", _write_pickle)]
        return [(".safetensors" if state.tensors else ".json", write)]
    if _is_tensors(value):
        return [(".safetensors", _write_tensors), (".pickle", _write_pickle)]
    if type(value) in (dict, list, tuple):  # a zip would lose the type of a subclass
        return [(".json", _write_json), (".zip", _write_zip), (".pickle", _write_pickle)]
    return [(".json", _write_json), (".pickle", _write_pickle)]


def read_object(path: Path, name: str) -> Any:
    """Load the object of a file; `name` is used in error messages.

    Raises LoadObjectError for a damaged file or one of a newer format, TrustError for code that
    is not trusted.
    """
    try:
        suffix = path.suffix if logical_name(path.name) else ""
        if suffix:
            check_digest(path)
        match suffix:
            case ".parquet":
                _check_format(frame_header(path)["format"], name, path)
                return read_frame(path)
            case ".json":
                return _read_json(path, name)
            case ".safetensors":
                return _read_tensors(path, name)
            case ".zip":
                return _read_zip(path, name)
        return _read_pickle(path, name)
    except (LoadObjectError, TrustError):
        raise
    except (OSError, ValueError, KeyError, TypeError, DataError, zipfile.BadZipFile) as error:
        raise LoadObjectError(f"{name!r} cannot be read from {path}: {error}") from error


def _check_format(version: Any, name: str, content: Path | bytes) -> None:
    if not isinstance(version, int) or version > FORMAT:
        raise LoadObjectError(
            f"{name!r} was stored in format {version} by a newer qtorch; this one reads formats up "
            f"to {FORMAT}. Update qtorch."
        )
    if version >= 2 and not has_digest(content):
        place = f" ({content})" if isinstance(content, Path) else ""
        raise LoadObjectError(f"the file of {name!r}{place} is damaged: its digest is missing.")


def _write_parquet(value: Any, path: Path) -> None:
    write_frame(value, path, {"format": FORMAT})


def _write_json(value: Any, path: Path) -> None:
    path.write_text(_json_text("plain", {"value": encode(value)}), encoding="utf-8")


def _json_text(kind: str, content: dict[str, Any]) -> str:
    head = {_KEY: {"format": FORMAT, "digest": PLACEHOLDER, "kind": kind}}
    return json.dumps({**head, **content}, ensure_ascii=False, indent=1, allow_nan=False)


def _read_json(path: Path, name: str) -> Any:
    document = json.loads(path.read_text(encoding="utf-8"))
    _check_format(document[_KEY]["format"], name, path)
    if document[_KEY]["kind"] == "state":
        return _rebuild(document)
    return as_stored_text(decode(document["value"]))


def _state_writer(cls: type, state: State) -> Callable[[Any, Path], None]:
    """Return a function that writes a state; raise NotPlainError if its config is not plain."""
    content = {"_target_": import_path(cls), "config": encode(redact_tree(state.config))}

    def write(_: Any, path: Path) -> None:
        text = _json_text("state", content)
        if not state.tensors:
            path.write_text(text, encoding="utf-8")
            return
        from safetensors.torch import save

        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.tensors.items()}
        path.write_bytes(save(tensors, metadata={_KEY: text}))

    return write


def _rebuild(document: dict[str, Any], tensors: dict[str, Any] | None = None) -> Any:
    target = as_stored_text(document["_target_"])
    cls = locate(target)
    if not isinstance(cls, type) or not hasattr(cls, "from_state"):
        raise LoadObjectError(
            f"{target} is not a class with from_state; was it stored by another version?"
        )
    config = as_stored_text(complete_tree(decode(document["config"])))
    return cls.from_state(State(config, tensors or {}))


def _is_tensors(value: Any) -> bool:
    """Whether the value is an array or tensor, or a dict of them by name."""
    if type(value) is dict and value:
        return all(isinstance(k, str) and _is_tensor(v) for k, v in value.items())
    return _is_tensor(value)


def _is_tensor(value: Any) -> bool:
    # Compare the name of the type: storing an object that is no tensor must not import torch.
    is_torch = type(value).__module__ == "torch" and type(value).__name__ == "Tensor"
    return is_torch or isinstance(value, np.ndarray)


def _write_tensors(value: Any, path: Path) -> None:
    """Write one array or tensor or a dict of them, with what is needed to restore their types."""
    from safetensors.torch import save

    value_by_name = value if isinstance(value, dict) else {"": value}
    arrays = [k for k, v in value_by_name.items() if isinstance(v, np.ndarray)]
    content = {
        "single": not isinstance(value, dict),
        "arrays": arrays,
        "names": list(value_by_name),
    }
    tensors = {str(i): _as_tensor(v) for i, v in enumerate(value_by_name.values())}
    path.write_bytes(save(tensors, metadata={_KEY: _json_text("tensors", content)}))


def _as_tensor(value: Any) -> Any:
    import torch

    if not isinstance(value, np.ndarray):
        if value.layout != torch.strided or value.requires_grad:
            raise NotPlainError("a sparse tensor or one that requires grad")
        return value.cpu().contiguous().clone()
    try:
        return torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape).copy())
    except TypeError as error:
        raise NotPlainError(f"an array of {value.dtype}") from error


def _read_tensors(path: Path, name: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            document = json.loads((file.metadata() or {})[_KEY])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise LoadObjectError(f"{name!r} cannot be read from {path}: {error}") from error
    _check_format(document[_KEY]["format"], name, path)
    if document[_KEY]["kind"] == "state":
        return _rebuild(document, tensors)
    values = {n: tensors[str(i)] for i, n in enumerate(document["names"])}
    values = {n: v.numpy() if n in document["arrays"] else v for n, v in values.items()}
    return values[""] if document["single"] else values


def _write_zip(value: Any, path: Path) -> None:
    """Write a container as a zip: its structure as JSON, each contained object as its own file."""
    files: list[Path] = []
    with TemporaryDirectory() as scratch:

        def tree(part: Any) -> Any:
            if type(part) is dict:
                return {"dict": [[encode(k), tree(v)] for k, v in part.items()]}
            if type(part) in (list, tuple):
                return {type(part).__name__: [tree(v) for v in part]}
            files.append(write_object(part, Path(scratch), f"{len(files)}.pkl"))
            return {"file": files[-1].name}

        text = _json_text("tree", {"tree": tree(value)})
        if any(file.suffix == ".pickle" for file in files):  # then one pickle of the whole is safer
            raise NotPlainError("a part of it can only be pickled")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("tree.json", text)
            for file in files:
                archive.write(file, file.name)
            archive.comment = PLACEHOLDER.encode()


def _read_zip(path: Path, name: str) -> Any:
    with zipfile.ZipFile(path) as archive, TemporaryDirectory() as scratch:
        document = json.loads(archive.read("tree.json"))
        _check_format(document[_KEY]["format"], name, path)

        def value(tree: Any) -> Any:
            ((kind, parts),) = tree.items()
            if kind == "dict":
                return {decode(k): value(v) for k, v in parts}
            if kind == "file":
                return read_object(Path(archive.extract(parts, scratch)), name)
            return [value(v) for v in parts] if kind == "list" else tuple(map(value, parts))

        return value(document["tree"])


def _write_pickle(value: Any, path: Path) -> None:
    body = io.BytesIO()
    pickle.dump(value, body)
    path.write_bytes(_PICKLE_HEAD + f"{FORMAT} {PLACEHOLDER}\n".encode() + body.getvalue())


def pickle_body(data: bytes, name: str) -> bytes:
    """Return the pickle inside a file written by qtorch, or the bytes of a plain pickle file."""
    try:
        check_digest(data)
    except DataError as error:
        raise LoadObjectError(f"{name!r} cannot be read: {error}") from error
    if not data.startswith(_PICKLE_HEAD):
        return data
    head, _, body = data[len(_PICKLE_HEAD) :].partition(b"\n")
    _check_format(int(head.split()[0]), name, data)
    return body


def _read_pickle(path: Path, name: str) -> Any:
    return load_pickle(pickle_body(path.read_bytes(), name), title=f"{name!r} ({path.name})")


class RunFiles:
    """Save, load and list a run's artifacts.

    A local store is written in place, each file atomically; any other store through MLflow's own
    artifact repositories. If such a store is unreachable, the file is copied to the outbox and sent
    later, by the sender that `open_sender` yields.
    """

    def __init__(
        self,
        store: Callable[[], MLflowStore],
        run_id: str,
        artifact_uri: str,
        open_sender: Callable[[], AbstractContextManager[Sender]],
    ) -> None:
        self._store, self._run_id, self._open_sender = store, run_id, open_sender
        self.root = local_folder(artifact_uri)
        self._outbox_copies: dict[str, Path] = {}  # copies of artifacts that are still to be sent

    @property
    def work_folder(self) -> Path:
        """A persistent local folder of the run: in a local store its own, else one in the cache."""
        if self.root is not None:
            return self.root.parent
        return cache_folder() / "runs" / self._run_id

    @property
    def log_folder(self) -> Path:
        """The folder in which the run's log is written: the artifacts of a local store."""
        return self.root or self.work_folder

    @property
    def checkpoint_folder(self) -> Path:
        """`checkpoints` under the artifacts of a local store, else under `work_folder`."""
        return (self.root or self.work_folder) / "checkpoints"

    def save(self, value: Any, name: str, folder: str | None) -> None:
        """Save an object under its logical name, replacing an earlier one of that name."""
        path = _validate_path(f"{folder}/{name}" if folder else name)
        if self.root is not None:
            new_path = write_object(value, self.root / path.parent, path.name)
            for file in object_files(path.name):
                if file != new_path.name:
                    (new_path.parent / file).unlink(missing_ok=True)
            return
        with TemporaryDirectory() as scratch:
            new_path = write_object(value, Path(scratch), path.name)
            # A load must not find the object in two formats.
            formats = [str(path.parent / f) for f in object_files(path.name) if f != new_path.name]
            self._upload(new_path, _parent_folder(path), replaces=formats)

    def _sibling_files(self, path: PurePosixPath) -> set[str]:
        """Return the paths of the stored artifacts in the folder of `path`."""
        return {p for p, _ in self._store().artifacts(self._run_id, _parent_folder(path))}

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
            for file in _list_files(local):
                relative_path = file.relative_to(local) if local.is_dir() else Path(file.name)
                if (target / relative_path).resolve() == file.resolve():
                    continue  # the file is already in place
                with atomic_write(target / relative_path) as temporary:
                    shutil.copyfile(file, temporary)
        except OSError as error:
            raise TrackingError(
                f"{local.name!r} could not be written to {target}: {error}"
            ) from error

    def _upload(self, local: Path, folder: str | None, replaces: Sequence[str] = ()) -> None:
        """Upload a file, or the content of a folder; copy it to the outbox if that fails.

        It replaces the artifacts `replaces` of the same folder.
        """
        with self._open_sender() as sender:
            reason: object = "Earlier artifacts are still to be sent."
            if not sender.has_files:  # these must not arrive after this one
                reason = self._try_upload(local, folder, replaces)
                if reason is None:
                    for name in artifact_paths(local, folder):
                        self._outbox_copies.pop(name, None)
                    return
            try:
                copy = sender.enqueue_file(local, folder, replaces)
            except OSError as error:
                raise TrackingError(
                    f"{reason} The copy of {local.name!r} in the outbox failed too: {error}"
                ) from error
        self._outbox_copies.update(artifact_paths(copy, folder))
        log.warning(
            "%s The artifact was saved to %s and is sent as soon as the store answers.",
            reason,
            copy,
        )

    def _try_upload(
        self, local: Path, folder: str | None, replaces: Sequence[str]
    ) -> TrackingError | None:
        """Upload a file or folder; return the error if the store is unreachable."""
        last_error: TrackingError | None = None
        for pause in (0.0, *PAUSES):
            time.sleep(pause)
            try:
                self._store().upload(self._run_id, local, folder, replaces)
                return None
            except RefusedError:
                raise
            except TrackingError as error:
                log.debug("the upload of %s failed: %s", local.name, error)
                last_error = error
        return last_error

    def load(self, name: str, unpickler: Callable[..., Any] | None = None) -> Any:
        """Load the object with a logical name; LoadObjectError lists the names that exist."""
        path = _validate_path(name)
        with TemporaryDirectory() as scratch:
            file = self._find(path, Path(scratch))
            if file is None:
                names = self.names(_parent_folder(path))
                raise LoadObjectError(
                    f"run {self._run_id}: {unknown_name_message('object', name, names, limit=30)}"
                )
            if file.is_dir():
                raise LoadObjectError(f"{name!r} is a folder; use download_artifact.")
            if unpickler is not None and file.suffix in (".pickle", ".pkl"):
                return unpickler(io.BytesIO(pickle_body(file.read_bytes(), name))).load()
            return read_object(file, name)

    def _find(self, path: PurePosixPath, scratch: Path) -> Path | None:
        """Return the object's local file: in place, in the outbox, or downloaded to `scratch`."""
        files = [str(path.parent / f) for f in [*object_files(path.name), path.name]]
        local_file = self._find_local(files)
        if local_file is not None or self.root is not None:
            return local_file
        stored_files = self._sibling_files(path)
        for file in files:
            if file in stored_files:
                return Path(self._store().download(self._run_id, file, str(scratch)))
        return None

    def _find_local(self, files: list[str]) -> Path | None:
        """Return the first of these artifacts that is in the outbox or in a local store."""
        for file in files:
            copy = self._outbox_copies.get(file)
            if copy is not None and copy.exists():
                return copy
            if self.root is not None and (self.root / file).exists():
                return self.root / file
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
        files = [str(path), *(str(path.parent / f) for f in object_files(path.name))]
        source = self._find_local(files)
        if source is None and self.root is None:
            stored_files = self._sibling_files(path)
            stored_name = next((f for f in files if f in stored_files), name)
            return self._store().download(self._run_id, stored_name, target)
        if source is None:
            names = self.names(_parent_folder(path))
            raise LoadObjectError(
                f"run {self._run_id}: {unknown_name_message('artifact', name, names)}"
            )
        if target is None:
            return str(source)
        copy = Path(target, path.parent, source.name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, copy)
        return str(copy)


def _list_files(path: Path) -> list[Path]:
    """Return the files in a folder and its subfolders, or the path itself if it is a file."""
    return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]


def _parent_folder(path: PurePosixPath) -> str | None:
    return str(path.parent) if path.parent.name else None


def _validate_path(name: str) -> PurePosixPath:
    """Return the path of an artifact inside its run; ArgumentError if it would lie outside."""
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts:
        raise ArgumentError(
            f"{name!r} is not a valid artifact name: it is empty, starts with '/' or contains '..'."
        )
    return path
