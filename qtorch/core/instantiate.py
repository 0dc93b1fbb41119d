"""Objects from configurations: Qlib's `init_instance_by_config`, on Hydra's `instantiate`."""

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

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from qtorch.core.configured import Configured, check_arguments
from qtorch.core.errors import ArgumentError, ConfigError, QtorchError
from qtorch.core.names import dotted_name, load_module, locate
from qtorch.core.trust import check_config, load_pickle

log = logging.getLogger(__name__)

_HYDRA_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


def init_instance_by_config(
    config: Any,
    default_module: str | ModuleType | None = None,
    accept_types: type | tuple[type, ...] = (),
    try_kwargs: Mapping[str, Any] | None = None,
    *,
    stored: bool = False,
    **kwargs: Any,
) -> Any:
    """The object that a configuration describes.

    `config` is an instance of `accept_types` (comes back unchanged); a dict with `_target_`
    (Hydra's keys work) or with `class` / `func` (dotted, bare with `module_path`, or the callable
    itself) and `kwargs`; `"a.b.C"`, or a bare `"C"` of `default_module`; `"file:///abs/x.pkl"`,
    `"file://rel/x.pkl"` or a Path (a pickle, read by the trust rule).

    `kwargs` are passed too; `try_kwargs` where the signature takes them and the configuration
    does not give them. A class that is `Configured` gets nested configurations as they are (it
    builds its parts itself); for others Hydra builds the nested `_target_`s first, unless
    `_recursive_` says otherwise. `stored=True` is for a configuration that comes out of a store:
    every name in it passes the trust rule first.

    Answers to qlib/utils/mod.py; a TypeError raised inside a constructor is never swallowed.
    Raises ConfigError (ArgumentError for a wrong argument) with the nearest name.
    """
    if accept_types != () and isinstance(config, accept_types):
        return config
    if OmegaConf.is_config(config):
        config = plain(config)
    if isinstance(config, Path):
        return load_pickle(_existing(config))
    if isinstance(config, str) and config.startswith("file:"):
        return load_pickle(_existing(_path_of(config)))
    if stored:
        check_config(config if not isinstance(config, str) else {"_target_": config})
    if isinstance(config, Mapping) and "_target_" in config:
        return _build(config, default_module, try_kwargs or {}, kwargs)
    target, given = get_callable_kwargs(config, default_module)
    return _call(target, given, try_kwargs or {}, kwargs)


def get_callable_kwargs(
    config: Any, default_module: str | ModuleType | None = None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The callable that a configuration names, and its keyword arguments."""
    if isinstance(config, str):
        return _callable(locate(config, default_module), config), {}
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"cannot build an object from a {type(config).__name__} ({config!r:.80}); expected a "
            "dict with '_target_' or 'class', a dotted name, or a path."
        )
    if "_target_" in config:
        given = {k: v for k, v in config.items() if k not in _HYDRA_KEYS}
        return _callable(_named(config["_target_"], default_module), config["_target_"]), given
    key = "class" if "class" in config else "func"
    if key not in config:
        raise ConfigError(
            f"this configuration names nothing to build: its keys are {sorted(map(str, config))}. "
            "Give '_target_: package.module.Class', or 'class' with 'kwargs'."
        )
    extra = sorted(set(config) - {"class", "func", "module_path", "kwargs"})
    if extra:
        raise ConfigError(
            f"{config[key]!r} is configured by '{key}' and 'kwargs', but {extra} stand beside "
            "them; put them into 'kwargs', or use '_target_'."
        )
    module = config.get("module_path") or default_module
    return _callable(_named(config[key], module), config[key]), dict(config.get("kwargs") or {})


def _named(name: Any, module: str | ModuleType | None) -> Any:
    if not isinstance(name, str):
        return name
    return locate(name, module)


def _callable(thing: Any, name: Any) -> Callable[..., Any]:
    if not callable(thing):
        raise ConfigError(f"{name!r} is a {type(thing).__name__}, not a class or function.")
    return thing  # type: ignore[no-any-return]  # callable() does not say of what


def _build(
    config: Mapping[str, Any],
    default_module: str | ModuleType | None,
    try_kwargs: Mapping[str, Any],
    kwargs: Mapping[str, Any],
) -> Any:
    target, given = get_callable_kwargs(config, default_module)
    nested = isinstance(target, type) and issubclass(target, Configured)
    recursive = bool(config.get("_recursive_", not nested))
    positional = list(config.get("_args_", ()))
    if recursive:
        given = {k: _nested(v) for k, v in given.items()}
        positional = [_nested(v) for v in positional]
    call = functools.partial(target, *positional) if positional else target
    if config.get("_partial_", False):
        merged = {**given, **kwargs}
        _check(target, merged)
        return functools.partial(call, **merged)
    return _call(call, given, try_kwargs, kwargs)


def _nested(value: Any) -> Any:
    """A nested value with its own targets built: by Hydra where it is plain data."""
    if isinstance(value, Mapping):
        if "_target_" not in value:
            return {k: _nested(v) for k, v in value.items()}
        if _is_plain(value):
            return _by_hydra(value)
        return init_instance_by_config(value)
    if isinstance(value, list | tuple):
        return type(value)(_nested(v) for v in value)
    return value


def _by_hydra(config: Mapping[str, Any]) -> Any:
    locate(str(config["_target_"]))  # its error names the nearest, Hydra's does not
    try:
        return hydra.utils.instantiate(dict(config), _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, QtorchError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise ConfigError(str(error).splitlines()[-1] or str(error)) from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def _call(
    target: Callable[..., Any],
    given: Mapping[str, Any],
    try_kwargs: Mapping[str, Any],
    kwargs: Mapping[str, Any],
) -> Any:
    doubled = set(given) & set(kwargs)
    if doubled:
        raise ArgumentError(f"{_title(target)} is given {sorted(doubled)} twice.")
    merged = {**given, **kwargs}
    tried = _accepted(target, try_kwargs)
    merged = {**{k: v for k, v in tried.items() if k not in merged}, **merged}
    _check(target, merged)
    return target(**merged)


def _check(target: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """ArgumentError for an unknown argument (before the call: its own TypeErrors pass)."""
    signature = _signature(target)
    if signature is not None:
        check_arguments(target, signature, kwargs)


def _signature(target: Callable[..., Any]) -> inspect.Signature | None:
    try:
        if isinstance(target, type) and issubclass(target, Configured):
            from qtorch.core.configured import constructor_signature

            return constructor_signature(target)
        return inspect.signature(target)
    except (ValueError, TypeError):
        return None  # a builtin without a signature


def _accepted(target: Callable[..., Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    signature = _signature(target)
    if signature is None:
        return {}
    parameters = signature.parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(kwargs)
    return {k: v for k, v in kwargs.items() if k in parameters}


def _title(target: Callable[..., Any]) -> str:
    return getattr(target, "__qualname__", repr(target))


def auto_filter_kwargs(func: Callable[..., Any], warning: bool = True) -> Callable[..., Any]:
    """`func` that leaves out (and by default warns of) keywords which it does not take."""

    @functools.wraps(func)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        accepted = _accepted(func, kwargs)
        if warning:
            for name in kwargs.keys() - accepted.keys():
                log.warning(
                    "%s does not take %r=%r; it is left out.", _title(func), name, kwargs[name]
                )
        return func(*args, **accepted)

    return filtered


def flatten_dict(nested: Mapping[Any, Any], parent_key: str = "", sep: str = ".") -> dict[str, Any]:
    """A nested mapping as one level: `{"a": {"b": 1}}` gives `{"a.b": 1}`; lists stay."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{parent_key}{sep}{key}" if parent_key else str(key)
        if isinstance(value, Mapping) and value:
            flat.update(flatten_dict(value, name, sep))
        else:
            flat[name] = value
    return flat


def fill_placeholder(config: Any, values: Mapping[str, Any]) -> Any:
    """A copy of `config` in which strings like `"<MODEL>"` are replaced by their values.

    A string `"<dataset.kwargs.segments.train.0>"` takes the value at that path of `config`
    itself. A placeholder that nothing matches stays, with a warning. Qlib's function writes
    into its argument; this one does not.
    """
    for name in values:
        if not re.fullmatch(r"<[^<>]+>", name):
            raise ConfigError(f"a placeholder is written '<NAME>', got {name!r}.")

    def fill(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {k: fill(v) for k, v in part.items()}
        if isinstance(part, list | tuple):
            return type(part)(fill(v) for v in part)
        if isinstance(part, str) and (match := re.fullmatch(r"<([^<>]+)>", part)):
            return values[part] if part in values else _at_path(config, match[1], part)
        return part

    return fill(config)


def _at_path(config: Any, path: str, placeholder: str) -> Any:
    for key in path.split("."):
        try:
            config = config[int(key)] if isinstance(config, list | tuple) else config[key]
        except (KeyError, ValueError, IndexError, TypeError):
            log.warning("the placeholder %s matches nothing and stays as it is.", placeholder)
            return placeholder
    return config


def plain(config: Any) -> Any:
    """An OmegaConf configuration as plain containers, interpolations resolved; else unchanged."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def _path_of(uri: str) -> Path:
    parsed = urlparse(uri)
    path = unquote(parsed.path)
    return Path(parsed.netloc + path) if parsed.netloc else Path(path)


def _existing(path: Path) -> Path:
    full = path.expanduser()
    if not full.is_file():
        raise ConfigError(f"there is no file {str(path)!r} to load an object from.")
    return full


__all__ = [
    "auto_filter_kwargs",
    "dotted_name",
    "fill_placeholder",
    "flatten_dict",
    "get_callable_kwargs",
    "init_instance_by_config",
    "load_module",
    "locate",
    "plain",
]
