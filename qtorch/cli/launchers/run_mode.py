"""Tell Hydra whether a command runs one job or several, without composing the configuration.

Hydra composes the whole configuration only to read `hydra.mode`, and then once more for the job:
a fifth of the processor time of a small training. Most commands cannot have a mode in their
configuration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra  # it has no setting for the mode

# What sets the mode, or adds a folder with configurations that could.
_MODE_OVERRIDE = re.compile(r"[+~]*hydra(=|\.mode|\.searchpath)")
_MODE_IN_FILE = re.compile(r"\b(mode|searchpath)\b[\"']?\s*:")
_COMMAND = "train"  # the command whose configuration is in files only
_compose_mode = Hydra.get_mode


def replace_mode_search() -> None:
    """Let Hydra find its mode by `find_mode`."""
    Hydra.get_mode = find_mode  # type: ignore[assignment, method-assign]  # Hydra has no setting


def find_mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Return `hydra.mode`; None without composing if neither a word nor a file can set it."""
    search_path = hydra.config_loader.get_search_path().get_path()
    folders = [e.path for e in search_path if e.provider not in ("hydra", "schema")]
    if config_name == _COMMAND and not _may_set_mode(overrides, folders):
        return None
    return _compose_mode(hydra, config_name, overrides)


def _may_set_mode(overrides: Sequence[str], folders: Sequence[str | None]) -> bool:
    if len(folders) != 1 or any(_MODE_OVERRIDE.match(word) for word in overrides):
        return True  # a folder of the user may be large
    folder = Path(str(folders[0]))
    return not folder.is_dir() or any(map(_names_mode, folder.rglob("*.yaml")))


def _names_mode(file: Path) -> bool:
    """Return whether a file about Hydra has a key `mode` or `searchpath`."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    is_hydra = "hydra" in text or "hydra" in file.parts
    return is_hydra and _MODE_IN_FILE.search(text) is not None
