"""The trust rule: which classes and functions artifacts, pickles and pool tasks may name.

A name is allowed if its package is in ALLOWED_PACKAGES and the object is of a type that belongs in
a task (a network, an optimizer, a Model, a Dataset, ...). Users add their own packages and `.py`
files with `qtorch.init(trusted=["mypackage", "path/of/my.py"])` or the environment variable
QTORCH_TRUSTED; everything in those is allowed.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from qtorch.core.errors import DataError, TrustError
from qtorch.core.names import current_name, file_module_name, load_module, locate
from qtorch.core.session import TRUSTED_VARIABLE, get_trusted_packages

ALLOWED_PACKAGES = ("qtorch", "torch", "pytorch_lightning", "lightning")

# Plain values and the functions that rebuild them; none of these runs code from its arguments.
SAFE_GLOBALS = {
    "builtins": (
        *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list"),
        *("object", "range", "set", "slice", "str", "tuple"),
    ),
    "collections": ("OrderedDict", "defaultdict"),
    "copyreg": ("_reconstructor",),
    "datetime": ("date", "datetime", "timedelta"),
    "decimal": ("Decimal",),
    "functools": ("partial",),
    "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath"),
    "numpy": ("dtype", "ndarray"),
    # numpy 2 writes `numpy._core`, numpy 1 wrote `numpy.core`.
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.numeric": ("_frombuffer",),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy.core.numeric": ("_frombuffer",),
    "torch": ("Size", "device"),
    "torch._utils": ("_rebuild_parameter", "_rebuild_tensor_v2"),
}

_trusted_bases: list[type] = []
C = TypeVar("C", bound=type)


def trust_subclasses(cls: C) -> C:
    """Class decorator: stored data may name this class and its subclasses."""
    _trusted_bases.append(cls)
    return cls


def check_object_trust(name: str, obj: Any) -> None:
    """Raise TrustError unless stored data may name `obj`, whose import path is `name`."""
    if _in_packages(name, _load_trusted_packages()):
        return
    if _in_packages(name, ALLOWED_PACKAGES) and _is_trusted_class(obj):
        return
    package = name.split(".")[0]
    reason = f"the package {package!r} is not trusted"
    if _in_packages(name, ALLOWED_PACKAGES):
        reason = "it is not of a type that stored data may use"
    raise TrustError(
        f"stored data names {name!r}, but {reason}. If you trust this code, call "
        f"qtorch.init(trusted=[{package!r}]) or set {TRUSTED_VARIABLE}={package} in the "
        "environment."
    )


def check_config_trust(config: Any) -> None:
    """Raise TrustError for the first name in a stored configuration that is not trusted."""
    if isinstance(config, Mapping):
        for key in ("_target_", "class", "func"):
            name = config.get(key)
            if isinstance(name, str):
                check_name_trust(name, config.get("module_path"))
        for value in config.values():
            check_config_trust(value)
    elif isinstance(config, list | tuple):
        for value in config:
            check_config_trust(value)


def check_name_trust(name: str, module: str | None = None) -> None:
    """Raise TrustError for a name that is not trusted; never import an untrusted package."""
    if "." in name:  # `locate` then ignores the module
        _import_with_trust(name)
    elif module is not None and not module.endswith(".py"):
        _import_with_trust(f"{module}.{name}")
    elif module is not None and module not in get_trusted_packages():
        raise TrustError(
            f"stored data takes {name!r} from the file {module!r}, which is code. If you trust it, "
            f"call qtorch.init(trusted=[{module!r}])."
        )


def load_pickle(source: str | Path | bytes) -> Any:
    """Unpickle a file or bytes; raise TrustError for a class or function that is not trusted."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        title = "the bytes" if isinstance(source, bytes) else str(source)
        raise DataError(f"{title} cannot be read as a pickle: {error}") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _storage_from_bytes
        if module == "torch" and name.endswith("Storage"):
            return super().find_class(module, name)
        if name not in SAFE_GLOBALS.get(module, ()):
            return _import_with_trust(f"{module}.{name}")
        return super().find_class(module, name)


def _import_with_trust(name: str) -> Any:
    """Import the object of a trusted name; raise TrustError for any other name.

    An untrusted package is not even imported, because importing runs it. For a name that is
    stored in an older form the rule holds for the object that it stands for today.
    """
    if not _in_packages(name, (*ALLOWED_PACKAGES, *_load_trusted_packages())):
        check_object_trust(name, None)
    obj = locate(name)
    check_object_trust(current_name(name), obj)
    return obj


def _load_trusted_packages() -> tuple[str, ...]:
    """Return the user's trusted packages; trusted `.py` files are loaded and named as modules."""
    names = []
    for name in get_trusted_packages():
        if name.endswith(".py") and Path(name).expanduser().is_file():
            load_module(name)
            names.append(file_module_name(name))
        else:
            names.append(name)
    return tuple(names)


def _storage_from_bytes(data: bytes) -> Any:
    """Load the tensor storage that a pickle embeds as a torch file, as weights only."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=True)


def _in_packages(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def _is_trusted_class(obj: Any) -> bool:
    bases = tuple(_trusted_bases)
    if torch := sys.modules.get("torch"):  # without torch, `obj` is no class of torch either
        bases += (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
    return isinstance(obj, type) and issubclass(obj, bases)
