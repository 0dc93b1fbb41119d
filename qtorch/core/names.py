"""Dotted names and the objects behind them."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from qtorch.core.errors import ConfigError, unknown_name


def dotted_name(thing: Any) -> str:
    """`package.module.Class` of a class or function; ConfigError for what has no such name."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if not module or not name or "<" in name:
        raise ConfigError(
            f"{thing!r} has no importable name; define it at the top level of a module so that a "
            "configuration can name it."
        )
    return f"{module}.{name}"


def load_module(path: str | ModuleType) -> ModuleType:
    """A module by dotted name, or by the path of a `.py` file; a module comes back unchanged."""
    if isinstance(path, ModuleType):
        return path
    if path.endswith(".py"):
        return _module_of_file(Path(path))
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path + ".").startswith(error.name + "."):
            raise  # the module is there, but something that it imports is not
        raise ConfigError(f"there is no module {path!r} ({error.name!r} was not found).") from error


def file_module_name(path: str | Path) -> str:
    """The name under which a `.py` file is loaded: of its whole path, so that two files called
    model.py stay two modules and stored objects find theirs again."""
    full = Path(path).expanduser().resolve()
    return f"{full.stem}_{hashlib.sha256(str(full).encode()).hexdigest()[:8]}"


def _module_of_file(path: Path) -> ModuleType:
    full, name = path.expanduser().resolve(), file_module_name(path)
    if not full.is_file():
        raise ConfigError(f"there is no file {str(path)!r} to take a class from.")
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, full)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{str(path)!r} cannot be read as a Python module.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def locate(name: str, default_module: str | ModuleType | None = None) -> Any:
    """The object behind `"a.b.C"`, or behind a bare `"C"` in `default_module`.

    Raises ConfigError with the nearest name of that module where it has none such.
    """
    parts = name.split(".")
    if len(parts) == 1:
        if default_module is None:
            raise ConfigError(f"{name!r} has no module: write it as 'package.module.{name}'.")
        return attribute(load_module(default_module), name)
    for k in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:k])
        try:
            found = importlib.util.find_spec(module_name) is not None
        except (ModuleNotFoundError, ValueError):
            found = False
        if found or module_name in sys.modules:
            thing: Any = load_module(module_name)
            for part in parts[k:]:
                thing = attribute(thing, part)
            return thing
    raise ConfigError(f"there is no module {parts[0]!r} (asked for {name!r}).")


def attribute(owner: Any, name: str) -> Any:
    """`getattr` whose failure is a ConfigError with the nearest name."""
    try:
        return getattr(owner, name)
    except AttributeError:
        where = getattr(owner, "__name__", repr(owner))
        public = [n for n in dir(owner) if not n.startswith("_")]
        raise ConfigError(unknown_name(f"name in {where}", name, public)) from None
