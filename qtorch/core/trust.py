"""The trust rule: which classes and functions may be named by what was stored.

Text that was read from a store, a task pool or a file is `StoredText` (`as_stored_text`), and keeps
this type wherever it is passed on. `locate`, which alone turns names into objects, applies the rule
to it. Names that users write in their own code and commands are plain text and are not restricted.

Stored text may name two kinds of objects:

- classes of the kinds that form a task (a Model, a Dataset, a network, an optimizer, ...; see
  `trust_subclasses`) of qtorch, `torch.nn`, `torch.optim` and Lightning's callbacks;
- classes and functions that are defined in a package or `.py` file that the user trusts, by
  `qtorch.init(trusted=["mypackage", "path/of/my.py"])` or the environment variable QTORCH_TRUSTED.

What counts is where an object is defined, not the name by which it is found: trusting `mine` does
not trust `mine.os.system`. No package is imported to find out.

A pickle can run any code when it is loaded, whatever its names are. So `load_pickle` loads a file
only if the user trusts it.
"""

from __future__ import annotations

import inspect
import io
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Self, TypeVar

from qtorch.core.errors import DataError, TrustError
from qtorch.core.names import current_name, file_module_name, import_object, load_module
from qtorch.core.session import TRUSTED_VARIABLE, get_trusted_packages, resolve_path, trusts_pickles

# Packages that stored text may name without being trusted by the user, if the object is of one of
# the kinds below. Importing any of their modules does nothing but define names.
ALLOWED_PACKAGES = (
    *("qtorch", "torch.nn", "torch.optim"),
    *("pytorch_lightning.callbacks", "lightning.pytorch.callbacks"),
)
# Lightning's callbacks that neither write files nor call functions that they are given.
ALLOWED_CALLBACKS = frozenset(
    {
        *("DeviceStatsMonitor", "EMAWeightAveraging", "EarlyStopping"),
        "GradientAccumulationScheduler",
        *("LearningRateMonitor", "ModelSummary", "RichModelSummary", "RichProgressBar"),
        *("StochasticWeightAveraging", "TQDMProgressBar", "Timer"),
    }
)
NAME_KEYS = ("_target_", "class", "func")  # the keys of a configuration that name an object
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")

_trusted_bases: list[type] = []
C = TypeVar("C", bound=type)


class StoredText(str):
    """Text that was read from a store, a task pool or a file."""

    __slots__ = ()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self


def as_stored_text(value: Any) -> Any:
    """Return a copy of nested plain data in which all text is `StoredText`."""
    if isinstance(value, str):
        return StoredText(value)
    if isinstance(value, Mapping):
        return {as_stored_text(k): as_stored_text(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(as_stored_text(v) for v in value)
    return value


def trust_subclasses(cls: C) -> C:
    """Class decorator: stored text may name this class of qtorch and its subclasses."""
    _trusted_bases.append(cls)
    return cls


def locate(name: str, default_module: str | ModuleType | None = None) -> Any:
    """Return the object that `"a.b.C"` names, or a bare `"C"` in `default_module`.

    Raises ConfigError with the nearest valid name if there is no such object, and TrustError for
    stored text that names something which is not trusted.
    """
    if isinstance(name, StoredText) or isinstance(default_module, StoredText):
        return _locate_by_rule(name, default_module)
    return import_object(name, default_module)


def check_config_trust(config: Any) -> None:
    """Raise TrustError for the first object named by stored text in `config` that is not trusted.

    `locate` would raise the same error, but later: after data were loaded, or a network trained.
    """
    if isinstance(config, Mapping):
        module = config.get("module_path")
        for name in (config.get(key) for key in NAME_KEYS):
            # The default module of a bare name is known to the caller of `locate` only.
            if isinstance(name, StoredText) and ("." in name or module is not None):
                locate(name, module)
        for value in config.values():
            check_config_trust(value)
    elif isinstance(config, list | tuple):
        for value in config:
            check_config_trust(value)


def find_untrusted_packages(config: Any) -> list[str]:
    """Return the user's packages that a configuration names and that stored text may not name yet.

    A run with this configuration can be trained, but only be loaded by who trusts them.
    """
    packages: set[str] = set()

    def visit(part: Any, key: object = None) -> None:
        if isinstance(part, Mapping):
            for name, value in part.items():
                visit(value, name)
        elif isinstance(part, list | tuple):
            for value in part:
                visit(value)
        elif isinstance(part, str) and key in (*NAME_KEYS, "network", "loss") and "." in part:
            package = part.partition(".")[0]
            is_known = any(package == p.partition(".")[0] for p in ALLOWED_PACKAGES)
            if not is_known and not _in_packages(part, _load_trusted_packages()):
                packages.add(package)

    visit(config)
    return sorted(packages)


def load_pickle(
    source: str | Path | bytes, *, is_trusted: bool = False, title: str | None = None
) -> Any:
    """Load a pickle that the user trusts: with `is_trusted`, or all of this process's session.

    `title` names the pickle in errors; default: its path. Raises TrustError for any other pickle.
    """
    title = title or ("the bytes" if isinstance(source, bytes) else str(source))
    if not (is_trusted or trusts_pickles()):
        raise TrustError(
            f"{title}: this is a pickle, and loading a pickle runs the code that its author put "
            "into it. If you trust its author, add trusted_pickle=true to the command; in Python, "
            "call load_object(name, unpickler=pickle.Unpickler), or "
            "qtorch.init(trusted_pickle=True) before."
        )
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, ValueError) as error:
        raise DataError(f"{title} cannot be read as a pickle: {error}") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Find a class or function, also in a module from which qtorch has moved it."""
        if module.partition(".")[0] == "qtorch":
            return import_object(f"{module}.{name}")
        return super().find_class(module, name)


def _locate_by_rule(name: str, module: str | ModuleType | None) -> Any:
    """Return the object that stored text names, if it is trusted."""
    if not _DOTTED.fullmatch(name):
        raise TrustError(
            f"stored data names {str(name)!r}, which is not the name of an object: expected "
            "'package.module.Class'."
        )
    if isinstance(module, str) and module.endswith(".py") and "." not in name:
        return _check_object(f"{module}:{name}", import_object(name, _find_trusted_file(module)))
    full_name = name
    if "." not in name:
        if module is None:
            return import_object(name)  # raises an error that asks for the module
        full_name = f"{getattr(module, '__name__', module)}.{name}"
    packages = (*ALLOWED_PACKAGES, *_load_trusted_packages())
    is_private = _in_packages(full_name, ALLOWED_PACKAGES) and "._" in full_name
    if is_private or not _in_packages(full_name, packages):
        raise _trust_error(full_name, full_name)
    return _check_object(full_name, import_object(current_name(full_name)))


def _check_object(name: str, obj: Any) -> Any:
    """Return the object if stored text may name it, which depends on where it is defined."""
    module, qualified_name = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualified_name, str):
        raise _trust_error(name, f"{type(obj).__module__}.{type(obj).__qualname__}")
    if _in_packages(module, _load_trusted_packages()):
        if isinstance(obj, type) or inspect.isfunction(obj):
            return obj
        raise _trust_error(name, f"{module}.{qualified_name}")
    if _in_packages(module, ALLOWED_PACKAGES) and isinstance(obj, type):
        if issubclass(obj, _kinds_of_parts()):
            return obj
        is_callback = _in_packages(module, ALLOWED_PACKAGES[-2:])
        if is_callback and qualified_name in ALLOWED_CALLBACKS:
            return obj
    raise _trust_error(name, f"{module}.{qualified_name}")


def _trust_error(name: str, own_name: str) -> TrustError:
    package = own_name.partition(".")[0]
    reason = f"the package {package!r} is not trusted"
    if package in {p.partition(".")[0] for p in ALLOWED_PACKAGES}:
        reason = "it is not of a type that stored data may use"
    alias = "" if name == own_name else f" ({own_name})"
    return TrustError(
        f"stored data names {str(name)!r}{alias}, but {reason}. If you trust this code, call "
        f"qtorch.init(trusted=[{package!r}]) or set {TRUSTED_VARIABLE}={package} in the "
        "environment."
    )


def _find_trusted_file(module: str) -> str:
    """Return the path of a `.py` file that stored text names, as the user has written it."""
    for name in get_trusted_packages():
        if name.endswith(".py") and file_module_name(name) == file_module_name(module):
            return name
    raise TrustError(
        f"stored data names the file {str(module)!r}, which is code. If you trust it, call "
        f"qtorch.init(trusted=[{str(module)!r}])."
    )


def _load_trusted_packages() -> tuple[str, ...]:
    """Return the user's trusted packages; trusted `.py` files are loaded and named as modules."""
    names = []
    for name in get_trusted_packages():
        if name.endswith(".py") and resolve_path(name).is_file():
            load_module(name)
            names.append(file_module_name(name))
        else:
            names.append(name)
    return tuple(names)


def _in_packages(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def _kinds_of_parts() -> tuple[type, ...]:
    kinds = tuple(_trusted_bases)
    if torch := sys.modules.get("torch"):  # without torch, no object is a class of torch either
        kinds += (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
    return kinds
