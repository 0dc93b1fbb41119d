"""Hydra's own errors, told in one line with the nearest valid name."""

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
    "Values that hold ( ) , = : or $ need quotes inside the shell's: "
    "'handler.label=[\"Ref($close,-2)/Ref($close,-1)-1\"]'."
)

PLUGINS = "Launchers and sweepers are plugins: pip install 'qtorch[sweep]' brings joblib."


@contextmanager
def explained(argv: Sequence[str], root: str = ROOT_CONFIG) -> Iterator[None]:
    """Turns Hydra's and OmegaConf's exceptions inside the block into ConfigErrors."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, argv, root)) from error


def check_complete(config: DictConfig) -> None:
    """ConfigError for a value that must be given and is not."""
    missing = sorted(OmegaConf.missing_keys(config), key=lambda k: (k.count("."), k))
    if missing:
        raise ConfigError(_must_be_given(missing[0]))


def explain(error: BaseException, argv: Sequence[str] = (), root: str = ROOT_CONFIG) -> str:
    """One sentence for an error of Hydra or OmegaConf."""
    text = _chain_text(error)
    if isinstance(error, OverrideParseException):
        return f"the override {error.override!r} cannot be read. {QUOTES}"
    if found := re.search(r"Could not find '([^']+)'", text):
        group, _, option = found[1].rpartition("/")
        listed = text.partition("Available options in")[2].split("\n")[1:]
        options = [line.strip() for line in listed if line.strip()]
        if group and options:
            told = unknown_name(f"option of {group}", option, [o for o in options if " " not in o])
            return f"{told} {PLUGINS}" if group.startswith("hydra/") else told
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(found[1], argv, root)
    if isinstance(error, MissingMandatoryValue) or "Missing mandatory value" in text:
        key = re.search(r"(?:full_key|Missing mandatory value): ([\w.\[\]]+)", text)
        name = key[1] if key else "a value"
        return _must_be_given(name)
    if isinstance(error, InterpolationResolutionError):
        return f"the configuration does not resolve: {' '.join(text.split())}"
    return " ".join(text.split())


def _must_be_given(name: str) -> str:
    return f"{name} must be given: add {name}=... to the command."


def _chain_text(error: BaseException) -> str:
    """The messages of an error and its causes, once each."""
    parts: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        if str(seen) not in "\n".join(parts):
            parts.append(str(seen))
        seen = seen.__cause__
    return "\n".join(parts)


def _unknown_key(key: str, argv: Sequence[str], root: str) -> str:
    """The nearest key to one that the configuration does not have."""
    *above, last = key.split(".")
    node: Any = _composed([a for a in argv if not _sets(a, key)], root, above[:1] == ["hydra"])
    for part in above:
        node = node.get(part) if isinstance(node, DictConfig) and part in node else None
    where = ".".join(above)
    if not isinstance(node, DictConfig):
        return (
            f"unknown option {key!r}: there is no {where!r} in the configuration "
            "(qtorch train --cfg job shows one)."
        )
    if last in node:
        return f"{key} is a mapping, whose keys are not all known here: +{key}={{...}} adds some."
    told = unknown_name(f"option of {where}" if where else "option", last, [str(k) for k in node])
    return f"{told} (To add a new one: +{key}=...)"


def _composed(overrides: list[str], root: str, hydras: bool) -> Any:
    """The configuration with the other overrides, as far as they can be composed; Hydra's own
    part too where `hydras`."""
    plain = [o for o in overrides if "=" in o and not o.startswith("-")]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_path()), version_base="1.3"):
        for attempt in ([o for o in plain if "," not in o], []):
            try:
                return compose(root, overrides=attempt, return_hydra_config=hydras)
            except HydraException:
                continue
    return OmegaConf.create()


def _sets(override: str, key: str) -> bool:
    return override.lstrip("+~").split("=")[0].split("@")[0] == key
