"""The exceptions that qtorch raises, with a common base class.

A message says what was given, what was expected and how to fix it. For a wrong name it suggests
the nearest valid one (`unknown_name_message`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from numbers import Integral

# The import is `qtorch`; on PyPI the name qtorch belongs to another project.
DISTRIBUTION = "qtorch-quant"
# All but tab and line feed, with the characters that change the direction of text.
_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")


class QtorchError(Exception):
    """Base class of all qtorch errors."""


class ConfigError(QtorchError, ValueError):
    """A configuration or an argument is invalid."""


class ArgumentError(ConfigError, TypeError):
    """A call or constructor got an unknown argument, or misses a required one."""


class DataError(QtorchError, ValueError):
    """Data is missing, damaged, or has an unexpected format."""


class DuplicateRowError(DataError):
    """A frame has several rows of the same date and instrument.

    `date` and `instrument` are those of the first such row, `num_duplicates` counts the rows that
    repeat an earlier one.
    """

    def __init__(self, date: datetime, instrument: str, num_duplicates: int, advice: str) -> None:
        self.date = date
        self.instrument = instrument
        self.num_duplicates = num_duplicates
        day = str(date).removesuffix(" 00:00:00")
        super().__init__(f"duplicate row ({day}, {instrument}), {num_duplicates} in all; {advice}.")

    def with_advice(self, advice: str) -> DuplicateRowError:
        """Return the same error with another way to mend it."""
        return DuplicateRowError(self.date, self.instrument, self.num_duplicates, advice)


class ExpressionError(DataError):
    """An expression does not parse or uses an unknown name."""


class NotFittedError(QtorchError, RuntimeError):
    """An object was used before it was fitted."""


class TrustError(QtorchError, PermissionError):
    """Stored data names code that is not trusted (see `qtorch.core.trust`)."""


class FileLockError(QtorchError, OSError):
    """A lock file cannot be written, or another process does not release it."""


class TrackingError(QtorchError, RuntimeError):
    """The tracking store rejected a request or did not answer."""


class RunHeldError(TrackingError):
    """Another live process works on the run."""


class LoadObjectError(TrackingError):
    """A recorder has no object of that name, or the object cannot be read."""


class ExportError(QtorchError, RuntimeError):
    """An exported file does not reproduce the scores of its model."""


class AuditError(QtorchError, RuntimeError):
    """The numbers of a backtest contradict its orders or its bars."""


class RecordError(QtorchError, RuntimeError):
    """A record cannot be made because something that it depends on is missing."""


class TaskError(QtorchError, RuntimeError):
    """An error of a task pool or of one of its tasks."""


class TaskDefinitionError(TaskError, ValueError):
    """The definition of a pool's task cannot be read or stored."""


class TaskResultError(TaskError, TypeError):
    """A task's result is neither plain data nor a recorder, so the pool cannot store it."""


class LeaseLost(TaskError):
    """A worker no longer holds its task: the lease expired or the task was reset."""


class TaskTimeout(TaskError, TimeoutError):
    """Tasks did not finish before the timeout; `unfinished_ids` lists their ids."""

    def __init__(self, message: str, unfinished_ids: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.unfinished_ids = list(unfinished_ids)


class TaskStoreError(TaskError, ConnectionError):
    """The pool's store cannot be opened, or did not answer before the timeout."""


class TaskStoreVersionError(TaskError):
    """The pool's store was written by a newer qtorch."""


def nearest_name(name: str, valid: Iterable[str]) -> str | None:
    """Return the valid name most similar to `name`, or None if none is close."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return close[0]
    by_lowercase = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), list(by_lowercase), n=1, cutoff=0.6)
    return by_lowercase[close[0]] if close else None


def check_name(
    kind: str,
    name: object,
    valid: Collection[str],
    *,
    limit: int = 12,
    error: type[QtorchError] = ConfigError,
) -> None:
    """Raise an error that suggests the nearest valid name, unless `name` is a valid one."""
    if name not in valid:
        raise error(unknown_name_message(kind, str(name), valid, limit=limit))


def check_count(name: str, value: object, *, minimum: int = 1) -> None:
    """Raise ConfigError unless a setting is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least {minimum}.")


def unknown_name_message(kind: str, name: str, valid: Iterable[str], *, limit: int = 12) -> str:
    """Return the error message for an unknown name, with a suggestion and the valid names."""
    names = sorted(valid)
    guess = nearest_name(name, names)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return f"unknown {kind} {name!r}.{hint} Valid names: {join_names(names, limit) or 'none'}."


def join_names(names: Collection[str], limit: int = 8) -> str:
    """Join names by commas; of more than `limit`, the first ones and the total number."""
    suffix = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(list(names)[:limit]) + suffix


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra (e.g. `export`) of qtorch.

    The packages themselves are named, so that it works for a checkout and for an installed wheel.
    """
    from importlib.metadata import PackageNotFoundError, requires  # slow, and rarely needed

    try:
        requirements = requires(DISTRIBUTION) or []
    except PackageNotFoundError:  # the checkout is on the path, but not installed
        return f"pip install -e '.[{extra}]' (in the folder of qtorch's checkout)"
    parts = [text.partition(";") for text in requirements]
    packages = [
        name.strip() for name, _, condition in parts if condition.strip() == f"extra == '{extra}'"
    ]
    return "pip install " + " ".join(f"'{package}'" for package in packages)


def refuse_old_names(owner: object, new_names: Mapping[str, str]) -> None:
    """Raise ConfigError if a user's class or object has an attribute under a former name.

    A base class reads its hooks by their names of today and would silently ignore the attribute.
    """
    cls = owner if isinstance(owner, type) else type(owner)
    for old, new in new_names.items():
        if hasattr(owner, old):
            raise ConfigError(
                f"{cls.__module__}.{cls.__qualname__} defines {old!r}, which has no effect: its "
                f"name is {new!r} now. Rename it."
            )


def printable_text(text: str) -> str:
    """Return a text without control characters, such as the ESC that begins a terminal's commands.

    Lone surrogates, which no terminal can encode, are replaced.
    """
    return _LONE_SURROGATES.sub("\ufffd", _CONTROL_CHARACTERS.sub("", text))


def format_count(number: int, singular: str, plural: str | None = None) -> str:
    """Format a count: `1 task`, `2 tasks`, `1,200 tasks`; the default plural appends an s."""
    return f"{number:,} {singular if number == 1 else (plural or f'{singular}s')}"
