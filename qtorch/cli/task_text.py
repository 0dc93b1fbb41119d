"""Tasks of a pool as text: what a person calls their model, how long ago, how long still."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qtorch.task.query import STATUSES

if TYPE_CHECKING:
    from qtorch.task.slot import View

KEYS = ("_target_", "class", "func")


def model_of(definition: Any) -> str:
    """The network's name where the model has one, else the model's."""
    model = definition.get("model") if isinstance(definition, Mapping) else None
    if not isinstance(model, Mapping):
        return _last(model)
    options = model if "_target_" in model else model.get("kwargs") or {}
    network = options.get("network")
    return (_name(network) if network is not None else "") or _name(model)


def counts_text(stat: Mapping[str, int]) -> str:
    """`3 waiting, 40 done`."""
    return ", ".join(f"{stat[s]} {s}" for s in STATUSES if stat.get(s))


def counts_of(views: Iterable[View]) -> dict[str, int]:
    """What all places of a worker have done, by how it ended."""
    totals: dict[str, int] = {}
    for view in views:
        for name, number in view.counts.items():
            totals[name] = totals.get(name, 0) + number
    return totals


def duration(seconds: float | None) -> str:
    """`4.2 s`, `3:05`, `1:02:07`."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _name(config: Any) -> str:
    if isinstance(config, Mapping):
        return _last(next((config[k] for k in KEYS if config.get(k)), None))
    return _last(config)


def _last(name: Any) -> str:
    return name.rpartition(".")[2] if isinstance(name, str) else ""
