"""Public names that are imported when they are first used (PEP 562)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from qtorch.core.errors import nearest


def lazy_names(
    package: str, names: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`(__getattr__, __dir__, __all__)` for a package whose public names load on first use.

    `names` maps a public name to the module that defines it; a module mapped to itself
    (`"R": "qtorch.tracking.r"`) is resolved by attribute, a submodule by `"": ...` not at all.
    """

    def load(name: str) -> Any:
        if name in names:
            return getattr(importlib.import_module(names[name]), name)
        guess = nearest(name, names)
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}")

    return load, lambda: sorted(names), sorted(names)
