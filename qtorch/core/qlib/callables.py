"""Qlib's classes and functions as a program calls them: with Qlib's names and arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from qtorch.core.configured import constructor_signature
from qtorch.core.errors import ArgumentError, ConfigError
from qtorch.core.names import import_object
from qtorch.core.qlib.notes import Notes
from qtorch.core.qlib.table import Entry
from qtorch.core.qlib.translation import translate_config


def adapt_callable(entry: Entry) -> Any:
    """Return what a name of Qlib is here, as Qlib's programs call it.

    It is our own class or function if that takes Qlib's arguments. Else it translates them: a class
    is then a subclass of ours, whose call returns an instance of ours, so that `isinstance` and
    subclasses work.
    """
    target = import_object(str(entry.target))
    has_rules = entry.arguments or entry.settings or entry.defaults
    if not has_rules or not callable(target):
        return target
    if isinstance(target, type):
        return _adapt_class(entry, target)

    @functools.wraps(target)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _build(entry, target, args, kwargs)

    return call


def _build(entry: Entry, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call our class or function with Qlib's arguments."""
    arguments = {**_name_arguments(entry, target, args), **kwargs}
    if len(arguments) < len(args) + len(kwargs):
        raise ArgumentError(f"{entry.title}: an argument is given by its place and by its name.")
    notes = Notes()
    config = translate_config({"_target_": entry.name, **arguments}, notes, entry.title)
    notes.log_all()
    function = import_object(str(config.pop("_target_")))
    return function(**config)


def _name_arguments(entry: Entry, target: Callable[..., Any], args: Any) -> dict[str, Any]:
    """Return positional arguments by their names: those of ours, which has Qlib's order."""
    if not args:
        return {}
    if not entry.same:
        raise ArgumentError(
            f"{entry.title} is {entry.target} here: pass its arguments by their names."
        )
    if isinstance(target, type):
        names = list(constructor_signature(target).parameters)
    else:
        names = list(inspect.signature(target).parameters)
    if len(args) > len(names):
        raise ArgumentError(f"{entry.title} takes {len(names)} arguments; got {len(args)}.")
    return dict(zip(names, args, strict=False))


def _adapt_class(entry: Entry, target: type) -> type:
    """Return a subclass of ours that is called with Qlib's arguments."""
    base_meta: Any = type(target)

    class Translating(base_meta):  # type: ignore[misc]  # the base is found at run time
        """The class of a class of Qlib's; instances of ours are instances of it."""

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            if cls is adapted:
                return _build(entry, target, args, kwargs)
            return super().__call__(*args, **kwargs)

        def __instancecheck__(cls, instance: Any) -> bool:
            if cls is adapted:
                return isinstance(instance, target)
            return bool(super().__instancecheck__(instance))

    def refuse_subclass(cls: Any, /, **options: Any) -> None:
        if not entry.same:
            raise ConfigError(
                f"{entry.name} is {entry.target} here, with arguments of its own: a subclass of it "
                f"cannot be Qlib's {entry.title}. Derive from {entry.target}, or write a network."
            )
        super(adapted, cls).__init_subclass__(**options)

    adapted: Any = None  # the class, which its own methods refer to
    content: dict[str, Any] = {
        "__module__": target.__module__,
        "__qualname__": target.__qualname__,
        "__doc__": target.__doc__,
        "__init_subclass__": classmethod(refuse_subclass),
    }
    adapted = Translating(entry.title, (target,), content)
    result: type = adapted
    return result
