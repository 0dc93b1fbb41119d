"""Parse Hydra's sweep syntax as a search space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.tracking.trials.space import Choice, Space, Span

TAGS = ("log",)
HINT = (
    "add at least one parameter to search: 'model.optimizer.lr=tag(log, interval(1e-4, 1e-2))', "
    "'model.network.num_layers=range(1, 4)' or model.network.hidden_size=32,64,128."
)


@dataclass(frozen=True)
class SearchOverrides:
    """The overrides of a search: the fixed ones, and the search space of the others."""

    fixed: tuple[str, ...]
    space: Space

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """Return the overrides of a job for one point of the space."""
        return [*self.fixed, *(f"{name}={_format_value(params[name])}" for name in self.space)]


def parse_search(
    arguments: Sequence[str], params: Mapping[str, Any] | None, config_loader: Any = None
) -> SearchOverrides:
    """Parse the overrides of a search; those of the command take precedence over `params` (a file).

    `a,b` and `choice(a, b)` are categorical values, `range(1, 10, 2)` is a grid of numbers (without
    the end, as everywhere in Hydra), `interval(0.1, 0.5)` a continuous range, `int(interval(1, 9))`
    whole numbers including both ends; `tag(log, ...)` searches on a logarithmic scale. Raises
    ConfigError if the space is empty or cannot be searched.
    """
    parser = OverridesParser.create(config_loader=config_loader)
    param_overrides = [f"{name}={text}" for name, text in (params or {}).items()]
    parsed_overrides = parser.parse_overrides([*param_overrides, *arguments])
    last_overrides = {o.get_key_element().lstrip("+"): o for o in parsed_overrides}
    fixed, space = [], {}
    for override in parsed_overrides:
        name = override.get_key_element()
        if last_overrides[name.lstrip("+")] is not override:
            continue
        if override.is_sweep_override():
            space[name] = _parse_dimension(name, override)
        elif not override.is_hydra_override():
            fixed.append(str(override.input_line))
    if not space:
        raise ConfigError(f"the search has no space: {HINT}")
    return SearchOverrides(tuple(fixed), space)


def _parse_dimension(name: str, override: Override) -> Choice | Span:
    value = override.value()
    tags: set[str] = getattr(value, "tags", set())
    _check_tags(name, tags)
    log = "log" in tags
    if isinstance(value, IntervalSweep):
        return _parse_interval(name, value, log)
    if isinstance(value, RangeSweep) and not value.shuffle:
        return _parse_range(name, value, log)
    options = tuple(dict.fromkeys(override.sweep_string_iterator()))
    if log:
        raise ConfigError(f"{name}: tag(log, ...) is valid for interval and range, not for choice.")
    if not options:
        raise ConfigError(f"{name}={override.get_value_string()} has no values to choose from.")
    return Choice(options)


def _parse_interval(name: str, value: IntervalSweep, log: bool) -> Span:
    low, high = value.start, value.end
    if low is None or high is None or not low < high:
        raise ConfigError(
            f"{name}: interval({low}, {high}) is empty; the lower bound must come first."
        )
    integer = isinstance(low, int) and isinstance(high, int)
    _check_log(name, low, log)
    return Span(low, high, integer=integer, log=log)


def _parse_range(name: str, value: RangeSweep, log: bool) -> Span:
    start, stop, step = value.start, value.stop, value.step
    if start is None or stop is None or not (step > 0 and start < stop):
        raise ConfigError(f"{name}: range({start}, {stop}, {step}) is empty or decreasing.")
    integer = all(isinstance(v, int) for v in (start, stop, step))
    num_values = sum(1 for _ in value.range())
    high = start + (num_values - 1) * step
    _check_log(name, start, log)
    if log and not (integer and step == 1):
        raise ConfigError(f"{name}: tag(log, range(...)) requires whole numbers and a step of 1.")
    return Span(start, high, integer=integer, log=log, step=None if log else step)


def _check_tags(name: str, tags: Iterable[str]) -> None:
    for tag in tags:
        if tag not in TAGS:
            raise ConfigError(f"{name}: {unknown_name('tag', tag, TAGS)}")


def _check_log(name: str, low: float, log: bool) -> None:
    if log and low <= 0:
        raise ConfigError(f"{name}: a logarithmic scale must start above 0; got {low}.")


def _format_value(value: Any) -> str:
    return repr(float(value)) if isinstance(value, float) else str(value)
