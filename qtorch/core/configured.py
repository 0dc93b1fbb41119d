"""Objects that remember the configuration that they were built from."""

from __future__ import annotations

import datetime
import enum
import functools
import inspect
from abc import ABCMeta
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, Self, TypeVar

from qtorch.core.errors import ArgumentError, ConfigError, check_name
from qtorch.core.names import import_path
from qtorch.core.plain import (
    convert_tree,
    is_numpy_scalar,
    is_plain_scalar,
    resolve_config,
)

T = TypeVar("T")


class ConfiguredMeta(ABCMeta):
    """Metaclass of Configured: constructors get OmegaConf's configs as dicts and lists."""

    def suggest_place(cls, name: str) -> str | None:
        """Return how to write an argument that belongs to a part of the object, for messages.

        A class overrides it with a class method.
        """
        return None

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        args = tuple(resolve_config(a) for a in args)
        return super().__call__(*args, **{k: resolve_config(v) for k, v in kwargs.items()})


class Configured(metaclass=ConfiguredMeta):
    """Base class of objects built from a configuration; it stores the constructor's arguments.

    `to_config()` returns them as plain data, so that a task, a saved model and a run's record
    describe an object with the same mapping that builds it. An unknown argument raises
    ArgumentError with the nearest valid name, unless the constructor takes `**kwargs`.
    Constructors must not modify their arguments.
    """

    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        signature = constructor_signature(cls)
        check_arguments(cls, signature, kwargs)
        try:
            bound_arguments = signature.bind_partial(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError(f"{cls.__name__}: {error}") from error
        self._arguments = _flatten_arguments(signature, bound_arguments)
        return self

    def __repr__(self) -> str:
        arguments = getattr(self, "_arguments", {})
        texts = (
            f"{name}={' '.join(repr(value).split())[:80]}" for name, value in arguments.items()
        )
        return f"{type(self).__name__}({', '.join(texts)})"

    def to_config(self) -> dict[str, Any]:
        """Return `{"_target_": import path of the class, argument: plain value, ...}`.

        Raises ConfigError if an argument is a live object that no configuration can describe.
        """
        config: dict[str, Any] = plain_value(self._arguments, type(self).__name__)
        return {"_target_": import_path(type(self)), **config}


def copy_attributes(instance: T) -> T:
    """Return a shallow copy with all attributes, also those that a pickle leaves out."""
    other: T = object.__new__(type(instance))
    vars(other).update(vars(instance))
    return other


def constructor_signature(cls: type) -> inspect.Signature:
    """Return the signature of a class's `__init__` without `self`.

    `inspect.signature(cls)` would return that of `__new__` if the class defines one.
    """
    init = getattr(cls, "__init__")  # noqa: B009 - mypy rejects plain access to `cls.__init__`
    parameters = list(inspect.signature(init).parameters.values())[1:]
    return inspect.Signature(parameters)


def check_arguments(
    target: Callable[..., Any], signature: inspect.Signature, kwargs: Mapping[str, Any]
) -> None:
    """Raise ArgumentError with the nearest name for a keyword that the signature does not take."""
    kinds = inspect.Parameter
    if any(p.kind is kinds.VAR_KEYWORD for p in signature.parameters.values()):
        return
    valid_names = [
        n
        for n, p in signature.parameters.items()
        if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    ]
    for name in kwargs:
        title = getattr(target, "__qualname__", repr(target))
        if name not in valid_names and isinstance(target, ConfiguredMeta):
            place = target.suggest_place(name)
            if place is not None:
                raise ArgumentError(f"unknown argument of {title} {name!r}. Did you mean {place}?")
        check_name(f"argument of {title}", name, valid_names, limit=40, error=ArgumentError)


def plain_value(value: Any, location: str = "value") -> Any:
    """Convert a value to plain data (None, bool, int, float, str, list, dict).

    Classes and functions become their import paths, dates ISO text. Raises ConfigError for a live
    object; the message names its `location`.
    """
    return convert_tree(value, _plain_part, location)


def describe_value(value: Any) -> Any:
    """Convert a value to plain data for a reader: an object without a configuration is its name."""
    return convert_tree(value, _describe_part)


def _describe_part(value: Any, location: str) -> Any:
    if isinstance(value, Configured):
        try:
            return value.to_config()
        except ConfigError:
            return {"_target_": import_path(type(value)), **value._arguments}
    if is_plain_scalar(value) or isinstance(value, Mapping | list | tuple):
        return value
    return getattr(value, "__qualname__", None) or f"<{type(value).__qualname__}>"


def _plain_part(value: Any, location: str) -> Any:
    if is_plain_scalar(value):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, Mapping | list | tuple):
        return value
    if isinstance(value, Configured):
        return value.to_config()
    if is_numpy_scalar(value):
        return value.item()
    if isinstance(value, datetime.date):
        return _date_text(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, slice):  # a segment of dates, for which a list means the same
        return [value.start, value.stop]
    if isinstance(value, functools.partial):
        positional = {"_args_": value.args} if value.args else {}
        target = import_path(value.func)
        return {"_target_": target, "_partial_": True, **positional, **value.keywords}
    if isinstance(value, type) or inspect.isfunction(value):
        return import_path(value)
    raise ConfigError(
        f"{location} is a live {type(value).__name__}, which cannot be stored as configuration. "
        "Write it as {'_target_': 'package.module.Class', ...} or as a plain value."
    )


def _date_text(value: datetime.date) -> str:
    """Format a date (a pandas Timestamp too) as ISO text, without the time if it is midnight."""
    if not isinstance(value, datetime.datetime):
        return value.isoformat()
    if value != value:  # NaT, which has no time
        return value.isoformat()
    is_midnight = value.time() == datetime.time() and not getattr(value, "nanosecond", 0)
    return value.date().isoformat() if is_midnight else value.isoformat()


def _flatten_arguments(
    signature: inspect.Signature, bound_arguments: inspect.BoundArguments
) -> dict[str, Any]:
    """Return the arguments by name, with those of `**kwargs` beside the named ones."""
    flat: dict[str, Any] = {}
    for name, value in bound_arguments.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            flat.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            flat["_args_"] = list(value)
        else:
            flat[name] = value
    return flat
