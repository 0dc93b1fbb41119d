"""Import paths such as `package.module.Class`, and the objects that they name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from qtorch.core.errors import ConfigError, unknown_name_message
from qtorch.core.session import resolve_path


def import_path(obj: Any) -> str:
    """Return the import path of a class or function; raise ConfigError if it has none.

    For qtorch's own objects it is the public name, such as `qtorch.data.TSDatasetH`, if there is
    one: stored names then survive a reorganization of the modules.
    """
    module, name = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    if not module or not name or "<" in name:
        raise ConfigError(
            f"{obj!r} cannot be imported by name; define it at the top level of a module so that "
            "a configuration can name it."
        )
    for package in _parent_packages(module):
        if name in getattr(package, "__all__", ()) and getattr(package, name) is obj:
            return f"{package.__name__}.{name}"
    return f"{module}.{name}"


def current_name(name: str) -> str:
    """Return the public name of an object that an older qtorch stored under a module's name.

    `qtorch.<package>.<any module>.<Name>` becomes `qtorch.<package>.<Name>` if the module is gone,
    or no longer defines the object, and the package exports that name. All other names are
    returned unchanged, also those that do not exist.
    """
    module, _, attribute = name.rpartition(".")
    packages = list(_parent_packages(module))
    if not packages:
        return name
    try:
        _import_by_path(name)
    except ConfigError:
        for package in packages:
            if attribute in getattr(package, "__all__", ()):
                return f"{package.__name__}.{attribute}"
    return name


def _parent_packages(module: str) -> Iterator[ModuleType]:
    """Yield the existing packages of qtorch that contain a module, the outermost first."""
    top, *parts = module.split(".")
    if top != "qtorch":
        return
    for k in range(1, len(parts) + 1):
        name = ".".join((top, *parts[:k]))
        try:
            package = importlib.import_module(name)
        except ModuleNotFoundError:
            return
        if hasattr(package, "__path__"):
            yield package


def load_module(path: str | ModuleType) -> ModuleType:
    """Import a module by name or by the path of a `.py` file; a module is returned unchanged.

    Raises ConfigError if there is no such module, or if it imports Qlib, which is not installed.
    """
    if isinstance(path, ModuleType):
        return path
    try:
        if path.endswith(".py"):
            return _module_of_file(Path(path))
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if missing.partition(".")[0] == "qlib" != path.partition(".")[0]:
            raise ConfigError(
                f"the module {path!r} imports {missing!r}, but Qlib is not installed. If its names "
                "are to be qtorch's classes, write at the top of the module: import "
                "qtorch.compat.qlib as names; names.install()."
            ) from error
        if error.name is None or not (path + ".").startswith(error.name + "."):
            raise  # the module exists, but one of its imports does not
        raise ConfigError(f"no module named {path!r} ({error.name!r} was not found).") from error


def file_module_name(path: str | Path) -> str:
    """Return the module name under which a `.py` file is loaded.

    It contains a hash of the full path: two files called model.py are two modules, and stored
    objects find their module again.
    """
    full = resolve_path(path).resolve()
    return f"{full.stem}_{hashlib.sha256(str(full).encode()).hexdigest()[:8]}"


def _module_of_file(path: Path) -> ModuleType:
    full, name = resolve_path(path).resolve(), file_module_name(path)
    if not full.is_file():
        raise ConfigError(f"cannot load a module from {str(path)!r}: no such file.")
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, full)
    if spec is None or spec.loader is None:
        raise ConfigError(f"cannot load {str(path)!r} as a Python module.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def import_object(name: str, default_module: str | ModuleType | None = None) -> Any:
    """Import the object that `"a.b.C"` names, or a bare `"C"` in `default_module`.

    Raises ConfigError with the nearest valid name if the module has no such attribute. The callers
    use `qtorch.core.trust.locate`, which does the same but restricts what stored text may name.
    """
    if "." in name:
        return _import_by_path(current_name(name))
    if default_module is None:
        raise ConfigError(f"{name!r} does not name a module; write it as 'package.module.{name}'.")
    if isinstance(default_module, str) and not default_module.endswith(".py"):
        return _import_by_path(current_name(f"{default_module}.{name}"))
    return get_attribute(load_module(default_module), name)


def _import_by_path(name: str) -> Any:
    parts = name.split(".")
    for k in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:k])
        try:
            is_module = importlib.util.find_spec(module_name) is not None
        except (ModuleNotFoundError, ValueError):
            is_module = False
        if is_module or module_name in sys.modules:
            obj: Any = load_module(module_name)
            for part in parts[k:]:
                obj = get_attribute(obj, part)
            return obj
    raise ConfigError(
        f"cannot import {name!r}: no module named {parts[0]!r} on Python's path (for commands, the "
        "working folder and the installed packages)."
    )


def get_attribute(owner: Any, name: str) -> Any:
    """Return an attribute, or raise ConfigError with the nearest valid name."""
    try:
        return getattr(owner, name)
    except AttributeError:
        title = getattr(owner, "__name__", repr(owner))
        public = [n for n in dir(owner) if not n.startswith("_")]
        raise ConfigError(unknown_name_message(f"name in {title}", name, public)) from None
