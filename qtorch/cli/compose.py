"""Configurations for the commands that run no Hydra job: overrides in, plain data out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from qtorch.cli.config_path import config_path
from qtorch.cli.hydra_errors import check_complete, explained
from qtorch.core.errors import ArgumentError, ConfigError
from qtorch.core.instantiate import plain


def composed(root: str, argv: Sequence[str]) -> dict[str, Any]:
    """The configuration `root` with overrides; `--config-dir DIR` adds a folder of groups.

    Raises ConfigError in one line, with the nearest name where a name is wrong.
    """
    folder, overrides = _split(argv)
    with explained(overrides, root=root), _fresh():
        if folder is not None:
            overrides = [f"hydra.searchpath=[file://{folder}]", *overrides]
        config = compose(root, overrides=overrides)
        check_complete(config)
        settings: dict[str, Any] = plain(config)
    return settings


def _split(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    folder, overrides, rest = None, [], list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("--config-dir", "-cd"):
            folder = _folder(rest.pop(0) if rest else "")
        elif word.startswith("--config-dir="):
            folder = _folder(word.partition("=")[2])
        elif "=" not in word and not word.startswith("~"):
            raise ArgumentError(f"{word!r} is no override; expected KEY=VALUE or --config-dir DIR.")
        else:
            overrides.append(word)
    return folder, overrides


def _folder(name: str) -> Path:
    folder = Path(name).expanduser().resolve()
    if not name or not folder.is_dir():
        raise ConfigError(f"--config-dir: there is no folder {name!r}.")
    return folder


@contextmanager
def _fresh() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_path()), version_base="1.3"):
        yield
