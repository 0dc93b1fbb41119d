"""Translate Hydra's errors into one-line messages that suggest the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from qtorch.cli.config_path import ROOT_CONFIG, config_path
from qtorch.core.errors import ConfigError, unknown_name

QUOTES = (
    "Values that contain ( ) , = : or $ need quotes inside the shell's quotes: "
    "'handler.label=[\"Ref($close,-2)/Ref($close,-1)-1\"]'."
)

PLUGINS = "Launchers and sweepers are plugins: pip install 'qtorch[sweep]' installs joblib."


@contextmanager
def translate_hydra_errors(argv: Sequence[str], root: str = ROOT_CONFIG) -> Iterator[None]:
    """Turn Hydra and OmegaConf exceptions raised inside the block into ConfigErrors."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_error(error, argv, root)) from error


def check_missing_values(config: DictConfig) -> None:
    """Raise ConfigError if a mandatory value is missing."""
    missing = sorted(OmegaConf.missing_keys(config), key=lambda k: (k.count("."), k))
    if missing:
        raise ConfigError(_missing_value_text(missing[0]))


def explain_error(error: BaseException, argv: Sequence[str] = (), root: str = ROOT_CONFIG) -> str:
    """Describe a Hydra or OmegaConf error in one sentence."""
    text = _chain_text(error)
    if isinstance(error, OverrideParseException):
        return f"cannot parse the override {error.override!r}. {QUOTES}"
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        option_lines = text.partition("Available options in")[2].split("\n")[1:]
        options = [line.strip() for line in option_lines if line.strip()]
        if group and options:
            message = unknown_name(
                f"option of {group}", option, [o for o in options if " " not in o]
            )
            return f"{message} {PLUGINS}" if group.startswith("hydra/") else message
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key_text(match[1], argv, root)
    if isinstance(error, MissingMandatoryValue) or "Missing mandatory value" in text:
        key = re.search(r"(?:full_key|Missing mandatory value): ([\w.\[\]]+)", text)
        name = key[1] if key else "a value"
        return _missing_value_text(name)
    if isinstance(error, InterpolationResolutionError):
        return f"cannot resolve the configuration: {' '.join(text.split())}"
    return " ".join(text.split())


def _missing_value_text(name: str) -> str:
    return f"{name} must be given: add {name}=... to the command."


def _chain_text(error: BaseException) -> str:
    """Join the messages of an error and its causes, without repetitions."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        if str(current) not in "\n".join(parts):
            parts.append(str(current))
        current = current.__cause__
    return "\n".join(parts)


def _unknown_key_text(key: str, argv: Sequence[str], root: str) -> str:
    """Suggest the nearest key for one that the configuration does not have."""
    *parents, name = key.split(".")
    node: Any = _compose_valid(
        [a for a in argv if not _is_override_for(a, key)], root, parents[:1] == ["hydra"]
    )
    for part in parents:
        node = node.get(part) if isinstance(node, DictConfig) and part in node else None
    parent = ".".join(parents)
    if not isinstance(node, DictConfig):
        return (
            f"unknown option {key!r}: the configuration has no {parent!r} "
            "(show it with qtorch train --cfg job)."
        )
    if name in node:
        return f"{key} is a mapping that accepts new keys: add them with +{key}={{...}}."
    message = unknown_name(
        f"option of {parent}" if parent else "option", name, [str(k) for k in node]
    )
    return f"{message} (To add a new option: +{key}=...)"


def _compose_valid(overrides: list[str], root: str, with_hydra: bool) -> Any:
    """Compose the configuration with the overrides that are valid.

    `with_hydra` includes Hydra's own settings.
    """
    plain = [o for o in overrides if "=" in o and not o.startswith("-")]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_path()), version_base="1.3"):
        for attempt in ([o for o in plain if "," not in o], []):
            try:
                return compose(root, overrides=attempt, return_hydra_config=with_hydra)
            except HydraException:
                continue
    return OmegaConf.create()


def _is_override_for(override: str, key: str) -> bool:
    return override.lstrip("+~").split("=")[0].split("@")[0] == key
