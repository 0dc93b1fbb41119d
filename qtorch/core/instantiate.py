"""Build objects from configurations: Qlib's `init_instance_by_config`, with Hydra's keys too."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlparse

from qtorch.core.configured import Configured, check_arguments, constructor_signature
from qtorch.core.errors import ArgumentError, ConfigError
from qtorch.core.plain import resolve_config as resolve_config
from qtorch.core.qlib.names import qlib_name
from qtorch.core.session import resolve_path
from qtorch.core.trust import load_pickle, locate

log = logging.getLogger(__name__)

_HYDRA_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


def init_instance_by_config(
    config: Any,
    default_module: str | ModuleType | None = None,
    accept_types: type | tuple[type, ...] = (),
    try_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Build the object that a configuration describes.

    `config` is one of:
    - an instance of `accept_types`, which is returned unchanged;
    - a dict with `_target_`, which may use Hydra's other keys too;
    - a dict with `class` or `func` (an import path, a bare name with `module_path`, or the
      callable itself) and `kwargs`;
    - an import path `"a.b.C"`, or a bare name `"C"` in `default_module`;
    - `"file:///abs/x.pkl"`, `"file://rel/x.pkl"` or a Path: a pickle that the user trusts
      (`qtorch.core.trust`);
    - a dict or an import path with the name of a class of Qlib, such as
      `qlib.contrib.model.pytorch_lstm.LSTM`, and Qlib's arguments: it is translated.

    `kwargs` are passed in addition; `try_kwargs` only if the signature takes them and the
    configuration does not set them. A `Configured` class gets nested configurations unchanged,
    because it builds its parts itself. For other classes nested `_target_`s are built first,
    unless `_recursive_` says otherwise. Names in a configuration that was read from a store must
    be trusted.

    Corresponds to qlib/utils/mod.py; a TypeError raised inside a constructor is never swallowed.
    Raises ConfigError (ArgumentError for a wrong argument) with the nearest valid name.
    """
    if accept_types != () and isinstance(config, accept_types):
        return config
    config = resolve_config(config)
    if qlib_name(config) is not None:
        from qtorch.core.qlib.translation import translate_config

        config = translate_config(config)
    if isinstance(config, Path):
        return load_pickle(_require_file(config))
    if isinstance(config, str) and config.startswith("file:"):
        return load_pickle(_require_file(_uri_path(config)))
    if isinstance(config, Mapping) and "_target_" in config:
        return _build(config, default_module, try_kwargs or {}, kwargs)
    target, arguments = get_callable_kwargs(config, default_module)
    return _call(target, arguments, try_kwargs or {}, kwargs)


def get_callable_kwargs(
    config: Any, default_module: str | ModuleType | None = None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the callable that a configuration names, and its keyword arguments."""
    if isinstance(config, str):
        return _import_callable(config, default_module), {}
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"cannot build an object from a {type(config).__name__} ({config!r:.80}); expected a "
            "dict with '_target_' or 'class', an import path, or a file path."
        )
    if "_target_" in config:
        arguments = {k: v for k, v in config.items() if k not in _HYDRA_KEYS}
        return _import_callable(config["_target_"], default_module), arguments
    key = "class" if "class" in config else "func"
    if key not in config:
        raise ConfigError(
            f"the configuration has neither '_target_' nor 'class' (its keys: "
            f"{sorted(map(str, config))}). Write '_target_: package.module.Class', or 'class' "
            "with 'kwargs'."
        )
    extra = sorted(set(config) - {"class", "func", "module_path", "kwargs"})
    if extra:
        raise ConfigError(
            f"the configuration of {config[key]!r} has the keys {extra} beside '{key}' and "
            "'kwargs'; move them into 'kwargs', or use '_target_'."
        )
    module = config.get("module_path") or default_module
    return _import_callable(config[key], module), dict(config.get("kwargs") or {})


def check_config(config: Any, default_module: str | ModuleType | None = None) -> None:
    """Import what a configuration names and check its arguments, without building it.

    Its nested configurations are not checked. Raises ConfigError with the nearest valid name, and
    ArgumentError for an argument that is unknown or, in qtorch's own classes, of another type.
    """
    target, arguments = get_callable_kwargs(config, default_module)
    _check_arguments(target, arguments)
    if str(getattr(target, "__module__", "")).startswith("qtorch."):
        check_types(target, arguments)


def _import_callable(name: Any, module: str | ModuleType | None) -> Callable[..., Any]:
    """Import a class or function by name; a live one is returned unchanged."""
    target = locate(name, module) if isinstance(name, str) else name
    if not callable(target):
        raise ConfigError(f"{name!r} is a {type(target).__name__}, not a class or function.")
    return target  # type: ignore[no-any-return]  # callable() does not narrow the return type


def _build(
    config: Mapping[str, Any],
    default_module: str | ModuleType | None,
    try_kwargs: Mapping[str, Any],
    kwargs: Mapping[str, Any],
) -> Any:
    target, arguments = get_callable_kwargs(config, default_module)
    builds_own_parts = isinstance(target, type) and issubclass(target, Configured)
    is_recursive = bool(config.get("_recursive_", not builds_own_parts))
    positional = list(config.get("_args_", ()))
    if is_recursive:
        arguments = {k: _build_parts(v) for k, v in arguments.items()}
        positional = [_build_parts(v) for v in positional]
    call = functools.partial(target, *positional) if positional else target
    if config.get("_partial_", False):
        all_arguments = {**arguments, **kwargs}
        _check_arguments(target, all_arguments)
        return functools.partial(call, **all_arguments)
    return _call(call, arguments, try_kwargs, kwargs)


def _build_parts(value: Any) -> Any:
    """Build the nested `_target_`s of a value."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            return init_instance_by_config(value)
        return {k: _build_parts(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_build_parts(v) for v in value)
    return value


def _call(
    target: Callable[..., Any],
    arguments: Mapping[str, Any],
    try_kwargs: Mapping[str, Any],
    kwargs: Mapping[str, Any],
) -> Any:
    duplicates = set(arguments) & set(kwargs)
    if duplicates:
        raise ArgumentError(
            f"{_title(target)}: arguments {sorted(duplicates)} are set both in the configuration "
            "and in the call."
        )
    all_arguments = {**_filter_arguments(target, try_kwargs), **arguments, **kwargs}
    _check_arguments(target, all_arguments)
    return target(**all_arguments)


def _check_arguments(target: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ArgumentError for an unknown argument, before the call raises its own TypeErrors."""
    signature = get_signature(target)
    if signature is not None:
        check_arguments(target, signature, kwargs)


def check_types(target: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ArgumentError for a plain value where the annotation names other plain types.

    A number for a text may be a name or a date that YAML has read as a number, and has an error of
    its own.
    """
    signature = get_signature(target)
    parameters = {} if signature is None else signature.parameters
    for name, value in kwargs.items():
        if name not in parameters:  # one of many, as `**parameters`
            continue
        types = str(parameters[name].annotation).replace(" ", "").split("|")
        if not set(types) <= {"int", "float", "str", "bool", "None"} or _fits(value, types):
            continue
        words = " or ".join(_TYPE_WORDS[each] for each in types)
        raise ArgumentError(f"{name} of {_title(target)} is {value!r}; expected {words}.")


_TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "None": "null",
}


def _fits(value: Any, types: list[str]) -> bool:
    if value is None:
        return "None" in types
    if isinstance(value, list | tuple | Mapping):
        return False
    if isinstance(value, str):
        return "str" in types
    if "str" in types or not isinstance(value, bool | int | float):
        return True
    if isinstance(value, bool):
        return "bool" in types
    if "bool" in types and value in (0, 1):
        return True
    return "float" in types or ("int" in types and isinstance(value, int))


def get_signature(target: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature of a callable; None for a built-in without one."""
    try:
        if isinstance(target, type) and issubclass(target, Configured):
            return constructor_signature(target)
        return inspect.signature(target)
    except (ValueError, TypeError):
        return None


def _filter_arguments(target: Callable[..., Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    signature = get_signature(target)
    if signature is None:
        return {}
    parameters = signature.parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(kwargs)
    return {k: v for k, v in kwargs.items() if k in parameters}


def _title(target: Callable[..., Any]) -> str:
    return getattr(target, "__qualname__", repr(target))


def auto_filter_kwargs(func: Callable[..., Any], warning: bool = True) -> Callable[..., Any]:
    """Wrap `func` so that it ignores unknown keyword arguments, by default with a warning."""

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        valid_kwargs = _filter_arguments(func, kwargs)
        if warning:
            for name in kwargs.keys() - valid_kwargs.keys():
                log.warning(
                    "%s does not take %r=%r; ignoring it.", _title(func), name, kwargs[name]
                )
        return func(*args, **valid_kwargs)

    return wrapper


def flatten_dict(d: Mapping[Any, Any], parent_key: str = "", sep: str = ".") -> dict[str, Any]:
    """Flatten a nested mapping: `{"a": {"b": 1}}` becomes `{"a.b": 1}`; lists are unchanged."""
    flat: dict[str, Any] = {}
    for key, value in d.items():
        name = f"{parent_key}{sep}{key}" if parent_key else str(key)
        if isinstance(value, Mapping) and value:
            flat.update(flatten_dict(value, name, sep))
        else:
            flat[name] = value
    return flat


def fill_placeholder(config: Any, values: Mapping[str, Any]) -> Any:
    """Return a copy of `config` in which placeholders such as `"<MODEL>"` are replaced.

    `values` maps placeholders to their values. A placeholder that is a path, such as
    `"<dataset.kwargs.segments.train.0>"`, is replaced by the value at that path of `config`, in
    either form. An unknown placeholder is left as it is, with a warning. Qlib's function modifies
    its argument; this one does not.
    """
    for name in values:
        if not re.fullmatch(r"<[^<>]+>", name):
            raise ConfigError(f"a placeholder must have the form '<NAME>'; got {name!r}.")

    def fill(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {k: fill(v) for k, v in part.items()}
        if isinstance(part, list | tuple):
            return type(part)(fill(v) for v in part)
        if isinstance(part, str) and (match := re.fullmatch(r"<([^<>]+)>", part)):
            return values[part] if part in values else _lookup_path(config, match[1], part)
        return part

    return fill(config)


def _lookup_path(config: Any, path: str, placeholder: str) -> Any:
    for key in path.split("."):
        if key == "kwargs" and isinstance(config, Mapping) and "_target_" in config:
            continue  # a path of Qlib's form in a configuration of Hydra's
        try:
            config = config[int(key)] if isinstance(config, list | tuple) else config[key]
        except (KeyError, ValueError, IndexError, TypeError):
            log.warning("placeholder %s matches nothing; leaving it unchanged.", placeholder)
            return placeholder
    return config


def _uri_path(uri: str) -> Path:
    parts = urlparse(uri)
    path = unquote(parts.path)
    return Path(parts.netloc + path) if parts.netloc else Path(path)


def _require_file(path: Path) -> Path:
    full = resolve_path(path)
    if not full.is_file():
        raise ConfigError(f"cannot load an object from {str(path)!r}: no such file.")
    return full
