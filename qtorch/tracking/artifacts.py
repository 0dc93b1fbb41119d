"""Objects of a run as files, by logical name, and back.

| object | file | reading needs trust |
|---|---|---|
| DataFrame, Series | parquet | no |
| plain data (numbers, text, dates, dicts, lists, ...) | JSON | no |
| numpy array, tensor, dict of tensors | safetensors | no |
| has `to_state` / `from_state` (Model, Dataset) | JSON, with tensors safetensors | its class |
| dict, list or tuple of the above | zip of the above | as its parts |
| anything else | pickle | each class and function in it |

The logical name `pred.pkl` becomes the file `pred.pkl.parquet`, `task` becomes
`task.object.json`: the logical name can be read off the file's name, and a file that a user
logged by hand is never taken for an object. Each file says which format version wrote it.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

from qtorch.core.errors import ConfigError, DataError, LoadObjectError, TrackingError, TrustError
from qtorch.core.files import whole_file
from qtorch.core.names import dotted_name, locate
from qtorch.core.serial import State, Stateful
from qtorch.core.trust import check_name, check_trusted, load_pickle
from qtorch.tracking.frames import NotTabularError, frame_header, read_frame, write_frame
from qtorch.tracking.plain import NotPlainError, decode, encode

log = logging.getLogger(__name__)

FORMAT = 1
SUFFIXES = (".parquet", ".json", ".safetensors", ".zip", ".pickle")
_OBJECT_FILE = re.compile(r"^(?:(.*\.pkl)|(.*)\.object)\.(?:parquet|json|safetensors|zip|pickle)$")
_PICKLE_HEAD = b"qtorch pickle "
_KEY = "qtorch"


def logical_name(path: str) -> str | None:
    """The logical name of an object's file; None for any other file."""
    match = _OBJECT_FILE.match(path)
    return (match[1] or match[2]) if match else None


def object_files(name: str) -> list[str]:
    """Every file name that an object of this logical name can have."""
    stem = name if name.endswith(".pkl") else f"{name}.object"
    return [stem + suffix for suffix in SUFFIXES]


def write_object(value: Any, folder: Path, name: str) -> Path:
    """Write one object under its logical name; the path of its file, which is there whole or not.

    Raises TrackingError where the disk takes no more or the object cannot be stored at all.
    """
    last: Exception | None = None
    for suffix, write in _writers(value):
        target = folder / (name + suffix if name.endswith(".pkl") else f"{name}.object{suffix}")
        try:
            with whole_file(target) as temporary:
                write(value, temporary)
            return target
        except (NotTabularError, NotPlainError) as error:
            last = error
        except OSError as error:
            raise TrackingError(f"{name!r} could not be written to {target}: {error}") from error
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            if suffix != ".pickle":
                raise
            raise TrackingError(
                f"{name!r} ({type(value).__qualname__}) cannot be stored: {error}. Give its class "
                "to_state and from_state, or make it picklable."
            ) from error
    raise TrackingError(f"{name!r} cannot be stored: {last}")


def _writers(value: Any) -> list[tuple[str, Callable[[Any, Path], None]]]:
    """The formats to try, the first that can hold the value wins."""
    if isinstance(value, pd.DataFrame | pd.Series):
        return [(".parquet", _write_parquet), (".pickle", _write_pickle)]
    if isinstance(value, Stateful) and not isinstance(value, type):
        try:
            state = value.to_state()
            write = _write_state(type(value), state)
        except (ConfigError, NotPlainError) as error:
            log.debug("a %s is pickled: %s", type(value).__qualname__, error)
            return [(".pickle", _write_pickle)]
        return [(".safetensors" if state.tensors else ".json", write)]
    if _is_tensors(value):
        return [(".safetensors", _write_tensors), (".pickle", _write_pickle)]
    if isinstance(value, dict | list | tuple):
        return [(".json", _write_json), (".zip", _write_zip), (".pickle", _write_pickle)]
    return [(".json", _write_json), (".pickle", _write_pickle)]


def read_object(path: Path, name: str) -> Any:
    """The object of a file; `name` is for the messages.

    Raises LoadObjectError for a file of a newer format or one that is damaged, TrustError for
    code that is not trusted.
    """
    try:
        match path.suffix if logical_name(path.name) else "":
            case ".parquet":
                _check_format((frame_header(path) or {}).get("format", FORMAT), name)
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


def _check_format(version: Any, name: str) -> None:
    if not isinstance(version, int) or version > FORMAT:
        raise LoadObjectError(
            f"{name!r} was stored in format {version} by a newer qtorch; this one reads up to "
            f"{FORMAT}. Update qtorch."
        )


def _write_parquet(value: Any, path: Path) -> None:
    write_frame(value, path, {"format": FORMAT})


def _write_json(value: Any, path: Path) -> None:
    path.write_text(_json_text("plain", {"value": encode(value)}), encoding="utf-8")


def _json_text(kind: str, content: dict[str, Any]) -> str:
    head = {_KEY: {"format": FORMAT, "kind": kind}}
    return json.dumps({**head, **content}, ensure_ascii=False, indent=1, allow_nan=False)


def _read_json(path: Path, name: str) -> Any:
    held = json.loads(path.read_text(encoding="utf-8"))
    _check_format(held[_KEY]["format"], name)
    if held[_KEY]["kind"] == "state":
        return _rebuild(held["_target_"], State(decode(held["config"])))
    return decode(held["value"])


def _write_state(cls: type, state: State) -> Callable[[Any, Path], None]:
    content = {"_target_": dotted_name(cls), "config": encode(state.config)}

    def write(_: Any, path: Path) -> None:
        text = _json_text("state", content)
        if not state.tensors:
            path.write_text(text, encoding="utf-8")
            return
        from safetensors.torch import save

        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.tensors.items()}
        path.write_bytes(save(tensors, metadata={_KEY: text}))

    return write


def _rebuild(target: str, state: State) -> Any:
    check_name(target)
    cls = locate(target)
    check_trusted(target, cls)
    if not isinstance(cls, type) or not hasattr(cls, "from_state"):
        raise LoadObjectError(f"{target} is no class with from_state; is it another version?")
    return cls.from_state(state)


def _is_tensors(value: Any) -> bool:
    values = list(value.values()) if type(value) is dict and value else [value]
    if type(value) is dict and not all(isinstance(k, str) for k in value):
        return False
    return all(_is_tensor(v) or isinstance(v, np.ndarray) for v in values)


def _is_tensor(value: Any) -> bool:
    return type(value).__module__ == "torch" and type(value).__name__ == "Tensor"


def _write_tensors(value: Any, path: Path) -> None:
    """Arrays and tensors, one or a dict; each comes back as what it was."""
    from safetensors.torch import save

    named = value if isinstance(value, dict) else {"": value}
    arrays = [k for k, v in named.items() if isinstance(v, np.ndarray)]
    content = {"single": not isinstance(value, dict), "arrays": arrays, "names": list(named)}
    held = {str(i): _as_tensor(v) for i, v in enumerate(named.values())}
    path.write_bytes(save(held, metadata={_KEY: _json_text("tensors", content)}))


def _as_tensor(value: Any) -> Any:
    import torch

    if not isinstance(value, np.ndarray):
        if value.layout != torch.strided or value.requires_grad:
            raise NotTabularError("a sparse tensor or one of a graph")
        return value.cpu().contiguous().clone()
    try:
        return torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape).copy())
    except TypeError as error:
        raise NotTabularError(f"an array of {value.dtype}") from error


def _read_tensors(path: Path, name: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            held = json.loads((file.metadata() or {})[_KEY])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise LoadObjectError(f"{name!r} cannot be read from {path}: {error}") from error
    _check_format(held[_KEY]["format"], name)
    if held[_KEY]["kind"] == "state":
        return _rebuild(held["_target_"], State(decode(held["config"]), tensors))
    named = {n: tensors[str(i)] for i, n in enumerate(held["names"])}
    named = {n: v.numpy() if n in held["arrays"] else v for n, v in named.items()}
    return named[""] if held["single"] else named


def _write_zip(value: Any, path: Path) -> None:
    """A container whose leaves are objects: the tree as JSON, each object as its own file."""
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
        if any(file.suffix == ".pickle" for file in files):
            raise NotPlainError("a part of it is neither data nor stateful")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("tree.json", text)
            for file in files:
                archive.write(file, file.name)


def _read_zip(path: Path, name: str) -> Any:
    with zipfile.ZipFile(path) as archive, TemporaryDirectory() as scratch:
        held = json.loads(archive.read("tree.json"))
        _check_format(held[_KEY]["format"], name)

        def value(tree: Any) -> Any:
            ((kind, parts),) = tree.items()
            if kind == "dict":
                return {decode(k): value(v) for k, v in parts}
            if kind == "file":
                return read_object(Path(archive.extract(parts, scratch)), name)
            return [value(v) for v in parts] if kind == "list" else tuple(map(value, parts))

        return value(held["tree"])


def _write_pickle(value: Any, path: Path) -> None:
    body = io.BytesIO()
    pickle.dump(value, body)
    path.write_bytes(_PICKLE_HEAD + f"{FORMAT}\n".encode() + body.getvalue())


def pickle_body(data: bytes, name: str) -> bytes:
    """The pickle within a file of ours, or the bytes of a bare pickle."""
    if data.startswith(_PICKLE_HEAD):
        head, _, data = data[len(_PICKLE_HEAD) :].partition(b"\n")
        _check_format(int(head), name)
    return data


def _read_pickle(path: Path, name: str) -> Any:
    return load_pickle(pickle_body(path.read_bytes(), name))
