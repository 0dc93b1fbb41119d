"""The default settings of the process, set by `qtorch.init(...)`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qtorch.core.errors import check_name


@dataclass(frozen=True)
class Region:
    """The rules of a market, and how many bars a year has for annual figures.

    `trade_unit`: shares per lot. `limit_threshold`: daily price limit as a fraction, None without
    one. `minutes_per_day`: length of the trading session. Lots and limits as in qlib/config.py.
    """

    trade_unit: int
    limit_threshold: float | None
    days_per_year: int
    weeks_per_year: int
    minutes_per_day: int


# 238 days and 50 weeks are Qlib's, which has them for every region.
REGIONS: dict[str, Region] = {
    "us": Region(1, None, days_per_year=252, weeks_per_year=52, minutes_per_day=390),
    "cn": Region(100, 0.095, days_per_year=238, weeks_per_year=50, minutes_per_day=240),
    "tw": Region(1000, 0.1, days_per_year=238, weeks_per_year=50, minutes_per_day=270),
}
REG_US, REG_CN, REG_TW = REGIONS  # Qlib's names for them
TRUSTED_VARIABLE = "QTORCH_TRUSTED"
PICKLE_VARIABLE = "QTORCH_TRUSTED_PICKLE"  # "1" in commands with trusted_pickle=true
# Set in jobs whose process works in a folder of its own (hydra.job.chdir=true), and their children.
FOLDER_VARIABLE = "QTORCH_FOLDER"
SWEEP_VARIABLE = "QTORCH_SWEEP"  # the ID of the sweep's run, for its jobs
LOCK_VARIABLE = "QTORCH_SWEEP_LOCK"  # the file of the sweep's `CommandLock`, for its jobs
WORKER_LOG_VARIABLE = "QTORCH_WORKER_LOG"  # the log level of a worker's processes
# What qtorch tells its own child processes: no settings of the user's.
CHILD_VARIABLES = (FOLDER_VARIABLE, SWEEP_VARIABLE, LOCK_VARIABLE, WORKER_LOG_VARIABLE)


@dataclass(frozen=True)
class Session:
    """Default settings of the process; a task's own settings override them."""

    provider_uri: str | dict[str, str] | None = None
    region: str = "us"
    tracking_uri: str | None = None
    task_url: str | None = None
    seed: int | None = None
    trusted: tuple[str, ...] = ()
    trusted_pickle: bool = False
    folder: str | None = None


_process = Session()
_local: ContextVar[Session | None] = ContextVar("qtorch_session", default=None)


def session() -> Session:
    """Return the current defaults: of the innermost `session_context`, else of the process."""
    return _local.get() or _process


def set_defaults(
    *, trusted: Sequence[str] = (), folder: str | None = None, **changes: Any
) -> Session:
    """Set defaults of this process; None leaves one as it is. `qtorch.init` describes them."""
    global _process
    packages = (trusted,) if isinstance(trusted, str) else tuple(trusted)
    changes |= {
        "trusted": (*_process.trusted, *packages) if packages else None,
        "folder": folder or _process.folder or _start_folder(),
    }
    _process = _apply_changes(_process, {k: v for k, v in changes.items() if v is not None})
    return _process


@contextmanager
def session_context(**changes: Any) -> Iterator[Session]:
    """Change defaults inside a `with` block; other threads do not see the change."""
    token = _local.set(_apply_changes(session(), changes))
    try:
        yield session()
    finally:
        _local.reset(token)


def resolve_path(path: str | Path) -> Path:
    """Return a path of the user's as an absolute one.

    A relative path starts where the command began, or where `init` was first called; without
    either, in the current folder. `~` is the home folder.
    """
    return Path(session().folder or _start_folder(), Path(path).expanduser())


def _start_folder() -> str:
    """Return the folder in which the command began, or else the current one."""
    return os.environ.get(FOLDER_VARIABLE) or os.getcwd()


def get_trusted_packages() -> tuple[str, ...]:
    """Return the packages that the user trusts, from `init` and from QTORCH_TRUSTED."""
    variable = os.environ.get(TRUSTED_VARIABLE, "")
    return (*session().trusted, *(p.strip() for p in variable.split(",") if p.strip()))


def trusts_pickles() -> bool:
    """Whether the user allows this process to load pickles, by `init` or for this command."""
    return session().trusted_pickle or os.environ.get(PICKLE_VARIABLE) == "1"


def get_region(name: str | None = None) -> Region:
    """Return the rules of a region, by default of the session's; ConfigError if it is unknown."""
    name = session().region if name is None else name
    check_name("region", name, REGIONS)
    return REGIONS[name]


def map_paths(function: Callable[[str], str], provider_uri: Any) -> Any:
    """Apply a function to the folder of a `provider_uri`, or to each of `{frequency: folder}`."""
    if isinstance(provider_uri, Mapping):
        return {str(freq): function(str(folder)) for freq, folder in provider_uri.items()}
    return function(str(provider_uri))


def _apply_changes(base: Session, changes: dict[str, Any]) -> Session:
    valid = [f.name for f in fields(Session)]
    for name in changes:
        check_name("option of init", name, valid)
    check_name("region", changes.get("region", "us"), REGIONS)
    if changes.get("provider_uri") is not None:
        start = changes.get("folder") or base.folder or _start_folder()
        changes["provider_uri"] = map_paths(
            lambda path: str(Path(start, Path(path).expanduser())), changes["provider_uri"]
        )
    return replace(base, **changes)
