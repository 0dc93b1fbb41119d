"""Lazy imports of a package's public names on first use (PEP 562)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from qtorch.core.errors import nearest_name


def lazy_names(
    package: str, names: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `(__getattr__, __dir__, __all__)` for a package with lazily imported names.

    `names` maps each public name to the module that defines it.
    """

    def load(name: str) -> Any:
        if name in names:
            return getattr(importlib.import_module(names[name]), name)
        guess = nearest_name(name, names)
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}")

    return load, lambda: sorted(names), sorted(names)
