"""Which words of a stored command `qtorch sweep resume` may repeat.

What the words say about the tasks is composed, and then checked as stored text
(`qtorch.core.trust`). But Hydra itself acts on some words before there is a task: it reads folders
of configuration, imports callbacks and launchers, runs setup commands on a cluster, and resolves
interpolations. Of those only harmless ones are repeated.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from qtorch.cli.compose import config_path
from qtorch.core.errors import TrustError

RESUME_WORDS = ("sweep.retry=", "sweep.stored=")  # set by `qtorch sweep resume`
_WORD = re.compile(r"[\w+-]+")
_OPTUNA_CLASS = re.compile(r"optuna\.(samplers|pruners)\.\w+")
# Settings of a launcher that a cluster's scheduler takes as names.
_LAUNCHER_NAMES = ("account", "comment", "constraint", "name", "partition", "qos")


def check_stored_words(words: Sequence[str]) -> None:
    """Raise TrustError for the first word of a sweep's stored command that could run code."""
    for word in words:
        reason = _find_danger(word)
        if reason is not None:
            raise TrustError(
                f"the stored command contains {word!r}: {reason}. If the command is yours, or you "
                f"trust it, add trusted=true. It is: qtorch train -m {shlex.join(words)}"
            )


def words_to_repeat(words: Sequence[str]) -> list[str]:
    """Return the words of a stored command without those that `qtorch sweep resume` sets itself."""
    own_words = (*RESUME_WORDS, "sweep.name=", "tracking.uri=")
    return [str(w) for w in words if not str(w).lstrip("+").startswith(own_words)]


def _find_danger(word: str) -> str | None:
    """Return what could make a word dangerous; None if it is harmless."""
    if word.startswith("-"):
        return "options of the command line may name a folder of configuration"
    if "${" in word:
        return "an interpolation may read this machine's environment"
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return "it is not an override"
    key, package = override.key_or_group, override.package or ""
    if package.partition(".")[0] == "hydra":
        return "it changes Hydra's own settings"
    if key.partition("/")[0].partition(".")[0] == "hydra":
        is_harmless = _is_harmless_setting(key, list(_list_values(override)))
        return None if is_harmless else "it changes Hydra's own settings"
    is_group = (config_path() / key).is_dir()
    if is_group and any(
        str(value).startswith("/") or ".." in str(value) for _, value in _list_values(override)
    ):
        return "it names a file of configuration outside of qtorch"
    return None


def _is_harmless_setting(key: str, values: list[tuple[str, Any]]) -> bool:
    """Whether a setting of Hydra does not run code, with any of these keys and values in it."""
    name = key.rpartition(".")[2]
    texts = [(inner or name, v) for inner, v in values if not _is_number(v)]
    if key in ("hydra/launcher", "hydra/sweeper"):
        return all(_WORD.fullmatch(str(v)) for _, v in texts)
    if key in ("hydra.sweep.dir", "hydra.run.dir"):
        return not any(str(v).startswith(("/", "~")) or ".." in str(v) for _, v in texts)
    if key.startswith("hydra.launcher."):
        return all(
            v == "auto" or (n in _LAUNCHER_NAMES and _WORD.fullmatch(str(v))) for n, v in texts
        )
    if key.startswith("hydra.sweeper."):
        return all(n != "_target_" or _OPTUNA_CLASS.fullmatch(str(v)) for n, v in texts)
    return False


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float)


def _list_values(override: Override) -> Iterator[tuple[str, Any]]:
    """Yield the values of an override, of all of its jobs, with their keys inside a mapping."""
    if override.is_discrete_sweep():
        for text in override.sweep_string_iterator():
            yield "", text
    else:
        yield from _walk("", override.value())


def _walk(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _walk(str(name), part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _walk(key, part)
    else:
        yield key, value
