"""Format tasks of a pool as text: model names, counts, durations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qtorch.task.query import STATUSES

if TYPE_CHECKING:
    from qtorch.task.slot import SlotStatus

NAME_KEYS = ("_target_", "class", "func")


def model_name(definition: Any) -> str:
    """Return the name of the network if the model has one, else of the model."""
    model = definition.get("model") if isinstance(definition, Mapping) else None
    if not isinstance(model, Mapping):
        return _last_part(model)
    options = model if "_target_" in model else model.get("kwargs") or {}
    network = options.get("network")
    return (_config_name(network) if network is not None else "") or _config_name(model)


def counts_text(stat: Mapping[str, int]) -> str:
    """Format counts by status: `3 waiting, 40 done`."""
    return ", ".join(f"{stat[s]} {s}" for s in STATUSES if stat.get(s))


def total_counts(slots: Iterable[SlotStatus]) -> dict[str, int]:
    """Add up the counts of a worker's slots, by how the tasks ended."""
    totals: dict[str, int] = {}
    for slot in slots:
        for name, number in slot.counts.items():
            totals[name] = totals.get(name, 0) + number
    return totals


def format_duration(seconds: float | None) -> str:
    """Format a duration: `4.2 s`, `3:05`, `1:02:07`."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, remaining_seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02}:{remaining_seconds:02}"
        if hours
        else f"{minutes}:{remaining_seconds:02}"
    )


def _config_name(config: Any) -> str:
    if isinstance(config, Mapping):
        return _last_part(next((config[k] for k in NAME_KEYS if config.get(k)), None))
    return _last_part(config)


def _last_part(name: Any) -> str:
    return name.rpartition(".")[2] if isinstance(name, str) else ""
