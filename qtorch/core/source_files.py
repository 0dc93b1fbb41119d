"""Digests of source files: those of the user's modules, and those of qtorch itself.

Files are read, and modules are found, without importing anything.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from qtorch.core.session import resolve_path

PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
INSTALLED_FOLDERS = {"site-packages", "dist-packages"}
EXCLUDED_FOLDERS = (Path(sysconfig.get_path("stdlib")).resolve(), PACKAGE_FOLDER)


@cache
def package_digest(part: str = "") -> str:
    """Return a hash of the source files of qtorch, or of one of its folders such as `data`.

    It is computed once, because a process keeps the code of its start.
    """
    folder = PACKAGE_FOLDER / part
    hasher = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        hasher.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        hasher.update(hashlib.sha256(path.read_bytes()).digest())
    return hasher.hexdigest()[:32]


def source_digests(names: Iterable[str]) -> dict[str, str | None]:
    """Map each user module that a name refers to, directly or by imports, to its file's digest.

    A name is that of a module or of an object in a module, or the path of a `.py` file; names of
    neither are ignored. Modules of qtorch and installed packages are left out. The digest is None
    if there is no file to read (e.g. classes defined in a notebook). Files are read in their
    current state, so for a module that was edited after its import the digest is that of the
    edited file.
    """
    digests: dict[str, str | None] = {}
    pending = list(names)
    visited_names = set()
    while pending:
        name = pending.pop()
        if name in visited_names:
            continue
        visited_names.add(name)
        for module, path in find_user_modules(name):
            if module in digests:
                continue
            source = _read_bytes(path)
            digests[module] = None if source is None else hashlib.sha256(source).hexdigest()[:12]
            if path is not None and source is not None:
                pending += _find_imports(source, module, is_package=path.stem == "__init__")
    return dict(sorted(digests.items()))


def find_user_modules(name: str) -> Iterator[tuple[str, Path | None]]:
    """Yield the user modules of a dotted name (with their parent packages) and their files.

    Yields nothing if there is no such module, and for modules of qtorch and installed packages.
    """
    if name.endswith(".py"):
        path = resolve_path(name)
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
        spec = _find_spec(module, folders)
        if spec is None:
            if module in sys.modules:  # created at runtime, without a file
                yield module, None
            return
        if spec.has_location and spec.origin is not None:
            path = Path(spec.origin).resolve()
            if INSTALLED_FOLDERS & set(path.parts) or any(
                path.is_relative_to(p) for p in EXCLUDED_FOLDERS
            ):
                return
            yield module, path
        folders = spec.submodule_search_locations
        if folders is None:
            return


def _find_spec(module: str, folders: Any) -> ModuleSpec | None:
    """Find the spec of a module without importing; a submodule is searched in `folders`."""
    if module in sys.modules:
        return getattr(sys.modules[module], "__spec__", None)
    if folders is not None:
        return PathFinder.find_spec(module, folders)
    try:
        return importlib.util.find_spec(module)
    except ValueError:  # not a module name
        return None


def _read_bytes(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError:
        return None


def _find_imports(source: bytes, module: str, *, is_package: bool) -> Iterator[str]:
    """Yield the names that a source file imports; nothing if it is not valid Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
