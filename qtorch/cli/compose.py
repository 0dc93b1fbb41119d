"""Compose settings from conf/ and overrides for commands that do not run a Hydra job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from qtorch.cli.config_path import config_path
from qtorch.cli.hydra_errors import check_missing_values, translate_hydra_errors
from qtorch.core.errors import ArgumentError, ConfigError
from qtorch.core.instantiate import plain


def compose_settings(root: str, argv: Sequence[str]) -> dict[str, Any]:
    """Compose the configuration `root` with overrides and return plain data.

    `--config-dir DIR` adds a folder of config groups. Raises ConfigError with a one-line message
    that suggests the nearest name for a misspelled one.
    """
    folder, overrides = _split_arguments(argv)
    with translate_hydra_errors(overrides, root=root), _initialize_hydra():
        if folder is not None:
            overrides = [f"hydra.searchpath=[file://{folder}]", *overrides]
        config = compose(root, overrides=overrides)
        check_missing_values(config)
        settings: dict[str, Any] = plain(config)
    return settings


def _split_arguments(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    folder, overrides, words = None, [], list(argv)
    while words:
        word = words.pop(0)
        if word in ("--config-dir", "-cd"):
            folder = _resolve_folder(words.pop(0) if words else "")
        elif word.startswith("--config-dir="):
            folder = _resolve_folder(word.partition("=")[2])
        elif "=" not in word and not word.startswith("~"):
            raise ArgumentError(
                f"invalid override {word!r}; expected KEY=VALUE or --config-dir DIR."
            )
        else:
            overrides.append(word)
    return folder, overrides


def _resolve_folder(name: str) -> Path:
    folder = Path(name).expanduser().resolve()
    if not name or not folder.is_dir():
        raise ConfigError(f"--config-dir: folder {name!r} does not exist.")
    return folder


@contextmanager
def _initialize_hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_path()), version_base="1.3"):
        yield
