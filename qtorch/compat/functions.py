"""Functions of Qlib that programs call and that have no other use here."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from qtorch.core.dates import parse_frequency
from qtorch.core.errors import ConfigError
from qtorch.core.qlib.modules import init
from qtorch.core.session import resolve_path, session

log = logging.getLogger("qtorch.qlib")

CONFIG_NAME = "config.yaml"
ORIGIN, REFERENCE = "origin", "ref"


def get_project_path(config_name: str = CONFIG_NAME, cur_path: str | Path | None = None) -> Path:
    """Return the folder of a file, in `cur_path` or the nearest folder above; FileNotFoundError.

    Difference from Qlib: the search begins in the working folder, not in that of the package.
    """
    start = resolve_path("." if cur_path is None else cur_path).resolve()
    for folder in (start, *start.parents):
        if (folder / config_name).exists():
            return folder
    raise FileNotFoundError(f"no {config_name} in {start} or a folder above it.")


def get_or_create_path(path: str | Path | None = None, return_dir: bool = False) -> str | Path:
    """Return the path of a file or folder; its folder, or itself, is created if it is missing.

    Without a path it is a new temporary file or folder.
    """
    if path is None:
        if return_dir:
            return tempfile.mkdtemp(prefix="qtorch-")
        handle, name = tempfile.mkstemp(prefix="qtorch-")
        os.close(handle)
        return name
    full_path = resolve_path(path)
    (full_path if return_dir else full_path.parent).mkdir(parents=True, exist_ok=True)
    return path


def auto_init(**kwargs: Any) -> Any:
    """Initialize by `config.yaml` of the project's folder, or without one by Qlib's defaults.

    The file is found from `cur_path` (default: the working folder) upwards. It has the arguments of
    `qlib.init`; with `conf_type: ref` those of the file `qlib_cfg` and, over them, those of the
    section `qlib_cfg_update`. `kwargs` are arguments too and count most. A session that has a
    data folder is left as it is, unless `skip_if_reg=False`.
    """
    start = kwargs.pop("cur_path", None)
    if kwargs.pop("skip_if_reg", True) and session().provider_uri is not None:
        return session()
    try:
        path = get_project_path(cur_path=start) / CONFIG_NAME
    except FileNotFoundError:
        return init(**kwargs)
    settings = {**_read_settings(path), **kwargs}
    log.info("settings of %s", path)
    return init(**settings)


def _read_settings(path: Path) -> dict[str, Any]:
    settings = _read_mapping(path)
    kind = settings.pop("conf_type", ORIGIN)
    if kind == ORIGIN:
        return settings
    if kind != REFERENCE:
        raise ConfigError(f"{path}: conf_type is {kind!r}; expected {ORIGIN} or {REFERENCE}.")
    shared, changes = settings.get("qlib_cfg"), settings.get("qlib_cfg_update") or {}
    if not shared:
        return dict(changes)
    is_home = str(shared).startswith("~")
    file: str | Path = str(shared) if is_home else path.parent / str(shared)
    return {**_read_mapping(resolve_path(file)), **changes}


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as settings of qlib.init: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: expected the arguments of qlib.init, got {content!r:.60}.")
    return dict(content)


@contextmanager
def class_casting(obj: Any, cls: type) -> Iterator[None]:
    """Let an object have another class inside a `with` block.

    Unlike Qlib's this restores the class also if the block raises.
    """
    own_class = obj.__class__
    obj.__class__ = cls
    try:
        yield
    finally:
        obj.__class__ = own_class


def get_module_logger(module_name: str, level: int | None = None) -> logging.Logger:
    """Return a logger; its messages appear with those of qtorch."""
    name = module_name.removeprefix("qlib.")
    logger = logging.getLogger(f"qtorch.qlib.{name}")
    if level is not None:
        logger.setLevel(level)
    return logger


class Freq:
    """A frequency of bars: `count` times `base` ("min", "day", "week", "month")."""

    NORM_FREQ_MONTH, NORM_FREQ_WEEK = "month", "week"
    NORM_FREQ_DAY, NORM_FREQ_MINUTE = "day", "min"

    def __init__(self, freq: str | Freq) -> None:
        self.count, self.base = self.parse(str(freq))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str | Freq):
            return NotImplemented
        return str(self) == str(Freq(other))

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        is_day = (self.count, self.base) == (1, self.NORM_FREQ_DAY)
        return self.base if is_day else f"{self.count}{self.base}"

    @staticmethod
    def parse(freq: str) -> tuple[int, str]:
        """Return count and base: "30min" is (30, "min"), "day" is (1, "day")."""
        return parse_frequency(freq)
