"""Import a package's public names on first use (PEP 562), and modules without collections."""

from __future__ import annotations

import functools
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qtorch.core.errors import nearest_name


@contextmanager
def quick_imports(*, freeze: bool = False) -> Iterator[None]:
    """Import modules in this block without garbage collections.

    Imports make a million objects that live as long as the process. Looking through them again and
    again takes a third of the time of a short command. `freeze`, for a process without data of a
    user's, leaves all objects out of later collections too: those that exist at the end of a block
    with imports are still freed when nothing refers to them, except for cycles among them.
    """
    was_enabled, num_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if freeze and len(sys.modules) > num_modules:
            gc.freeze()
        if was_enabled:
            gc.enable()


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `(__getattr__, __dir__)` for a package whose `__init__.py` is `file`.

    The public names, of which `__all__` consists too, are those that the file imports under
    `if TYPE_CHECKING:`. Type checkers, editors and the running program thus read one list.
    """

    @functools.cache
    def modules() -> Mapping[str, str]:
        return _type_checking_imports(file)

    def load(name: str) -> Any:
        if name == "__all__":
            return sorted(modules())
        if name in modules():
            with quick_imports():
                module = importlib.import_module(modules()[name])
            return getattr(module, name)
        guess = nearest_name(name, modules())
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}")

    return load, lambda: sorted(modules())


def _type_checking_imports(file: str) -> dict[str, str]:
    """Return the names that a file imports for type checkers, and the modules that define them."""
    import ast  # only needed when a name is used, never by `import qtorch`

    with open(file, "rb") as source:
        statements = ast.parse(source.read()).body
    return {
        alias.name: str(node.module)
        for block in statements
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
