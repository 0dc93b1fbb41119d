"""Objects that know the configuration they were built from."""

from __future__ import annotations

import datetime
import enum
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, Self

from qtorch.core.errors import ArgumentError, ConfigError, unknown_name
from qtorch.core.names import dotted_name


class Configured:
    """Base of everything that a configuration builds: it keeps its constructor's arguments.

    `to_config()` gives them back as plain data, so that a task, a saved model and a run's record
    describe an object by the same mapping that builds it. An unknown argument is an error that
    names the nearest one. Constructors neither change their arguments nor take `**kwargs`.
    """

    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        signature = constructor_signature(cls)
        check_arguments(cls, signature, kwargs)
        try:
            bound = signature.bind_partial(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError(f"{cls.__name__}: {error}") from error
        self._arguments = _flat_arguments(signature, bound)
        return self

    def to_config(self) -> dict[str, Any]:
        """`{"_target_": name of the class, argument: plain value, ...}`.

        Raises ConfigError where an argument is a live object that no configuration describes.
        """
        name = dotted_name(type(self))
        out: dict[str, Any] = {"_target_": name}
        for key, value in self._arguments.items():
            out[key] = plain_value(value, f"{type(self).__name__}.{key}")
        return out


def constructor_signature(cls: type) -> inspect.Signature:
    """The signature of a class's `__init__` without self (a class may define `__new__` too)."""
    init = getattr(cls, "__init__")  # noqa: B009 - of this very class; mypy minds the plain access
    parameters = list(inspect.signature(init).parameters.values())[1:]
    return inspect.Signature(parameters)


def check_arguments(
    target: Callable[..., Any], signature: inspect.Signature, kwargs: Mapping[str, Any]
) -> None:
    """ArgumentError with the nearest name for a keyword that the signature does not take."""
    kinds = inspect.Parameter
    if any(p.kind is kinds.VAR_KEYWORD for p in signature.parameters.values()):
        return
    takes = [
        n
        for n, p in signature.parameters.items()
        if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    ]
    for name in kwargs:
        if name not in takes:
            what = getattr(target, "__qualname__", repr(target))
            raise ArgumentError(unknown_name(f"argument of {what}", name, takes, limit=40))


def plain_value(value: Any, where: str = "value") -> Any:
    """A value as plain data (None, bool, int, float, str, list, dict); callables by name.

    Raises ConfigError naming `where` for a live object.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, Configured):
        return value.to_config()
    if is_numpy_scalar(value):
        return value.item()
    if isinstance(value, datetime.date):
        return _date_text(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, slice):
        return [plain_value(v, where) for v in (value.start, value.stop)]
    if isinstance(value, Mapping):
        return {str(k): plain_value(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(v, f"{where}[{k}]") for k, v in enumerate(value)]
    if isinstance(value, functools.partial):
        named = {k: plain_value(v, f"{where}.{k}") for k, v in value.keywords.items()}
        extra = {"_args_": plain_value(list(value.args), where)} if value.args else {}
        return {"_target_": dotted_name(value.func), "_partial_": True, **extra, **named}
    if isinstance(value, type) or inspect.isfunction(value):
        return dotted_name(value)
    raise ConfigError(
        f"{where} is a live {type(value).__name__}, which no configuration describes. Give it as "
        "{'_target_': 'package.module.Class', ...} (or a plain value) where it has to be stored."
    )


def is_numpy_scalar(value: Any) -> bool:
    """Whether it is a number of numpy's, which this module does without importing."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic)


def _date_text(value: datetime.date) -> str:
    """A day, or day and time; pandas' time stamps are dates of Python's too."""
    if not isinstance(value, datetime.datetime):
        return value.isoformat()
    midnight = datetime.time()
    whole = value == value and value.time() == midnight and not getattr(value, "nanosecond", 0)
    return value.date().isoformat() if whole else value.isoformat()


def _flat_arguments(signature: inspect.Signature, bound: inspect.BoundArguments) -> dict[str, Any]:
    """Arguments by name; those of `**kwargs` beside the named ones."""
    out: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            out.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            out["_args_"] = list(value)
        else:
            out[name] = value
    return out
