"""Parse `KEY=VALUE` options of the commands that do not compose a configuration.

Values are taken literally: a URL with `?` and `=` needs no quotes beyond the shell's. This is why
the task pool commands parse their options here and not through Hydra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qtorch.core.errors import ConfigError, unknown_name_message
from qtorch.core.session import resolve_path

Parsers = Mapping[str, Callable[[str], Any]]
NULL_WORDS = ("", "null", "none", "None")
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")


def parse_options(argv: Sequence[str], parsers: Parsers, command: str) -> dict[str, Any]:
    """Parse all options; raise ConfigError with the nearest name for an unknown option."""
    options, remaining_words = parse_known_options(argv, parsers)
    if remaining_words:
        name = remaining_words[0].partition("=")[0]
        raise ConfigError(unknown_name_message(f"option of {command}", name, parsers, limit=30))
    return options


def parse_known_options(argv: Iterable[str], parsers: Parsers) -> tuple[dict[str, Any], list[str]]:
    """Parse the options that `parsers` knows; also return the remaining words."""
    options: dict[str, Any] = {}
    remaining_words = []
    for word in argv:
        name, equals, value = word.partition("=")
        if not equals or name not in parsers:
            remaining_words.append(word)
            continue
        try:
            options[name] = None if value in NULL_WORDS else parsers[name](value)
        except ValueError:
            expectation = VALUE_DESCRIPTIONS.get(parsers[name], "another value")
            raise ConfigError(f"{word}: expected {expectation}; got {value!r}.") from None
    return options, remaining_words


def require_option(options: Mapping[str, Any], name: str, command: str) -> Any:
    """Return an option that is required; raise ConfigError if it was not given."""
    if options.get(name) is None:
        raise ConfigError(f"{command} needs {name}=...; see {command} --help.")
    return options[name]


def parse_bool(text: str) -> bool:
    """Parse true or false."""
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise ValueError(text)


def parse_seconds(text: str) -> float:
    """Parse a number of seconds, 0 or more."""
    value = float(text)
    if not value >= 0:
        raise ValueError(text)
    return value


def parse_count(text: str) -> int:
    """Parse a whole number, 1 or more."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


VALUE_DESCRIPTIONS: dict[Callable[[str], Any], str] = {
    int: "a whole number",
    parse_bool: "true or false",
    parse_seconds: "a number of seconds",
    parse_count: "a whole number from 1",
}


def output_path(out: str) -> Path:
    """Return the path of a file or folder to write; ConfigError unless its folder exists."""
    path = resolve_path(out)
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"out={out}: folder {path.absolute().parent} does not exist.")
    return path
