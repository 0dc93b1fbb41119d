"""Modules with Qlib's names whose classes and functions are ours, by the table of names."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

from qtorch.core.errors import ConfigError
from qtorch.core.names import import_object
from qtorch.core.qlib.callables import adapt_callable
from qtorch.core.qlib.notes import Notes
from qtorch.core.qlib.table import VERSION, find_entry, load_table, unknown_class_message
from qtorch.core.qlib.translation import translate_config

ROOT = "qlib"


def install() -> None:
    """Make `import qlib` and its submodules find our classes and functions in this process.

    A class that has no counterpart is an ImportError with the reason. Classes and functions take
    Qlib's arguments: those of Qlib's models by their names. Raises ConfigError if the program has
    imported real Qlib already.
    """
    module = sys.modules.get(ROOT)
    if module is not None and not isinstance(module, QlibModule):
        raise ConfigError(
            "this program has imported real Qlib already: call install() before the first import "
            "of qlib."
        )
    if not any(isinstance(finder, QlibFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, QlibFinder())


def uninstall() -> None:
    """Undo `install`: `import qlib` finds real Qlib again, if it is installed."""
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, QlibFinder)]
    for name in [n for n, module in sys.modules.items() if isinstance(module, QlibModule)]:
        del sys.modules[name]


def init(**settings: Any) -> Any:
    """Set the session's defaults by Qlib's arguments: provider_uri, region, exp_manager, ..."""
    notes = Notes()
    config = translate_config({"_target_": f"{ROOT}.init", **settings}, notes, "qlib.init")
    notes.log_all()
    function = import_object(str(config.pop("_target_")))
    return function(**config)


class QlibModule(ModuleType):
    """A module of Qlib; its names are found on first use."""

    def __getattr__(self, name: str) -> Any:
        full_name = f"{self.__name__}.{name}"
        if full_name == f"{ROOT}.init":
            return init
        # A name of the table counts before a module: `from qlib.backtest import backtest`.
        is_module = full_name in module_names() and full_name not in load_table()
        if name.startswith("__") or is_module:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        entry = find_entry(full_name)
        if entry is None:
            raise ImportError(unknown_class_message(full_name))
        if entry.target is None:
            raise ImportError(f"{full_name} is not available: {entry.refused}.")
        value = adapt_callable(entry)
        setattr(self, name, value)
        return value


class QlibFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of Qlib that the table of names has."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != ROOT:
            return None
        if fullname not in module_names():
            raise ModuleNotFoundError(
                f"qtorch has no part of Qlib's module {fullname!r}: docs/from-qlib.md says what is "
                "there.",
                name=fullname,
            )
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return QlibModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == ROOT:
            module.__version__ = VERSION  # type: ignore[attr-defined]  # modules have any attribute


@cache
def module_names() -> frozenset[str]:
    """Return the names of Qlib's modules and packages."""
    names = set()
    for name in load_table():
        parts = name.split(".")[:-1]
        names |= {".".join(parts[:k]) for k in range(1, len(parts) + 1) if parts[0] == ROOT}
    return frozenset(names)
