"""Write the signatures of real Qlib's public classes and functions as JSON; run by its Python.

    $QTORCH_QLIB_PYTHON scripts/parity/qlib_signatures.py tests/golden/qlib_signatures.json

The file has `classes` (arguments of the constructor with their defaults, whether it takes others by
`**kwargs`, base classes, public methods, and other public members: properties, constants, and what
the constructor sets) and `functions`, one of them a line.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import logging
import pkgutil
import sys
import textwrap
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import qlib

PACKAGES = (
    *("backtest", "contrib", "model", "strategy", "workflow"),
    *("data.dataset", "data.filter", "data.inst_processor"),
)
# Experiments of former versions, which cannot be imported, and the search of hyperparameters.
LEFT_OUT = ("qlib.contrib.tuner", "qlib.contrib.online", "qlib.contrib.rolling.__main__")
# Packages that some modules import, and that their signatures do not need.
FOREIGN_PACKAGES = (
    *("arctic", "arctic.auth", "catboost", "catboost.utils", "plotly", "plotly.figure_factory"),
    *("plotly.graph_objs", "plotly.graph_objects", "plotly.offline", "plotly.subplots"),
    *("plotly.tools", "seaborn", "statsmodels", "statsmodels.api", "xgboost"),
)
REQUIRED = "<required>"
KINDS = inspect.Parameter


def main(path: str) -> None:
    """Write the signatures to the file."""
    logging.disable(logging.CRITICAL)
    missing = {
        package
        for package in {name.partition(".")[0] for name in FOREIGN_PACKAGES}
        if importlib.util.find_spec(package) is None
    }
    for name in FOREIGN_PACKAGES:
        if name.partition(".")[0] in missing:
            sys.modules[name] = MagicMock()
    classes: dict[str, Any] = {}
    functions: dict[str, Any] = {"qlib.init": describe_function(qlib.init)}
    for name in module_names():
        for key, value in vars(importlib.import_module(name)).items():
            if key.startswith("_") or getattr(value, "__module__", None) != name:
                continue
            if isinstance(value, type):
                classes[f"{name}.{key}"] = describe_class(value)
            elif inspect.isfunction(value):
                functions[f"{name}.{key}"] = describe_function(value)
    functions["qlib.utils.mod.init_instance_by_config"] = describe_function(
        qlib.utils.init_instance_by_config
    )
    document = {"qlib": qlib.__version__, "classes": classes, "functions": functions}
    Path(path).write_text(dump(document))


def module_names() -> list[str]:
    """Return the names of the modules whose signatures are written."""
    names = [f"qlib.{package}" for package in PACKAGES]
    for package in PACKAGES:
        folder = Path(qlib.__file__).parent.joinpath(*package.split("."))
        names += [info.name for info in pkgutil.walk_packages([str(folder)], f"qlib.{package}.")]
    return sorted(n for n in set(names) if not n.startswith(LEFT_OUT))


def dump(document: dict[str, Any]) -> str:
    """Return the document as JSON with one class or function a line."""
    parts = []
    for key, value in document.items():
        if isinstance(value, dict):
            lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(value.items())]
            parts.append(f" {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n }")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def describe_class(cls: type) -> dict[str, Any]:
    """Describe the constructor and the public methods of a class."""
    bases = [
        f"{b.__module__}.{b.__qualname__}"
        for b in cls.__mro__[1:]
        if b.__module__.startswith("qlib.")
    ]
    methods, members = {}, set()
    for key, value in vars(cls).items():
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if key.startswith("_"):
            continue
        if inspect.isfunction(function):
            methods[key] = describe_function(function)
        else:
            members.add(key)
    members |= attributes_of_constructor(cls) - set(methods)
    description = {**describe_function(cls.__init__), "bases": bases, "methods": methods}
    return {**description, "members": sorted(members)}


def attributes_of_constructor(cls: type) -> set[str]:
    """Return the public attributes that a class's own `__init__` sets."""
    if "__init__" not in vars(cls):
        return set()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.__init__)))
    except (OSError, TypeError):  # made by a decorator
        return set()
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and getattr(node.value, "id", "") == "self"
        and not node.attr.startswith("_")
    }


def describe_function(function: Any) -> dict[str, Any]:
    """Describe the arguments of a function in their order, without self."""
    arguments, takes_others = {}, False
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("self", "cls"):
            continue
        if parameter.kind is KINDS.VAR_KEYWORD:
            takes_others = True
        elif parameter.kind is not KINDS.VAR_POSITIONAL:
            arguments[name] = default_text(parameter.default)
    return {"arguments": arguments, "others": takes_others}


def default_text(value: Any) -> Any:
    """Return a default as plain data: itself, or the text of an object."""
    if value is KINDS.empty:
        return REQUIRED
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [default_text(part) for part in value]
    if isinstance(value, dict):
        return {str(key): default_text(part) for key, part in value.items()}
    return f"<{getattr(value, '__name__', type(value).__name__)}>"


if __name__ == "__main__":
    main(sys.argv[1])
