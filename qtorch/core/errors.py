"""Every error that qtorch raises for a user's input, under one root.

A message says what was given, what was expected and how to mend it; where a name was
wrong it shows the nearest valid one (`unknown_name`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QtorchError(Exception):
    """Root of qtorch's own errors: catch this to catch them all."""


class ConfigError(QtorchError, ValueError):
    """A configuration or an argument that cannot be meant."""


class ArgumentError(ConfigError, TypeError):
    """A call or constructor got an argument that it does not take, or lacks one."""


class DataError(QtorchError, ValueError):
    """Data that is missing, damaged, or not of the stated form."""


class ExpressionError(DataError):
    """An expression that does not parse or names something unknown."""


class NotFittedError(QtorchError, RuntimeError):
    """Something was asked of an object before it was fitted."""


class TrustError(QtorchError, PermissionError):
    """Stored data names code that is not on the allow-list."""


class TrackingError(QtorchError, RuntimeError):
    """The tracking store refused or did not answer."""


class LoadObjectError(TrackingError):
    """A recorder holds no object of that name, or it cannot be read."""


class ExportError(QtorchError, RuntimeError):
    """An exported file does not give the scores of the model that it was made of."""


class RecordError(QtorchError, RuntimeError):
    """A record misses what it depends on."""


class TaskError(QtorchError, RuntimeError):
    """Something is wrong with a task of a pool, or with the pool."""


class TaskDefinitionError(TaskError, ValueError):
    """A pool's task whose definition cannot be read, or not be stored."""


class TaskResultError(TaskError, TypeError):
    """A result that the pool cannot store: it is neither plain data nor a recorder."""


class LeaseLost(TaskError):
    """The task is no longer this worker's: its lease ran out or somebody reset it."""


class TaskTimeout(TaskError, TimeoutError):
    """Tasks were not finished in the given time; the message and `unfinished` name them."""

    def __init__(self, message: str, unfinished: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.unfinished = list(unfinished)


class TaskStoreError(TaskError, ConnectionError):
    """The pool's store cannot be opened, or has not answered for as long as was waited."""


class TaskStoreVersionError(TaskError):
    """The pool's store was written by a newer qtorch."""


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name most like `name`, or None where nothing is close."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return close[0]
    lowered = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[close[0]] if close else None


def unknown_name(kind: str, name: str, valid: Iterable[str], *, limit: int = 12) -> str:
    """One sentence for an unknown name: the name, the nearest one, the valid ones."""
    names = sorted(valid)
    guess = nearest(name, names)
    hint = f" Did you mean {guess!r}?" if guess else ""
    shown = ", ".join(names[:limit]) + (
        f", ... ({len(names)} in all)" if len(names) > limit else ""
    )
    return f"unknown {kind} {name!r}.{hint} Known: {shown or 'none'}."
