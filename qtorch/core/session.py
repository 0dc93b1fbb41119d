"""The process's defaults: what `qtorch.init(...)` sets, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any

from qtorch.core.errors import ConfigError, unknown_name

REGIONS = ("us", "cn")
TRUSTED_VARIABLE = "QTORCH_TRUSTED"


@dataclass(frozen=True)
class Session:
    """Defaults of the process. A task carries its own data source; these fill what it omits."""

    provider_uri: str | None = None
    region: str = "us"
    tracking_uri: str | None = None
    task_url: str | None = None
    seed: int | None = None
    trusted: tuple[str, ...] = ()


_process = Session()
_local: ContextVar[Session | None] = ContextVar("qtorch_session", default=None)


def session() -> Session:
    """The defaults in force: those of the innermost `session_context`, else the process's."""
    return _local.get() or _process


def init(
    provider_uri: str | None = None,
    region: str | None = None,
    *,
    tracking_uri: str | None = None,
    task_url: str | None = None,
    seed: int | None = None,
    trusted: Sequence[str] = (),
) -> Session:
    """Set this process's defaults; a later call replaces only what it names.

    `provider_uri` is a folder in Qlib's layout, `region` "us" or "cn" (trade unit and price
    limit), `tracking_uri` MLflow's, `task_url` the task pool's, `seed` the default seed,
    `trusted` the packages whose classes stored objects and pool tasks may name.
    """
    global _process
    given = {
        "provider_uri": provider_uri,
        "region": region,
        "tracking_uri": tracking_uri,
        "task_url": task_url,
        "seed": seed,
        "trusted": (*_process.trusted, *_packages(trusted)) if trusted else None,
    }
    _process = _changed(_process, {k: v for k, v in given.items() if v is not None})
    return _process


@contextmanager
def session_context(**changes: Any) -> Iterator[Session]:
    """Other defaults inside a `with` block, in this context only (threads do not inherit it)."""
    token = _local.set(_changed(session(), changes))
    try:
        yield session()
    finally:
        _local.reset(token)


def trusted_packages() -> tuple[str, ...]:
    """Packages allowed beside qtorch's own list: of `init` and of the environment."""
    extra = os.environ.get(TRUSTED_VARIABLE, "")
    return (*session().trusted, *(p.strip() for p in extra.split(",") if p.strip()))


def _packages(trusted: Sequence[str]) -> tuple[str, ...]:
    return (trusted,) if isinstance(trusted, str) else tuple(trusted)


def _changed(base: Session, changes: dict[str, Any]) -> Session:
    valid = [f.name for f in fields(Session)]
    for name in changes:
        if name not in valid:
            raise ConfigError(unknown_name("option of init", name, valid))
    if changes.get("region", "us") not in REGIONS:
        raise ConfigError(unknown_name("region", str(changes["region"]), REGIONS))
    if "provider_uri" in changes and changes["provider_uri"] is not None:
        changes["provider_uri"] = os.path.expanduser(str(changes["provider_uri"]))
    return replace(base, **changes)
