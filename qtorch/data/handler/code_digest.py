"""A hash of the user's code that computes features, and of every value that the code refers to."""

from __future__ import annotations

import datetime
import dis
import functools
import hashlib
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError
from qtorch.core.plain import is_plain_scalar
from qtorch.core.source_files import find_user_modules, source_digests

# Values whose text identifies them.
TEXT_TYPES = (
    *(bytes, complex, range, slice, type(...), re.Pattern, datetime.date, datetime.timedelta),
    *(PurePath, Enum, np.generic, np.dtype, torch.dtype, torch.device, logging.Logger),
)
NATIVE_TYPES = (
    *(BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType, np.ufunc),
    *(GetSetDescriptorType, MemberDescriptorType),
)
WRAPPER_TYPES = (staticmethod, classmethod, property, functools.cached_property)
PANDAS_TYPES = (pd.DataFrame, pd.Series, pd.Index)


def code_digest(objects: Mapping[str, Any]) -> str:
    """Return a hash of functions, classes and values by name, and of all that they refer to.

    For the user's code these are the compiled functions as this process runs them, their closures
    and defaults, the global variables that they use, and the files of the modules with the modules
    that these import. Code of qtorch and of the standard library counts by its name, and code of
    installed packages by its name and the package's version.

    Raises ConfigError for what no hash identifies: a live object such as an open file or a
    network, and code without a source file.
    """
    return _CodeWalk().digest(objects)


def is_user_code(module: str | None) -> bool:
    """Whether a module is neither part of qtorch or the standard library nor installed."""
    return module is not None and any(True for _ in find_user_modules(module))


@functools.cache
def library_version(module: str) -> str:
    """Return the version of an installed package; ConfigError if it has none."""
    top = module.partition(".")[0]
    if top in ("qtorch", *sys.stdlib_module_names):
        return ""
    text = getattr(sys.modules.get(top), "__version__", None)
    try:
        return str(text or version(top))
    except PackageNotFoundError:
        raise ConfigError(f"the package {top!r} has no version") from None


class _CodeWalk:
    """A walk over objects and what they refer to, in an order that depends on the code alone."""

    def __init__(self) -> None:
        self._hasher = hashlib.sha256(str(sys.implementation.cache_tag).encode())
        self._numbers: dict[int, int] = {}  # by id, the order of the first visits
        self._visited_objects: list[Any] = []  # keeps their ids unique
        self._user_modules: set[str] = set()

    def digest(self, objects: Mapping[str, Any]) -> str:
        for name, value in objects.items():
            self._write(name)
            self._add(value, name)
        for module, file_digest in source_digests(sorted(self._user_modules)).items():
            if file_digest is None:
                raise ConfigError(f"there is no source file of the module {module}")
            self._write(module, file_digest)
        return self._hasher.hexdigest()[:32]

    def _write(self, *texts: str) -> None:
        for text in texts:
            content = text.encode(errors="surrogatepass")
            self._hasher.update(b"%d:" % len(content) + content)

    def _add(self, value: Any, place: str) -> None:
        """Add a value; `place` says in error messages where it was met."""
        if is_plain_scalar(value) or isinstance(value, TEXT_TYPES):
            self._write(type(value).__name__, repr(value))
            return
        if not isinstance(value, tuple | frozenset | CodeType):  # these contain no cycles
            if id(value) in self._numbers:
                self._write("visit", str(self._numbers[id(value)]))
                return
            self._numbers[id(value)] = len(self._numbers)
            self._visited_objects.append(value)
        self._write(type(value).__name__)
        for types, add in _METHODS:
            if isinstance(value, types):
                add(self, value, place)
                return
        self._add_instance(value, place)

    # -- code --------------------------------------------------------------------------------------

    def _add_name(self, module: str | None, name: str, place: str) -> bool:
        """Add the name of a function, class or module; return whether it is the user's."""
        if module is None:
            raise ConfigError(f"{place} belongs to no module")
        self._write(module, name)
        if is_user_code(module):
            self._user_modules.add(module)
            return True
        self._write(library_version(module))
        return False

    def _add_module(self, module: ModuleType, place: str) -> None:
        self._add_name(module.__name__, "", place)

    def _add_function(self, function: FunctionType, place: str) -> None:
        # A decorator may have copied `__module__` from another function.
        module = function.__globals__.get("__name__")
        is_users = self._add_name(module, function.__qualname__, place)
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            self._add_cell(cell, f"{place}: {name}")
        self._add(function.__defaults__, f"{place}: a default")
        self._add(function.__kwdefaults__, f"{place}: a default")
        if is_users:
            self._add(function.__code__, place)
            self._add_globals(function, place)

    def _add_cell(self, cell: Any, place: str) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            self._write("empty")
        else:
            self._add(value, place)

    def _add_code(self, code: CodeType, place: str) -> None:
        self._write(code.co_name, code.co_code.hex(), code.co_exceptiontable.hex())
        self._write(f"{code.co_argcount} {code.co_posonlyargcount} {code.co_kwonlyargcount}")
        self._write(*code.co_names, *code.co_varnames, *code.co_freevars, *code.co_cellvars)
        self._add(code.co_consts, place)

    def _add_globals(self, function: FunctionType, place: str) -> None:
        """Add the values of the global names that a function's code uses."""
        codes = list(_iter_codes(function.__code__))
        attributes = sorted({name for code in codes for name in code.co_names})
        names = {
            str(instruction.argval)
            for code in codes
            for instruction in dis.get_instructions(code)
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
        }
        for name in sorted(names & function.__globals__.keys()):
            self._write(name)
            value = function.__globals__[name]
            self._add_reference(value, attributes, f"{place}: {name}", set())

    def _add_reference(
        self, value: Any, attributes: Iterable[str], place: str, modules: set[str]
    ) -> None:
        """Add a value; of a user's module also the attributes with the names that the code uses."""
        self._add(value, place)
        if isinstance(value, ModuleType) and is_user_code(value.__name__):
            if value.__name__ in modules:
                return
            modules.add(value.__name__)
            for name in attributes:
                if name in vars(value):
                    self._write(name)
                    member = vars(value)[name]
                    self._add_reference(member, attributes, f"{place}.{name}", modules)

    def _add_class(self, cls: type, place: str) -> None:
        if not self._add_name(cls.__module__, cls.__qualname__, place):
            return
        self._add(cls.__bases__, f"{place}: a base class")
        for name, value in vars(cls).items():
            is_special = name.startswith("__") and not isinstance(
                value, FunctionType | staticmethod | classmethod | property
            )
            if not is_special and name != "_abc_impl":
                self._write(name)
                self._add(value, f"{cls.__qualname__}.{name}")

    def _add_method(self, method: MethodType, place: str) -> None:
        self._add(method.__func__, place)
        self._add(method.__self__, place)

    def _add_native(self, function: Any, place: str) -> None:
        owner = getattr(function, "__self__", None)
        name = getattr(function, "__qualname__", None) or function.__name__
        self._write(str(getattr(function, "__module__", None)), name)
        if owner is not None and not isinstance(owner, type | ModuleType):
            self._add(owner, place)

    def _add_partial(self, value: functools.partial[Any], place: str) -> None:
        for part in (value.func, value.args, value.keywords):
            self._add(part, place)

    def _add_wrapper(self, value: Any, place: str) -> None:
        for name in ("__func__", "func", "fget", "fset", "fdel"):
            if (function := getattr(value, name, None)) is not None:
                self._add(function, place)

    # -- values ------------------------------------------------------------------------------------

    def _add_mapping(self, mapping: Mapping[Any, Any], place: str) -> None:
        self._write(str(len(mapping)))
        for key, value in mapping.items():
            self._add(key, place)
            self._add(value, f"{place}[{key!r:.40}]")

    def _add_sequence(self, values: list[Any] | tuple[Any, ...], place: str) -> None:
        self._write(str(len(values)))
        for value in values:
            self._add(value, place)

    def _add_set(self, values: set[Any] | frozenset[Any], place: str) -> None:
        if not all(is_plain_scalar(v) or isinstance(v, TEXT_TYPES) for v in values):
            raise ConfigError(f"{place} is a set of objects")
        self._write(str(len(values)), *sorted(repr(v) for v in values))

    def _add_array(self, array: np.ndarray, place: str) -> None:
        self._write(str(array.dtype), str(array.shape))
        if array.dtype.hasobject:
            self._add(array.tolist(), place)
        else:
            self._hasher.update(np.ascontiguousarray(array).tobytes())

    def _add_tensor(self, tensor: Tensor, place: str) -> None:
        self._write(str(tensor.dtype), str(tuple(tensor.shape)))
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._hasher.update(flat.view(torch.uint8).numpy().tobytes())

    def _add_pandas(self, value: Any, place: str) -> None:
        frame = value.to_frame(index=False) if isinstance(value, pd.Index) else value
        self._write(
            str(list(frame.columns)) if isinstance(frame, pd.DataFrame) else str(frame.name)
        )
        self._hasher.update(pd.util.hash_pandas_object(frame).to_numpy().tobytes())

    def _add_instance(self, value: Any, place: str) -> None:
        """Add an object of a user's class (or one with a configuration) by its attributes."""
        wrapped_function = getattr(value, "__wrapped__", None)
        if isinstance(wrapped_function, FunctionType):  # functools.cache and the like
            self._add(wrapped_function, place)
            return
        cls = type(value)
        is_open = isinstance(value, Configured) or is_user_code(cls.__module__)
        if not is_open or not hasattr(value, "__dict__"):
            raise ConfigError(f"{place} is a live {cls.__name__}")
        self._add(cls, place)
        self._add(vars(value), place)


_METHODS: tuple[tuple[Any, Callable[[_CodeWalk, Any, str], object]], ...] = (
    (FunctionType, _CodeWalk._add_function),
    (CodeType, _CodeWalk._add_code),
    (type, _CodeWalk._add_class),
    (ModuleType, _CodeWalk._add_module),
    (MethodType, _CodeWalk._add_method),
    (NATIVE_TYPES, _CodeWalk._add_native),
    (functools.partial, _CodeWalk._add_partial),
    (WRAPPER_TYPES, _CodeWalk._add_wrapper),
    (Mapping, _CodeWalk._add_mapping),
    ((list, tuple), _CodeWalk._add_sequence),
    ((set, frozenset), _CodeWalk._add_set),
    (np.ndarray, _CodeWalk._add_array),
    (Tensor, _CodeWalk._add_tensor),
    (PANDAS_TYPES, _CodeWalk._add_pandas),
)


def _iter_codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _iter_codes(constant)
