"""The user's own code behind a task: which source files it is, and a digest of each."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import qtorch
from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError

DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
INSTALLED = {"site-packages", "dist-packages"}
NOT_OURS = tuple(  # the standard library, and qtorch, which has a commit or a version
    Path(p).resolve() for p in (sysconfig.get_path("stdlib"), Path(qtorch.__file__).parent)
)


def source_digests(task: Mapping[str, Any]) -> dict[str, str | None]:
    """`{module: digest of its file}` of what a task names and that imports, neither of qtorch nor
    installed. None where there is no file to read (a notebook's own classes).

    Files are read as they are now, before they are imported where that is still to come: of a
    module that was edited since its import, the edited file. Nothing is imported here.
    """
    found: dict[str, str | None] = {}
    waiting = list(_named(task))
    done = set()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        for module, path in _files(name):
            if module in found:
                continue
            text = _text(path)
            found[module] = None if text is None else hashlib.sha256(text).hexdigest()[:12]
            if path is not None and text is not None:
                waiting += _imported(text, module, package=path.stem == "__init__")
    return dict(sorted(found.items()))


def _named(part: Any) -> Iterator[str]:
    """Whatever in a task may be the name of a module or of something in one."""
    if isinstance(part, Configured):
        yield type(part).__module__
        try:
            part = part.to_config()
        except ConfigError:
            return
    if isinstance(part, Mapping):
        module = part.get("module_path")
        if isinstance(module, str):
            yield module
        for value in part.values():
            yield from _named(value)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from _named(value)
    elif isinstance(part, str):
        if DOTTED.fullmatch(part):
            yield part
    else:
        yield getattr(part, "__module__", None) or type(part).__module__


def _files(name: str) -> Iterator[tuple[str, Path | None]]:
    """The modules of a dotted name that are the user's, packages above them too, and their files.

    A name that is none gives nothing.
    """
    if name.endswith(".py"):
        path = Path(name).expanduser()
        if path.is_file():
            yield name, path.resolve()
        return
    if name.partition(".")[0] == "__main__":
        origin = getattr(sys.modules["__main__"], "__file__", None)
        yield "__main__", None if origin is None else Path(origin).resolve()
        return
    folders: Any = None
    parts = name.split(".")
    for k in range(1, len(parts) + 1):
        module = ".".join(parts[:k])
        spec = _spec(module, folders)
        if spec is None:
            if module in sys.modules:  # made by hand
                yield module, None
            return
        if spec.has_location and spec.origin is not None:
            path = Path(spec.origin).resolve()
            if INSTALLED & set(path.parts) or any(path.is_relative_to(p) for p in NOT_OURS):
                return
            yield module, path
        folders = spec.submodule_search_locations
        if folders is None:
            return


def _spec(module: str, folders: Any) -> ModuleSpec | None:
    """Where a module lies; below a package it is looked for in its folders, without importing."""
    if module in sys.modules:
        return getattr(sys.modules[module], "__spec__", None)
    if folders is not None:
        return PathFinder.find_spec(module, folders)
    try:
        return importlib.util.find_spec(module)
    except ValueError:  # no name of a module
        return None


def _text(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError:
        return None


def _imported(text: bytes, module: str, *, package: bool) -> Iterator[str]:
    """The names that a source imports; none where it is no Python."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    home = module if package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = home.split(".")[: len(home.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
