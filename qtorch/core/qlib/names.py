"""Recognize Qlib's names in a configuration, without reading the table of names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAME_KEYS = ("_target_", "class", "func")
# A class of Qlib's examples, which lies beside its workflow and not in a package.
EXAMPLE_CLASSES = ("tft.TFTModel",)


def qlib_name(config: Any) -> str | None:
    """Return the full name of Qlib's class or function that a configuration names; else None."""
    if isinstance(config, str):
        return config if _is_qlib(config) else None
    if not isinstance(config, Mapping):
        return None
    name = next((config[key] for key in NAME_KEYS if key in config), None)
    if not isinstance(name, str):
        return None
    module = config.get("module_path")
    if "." not in name and isinstance(module, str):
        name = f"{module}.{name}"
    return name if _is_qlib(name) else None


def has_qlib_names(config: Any) -> bool:
    """Whether a configuration, or one that is nested in it, is in Qlib's names."""
    if qlib_name(config) is not None:
        return True
    if isinstance(config, Mapping):
        return any(has_qlib_names(value) for value in config.values())
    if isinstance(config, list | tuple):
        return any(has_qlib_names(value) for value in config)
    return False


def _is_qlib(name: str) -> bool:
    return name.startswith("qlib.") or name in EXAMPLE_CLASSES
