"""`KEY=VALUE` words of the commands that compose no configuration.

Values are taken as they are (a URL with `?` and `=` needs no quotes beyond the shell's), which is
why the commands of the task pool read their words here and not through Hydra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qtorch.core.errors import ConfigError, unknown_name

Readers = Mapping[str, Callable[[str], Any]]
NOTHING = ("", "null", "none", "None")
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")


def options_of(argv: Sequence[str], readers: Readers, command: str) -> dict[str, Any]:
    """The given options, read; ConfigError with the nearest name for one that there is not."""
    found, rest = known_options(argv, readers)
    if rest:
        name = rest[0].partition("=")[0]
        raise ConfigError(unknown_name(f"option of {command}", name, readers, limit=30))
    return found


def known_options(argv: Iterable[str], readers: Readers) -> tuple[dict[str, Any], list[str]]:
    """The options that `readers` knows, and the words that are none of them."""
    found: dict[str, Any] = {}
    rest = []
    for word in argv:
        name, equals, value = word.partition("=")
        if not equals or name not in readers:
            rest.append(word)
            continue
        try:
            found[name] = None if value in NOTHING else readers[name](value)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{word}: expected {_expected(readers[name])}; got {value!r}."
            ) from None
    return found, rest


def needed(options: Mapping[str, Any], name: str, command: str) -> Any:
    """An option that must be given."""
    if options.get(name) is None:
        raise ConfigError(f"{command} needs {name}=...; {command} --help tells more.")
    return options[name]


def switch(text: str) -> bool:
    """true or false."""
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise ValueError(text)


def seconds(text: str) -> float:
    """A number of seconds, 0 or more."""
    value = float(text)
    if not value >= 0:
        raise ValueError(text)
    return value


def count(text: str) -> int:
    """A number from 1."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _expected(reader: Callable[[str], Any]) -> str:
    kinds = {int: "a whole number", float: "a number", switch: "true or false"}
    kinds |= {seconds: "a number of seconds", count: "a whole number from 1"}
    return kinds.get(reader, "another value")
