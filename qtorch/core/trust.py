"""What stored data may name: the rule for artifacts, pickles and tasks of a pool.

A name is allowed where its package is on the list and the thing behind it is of a kind that
belongs in a task (a network, an optimizer, a Model, a Dataset, ...). The user's packages and
`.py` files are added by `qtorch.init(trusted=["mypackage", "path/of/my.py"])` or the environment's
QTORCH_TRUSTED; in those, everything is allowed.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from qtorch.core.errors import DataError, TrustError
from qtorch.core.names import attribute, file_module_name, load_module, locate
from qtorch.core.session import TRUSTED_VARIABLE, trusted_packages

ALLOWED_PACKAGES = ("qtorch", "torch", "pytorch_lightning", "lightning")

# Plain values and the functions that rebuild them: nothing here runs what it is given.
SAFE_GLOBALS = frozenset(
    {
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
        ("copyreg", "_reconstructor"),
        ("datetime", "date"),
        ("datetime", "datetime"),
        ("datetime", "timedelta"),
        ("decimal", "Decimal"),
        ("functools", "partial"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib", "WindowsPath"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy.core.numeric", "_frombuffer"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._utils", "_rebuild_tensor_v2"),
        *(("builtins", n) for n in ("bytearray", "complex", "frozenset", "range", "set", "slice")),
        *(("builtins", n) for n in ("bool", "bytes", "dict", "float", "int", "list", "object")),
        *(("builtins", n) for n in ("str", "tuple")),
    }
)

_types: list[type] = []
C = TypeVar("C", bound=type)


def trusted_type(cls: C) -> C:
    """Class decorator: subclasses of this base may be named by stored data."""
    _types.append(cls)
    return cls


def check_trusted(name: str, thing: Any) -> None:
    """TrustError unless stored data may name `thing` (of dotted name `name`)."""
    if _in_packages(name, _trusted()):
        return
    if _in_packages(name, ALLOWED_PACKAGES) and _kind_allowed(thing):
        return
    package = name.split(".")[0]
    why = (
        "it is not of a kind that belongs in a task"
        if _in_packages(name, ALLOWED_PACKAGES)
        else f"the package {package!r} is not trusted"
    )
    raise TrustError(
        f"stored data names {name!r}, but {why}. If it is yours, say so once: "
        f"qtorch.init(trusted=[{package!r}]) or {TRUSTED_VARIABLE}={package} in the environment."
    )


def check_config(config: Any) -> None:
    """TrustError for the first name in a stored configuration that is not allowed."""
    if isinstance(config, Mapping):
        for key in ("_target_", "class", "func"):
            name = config.get(key)
            if isinstance(name, str):
                check_name(name, config.get("module_path"))
        for value in config.values():
            check_config(value)
    elif isinstance(config, list | tuple):
        for value in config:
            check_config(value)


def check_name(name: str, module: str | None = None) -> None:
    """TrustError for a name that is not allowed; nothing of an untrusted package is imported."""
    full = f"{module}.{name}" if module and "." not in name else name
    if module is not None and module.endswith(".py"):
        if not any(module == p for p in trusted_packages()):
            raise TrustError(
                f"stored data takes {name!r} from the file {module!r}, which is code. If it is "
                f"yours: qtorch.init(trusted=[{module!r}])."
            )
        return
    if _in_packages(full, (*ALLOWED_PACKAGES, *_trusted())):
        check_trusted(full, locate(full) if "." in full else None)
    elif "." in full:
        check_trusted(full, None)


def load_pickle(source: str | Path | bytes) -> Any:
    """Unpickle a file or bytes; each class or function named in it passes the trust rule."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        where = "the bytes" if isinstance(source, bytes) else str(source)
        raise DataError(f"{where} cannot be read as a pickle: {error}") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _storage_from_bytes
        if module == "torch" and name.endswith("Storage"):
            return super().find_class(module, name)
        if (module, name) not in SAFE_GLOBALS:
            full = f"{module}.{name}"
            known = _in_packages(full, (*ALLOWED_PACKAGES, *_trusted()))
            # An untrusted module is not even imported: importing runs it.
            check_trusted(full, _dig(module, name) if known else None)
        return super().find_class(module, name)


def _trusted() -> tuple[str, ...]:
    """The user's packages; his trusted `.py` files under the names of their modules, loaded."""
    names = []
    for name in trusted_packages():
        if name.endswith(".py") and Path(name).expanduser().is_file():
            load_module(name)
            names.append(file_module_name(name))
        else:
            names.append(name)
    return tuple(names)


def _dig(module: str, name: str) -> Any:
    thing: Any = load_module(module)
    for part in name.split("."):
        thing = attribute(thing, part)
    return thing


def _storage_from_bytes(data: bytes) -> Any:
    """Tensors inside a plain pickle are a torch file of their own; read as weights only."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=True)


def _in_packages(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def _kind_allowed(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, (*_types, *_torch_types()))


def _torch_types() -> tuple[type, ...]:
    torch = sys.modules.get("torch")
    if torch is None:
        return ()
    return (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
