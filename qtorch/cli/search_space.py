"""Hydra's own sweep syntax as a space to search in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.tracking.trials.space import Choice, Space, Span

TAGS = ("log",)
HOW = (
    "give one value or more to search: 'model.optimizer.lr=tag(log, interval(1e-4, 1e-2))', "
    "'model.network.num_layers=range(1, 4)' or model.network.hidden_size=32,64,128."
)


@dataclass(frozen=True)
class Searched:
    """The command's overrides: those that stay, and the space of the others."""

    fixed: tuple[str, ...]
    space: Space

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """A job's overrides, for one point of the space."""
        return [*self.fixed, *(f"{name}={_text(params[name])}" for name in self.space)]


def searched(
    arguments: Sequence[str], params: Mapping[str, Any] | None, config_loader: Any = None
) -> Searched:
    """The overrides of a search. `params` (from a file) come first, the command's own win.

    `a,b` and `choice(a, b)` are values to choose from, `range(1, 10, 2)` numbers (the end is not
    one of them, as everywhere in Hydra), `interval(0.1, 0.5)` all between, `int(interval(1, 9))`
    whole ones with both ends; `tag(log, ...)` searches on a logarithmic scale. Raises ConfigError
    where nothing is to be searched, or what cannot be.
    """
    parser = OverridesParser.create(config_loader=config_loader)
    listed = [f"{name}={text}" for name, text in (params or {}).items()]
    own = parser.parse_overrides([*listed, *arguments])
    last = {o.get_key_element().lstrip("+"): o for o in own}
    fixed, space = [], {}
    for override in own:
        name = override.get_key_element()
        if last[name.lstrip("+")] is not override:
            continue
        if override.is_sweep_override():
            space[name] = _part(name, override)
        elif not override.is_hydra_override():
            fixed.append(str(override.input_line))
    if not space:
        raise ConfigError(f"the search has no space: {HOW}")
    return Searched(tuple(fixed), space)


def _part(name: str, override: Override) -> Choice | Span:
    value = override.value()
    tags: set[str] = getattr(value, "tags", set())
    _check_tags(name, tags)
    log = "log" in tags
    if isinstance(value, IntervalSweep):
        return _interval(name, value, log)
    if isinstance(value, RangeSweep) and not value.shuffle:
        return _range(name, value, log)
    options = tuple(dict.fromkeys(override.sweep_string_iterator()))
    if log:
        raise ConfigError(f"{name}: tag(log, ...) goes with interval and range, not with choice.")
    if not options:
        raise ConfigError(f"{name}={override.get_value_string()} leaves nothing to choose from.")
    return Choice(options)


def _interval(name: str, value: IntervalSweep, log: bool) -> Span:
    low, high = value.start, value.end
    if low is None or high is None or not low < high:
        raise ConfigError(f"{name}: interval({low}, {high}) is empty; the lower end comes first.")
    integer = isinstance(low, int) and isinstance(high, int)
    _check_log(name, low, log)
    return Span(low, high, integer=integer, log=log)


def _range(name: str, value: RangeSweep, log: bool) -> Span:
    start, stop, step = value.start, value.stop, value.step
    if start is None or stop is None or not (step > 0 and start < stop):
        raise ConfigError(f"{name}: range({start}, {stop}, {step}) is empty or falls.")
    integer = all(isinstance(v, int) for v in (start, stop, step))
    number = sum(1 for _ in value.range())
    high = start + (number - 1) * step
    _check_log(name, start, log)
    if log and not (integer and step == 1):
        raise ConfigError(f"{name}: tag(log, range(...)) needs whole numbers and steps of 1.")
    return Span(start, high, integer=integer, log=log, step=None if log else step)


def _check_tags(name: str, tags: Iterable[str]) -> None:
    for tag in tags:
        if tag not in TAGS:
            raise ConfigError(f"{name}: {unknown_name('tag', tag, TAGS)}")


def _check_log(name: str, low: float, log: bool) -> None:
    if log and low <= 0:
        raise ConfigError(f"{name}: a logarithmic scale begins above 0, not at {low}.")


def _text(value: Any) -> str:
    return repr(float(value)) if isinstance(value, float) else str(value)
