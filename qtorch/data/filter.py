"""Dynamic universes: filters that say on which days an instrument belongs."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError, DataError, unknown_name
from qtorch.core.instantiate import init_instance_by_config, plain
from qtorch.core.trust import trusted_type
from qtorch.data.expression import evaluate
from qtorch.data.panel import Panel

MODULE = "qtorch.data.filter"


@trusted_type
class DynamicFilter(Configured, ABC):
    """One rule of a `filter_pipe`: between two dates, instruments that fail it are no members.

    Dates are inclusive, None is open; outside them membership stays as it is. The rule of day t
    may see what its expression sees. Answers to qlib/data/filter.py (SeriesDFilter).
    """

    fstart_time: Any = None
    fend_time: Any = None

    @abstractmethod
    def passes(self, bars: Panel) -> Tensor:
        """`[D, N]` bool: which days pass the rule."""

    def expressions(self) -> tuple[str, ...]:
        """The expressions of the rule, so that their fields and history are loaded."""
        return ()

    def members(self, bars: Panel) -> Tensor:
        """The panel's membership `[D, N]` after this rule."""
        span = bars.rows(self.fstart_time, self.fend_time)
        mask = bars.mask.clone()
        mask[span] &= self.passes(bars)[span]
        return mask


class NameDFilter(DynamicFilter):
    """Instruments whose name matches a regular expression (from its beginning)."""

    def __init__(self, name_rule_re: str, fstart_time: Any = None, fend_time: Any = None) -> None:
        try:
            re.compile(name_rule_re)
        except re.error as error:
            raise ConfigError(f"{name_rule_re!r} is no regular expression: {error}.") from error
        self.name_rule_re = name_rule_re
        self.fstart_time = fstart_time
        self.fend_time = fend_time

    def passes(self, bars: Panel) -> Tensor:
        fits = [re.match(self.name_rule_re, name) is not None for name in bars.instruments]
        return torch.tensor(fits, device=bars.device).expand(bars.mask.shape)


class ExpressionDFilter(DynamicFilter):
    """Days on which an expression is true (not zero), `"$close > 5"` for one.

    A missing value is not true (Qlib takes it for true). `keep` says that an instrument with no
    stored day between the dates stays a member there; it has no rows there either way.
    """

    def __init__(
        self,
        rule_expression: str,
        fstart_time: Any = None,
        fend_time: Any = None,
        keep: bool = False,
    ) -> None:
        self.rule_expression = rule_expression
        self.fstart_time = fstart_time
        self.fend_time = fend_time
        self.keep = keep

    def expressions(self) -> tuple[str, ...]:
        return (self.rule_expression,)

    def passes(self, bars: Panel) -> Tensor:
        value = evaluate([self.rule_expression], bars).values[:, :, 0]
        return (value != 0) & ~value.isnan()


_QLIB_NAMES = {"filter_start_time": "fstart_time", "filter_end_time": "fend_time"}


def build_filters(pipe: Sequence[Any] | None) -> list[DynamicFilter]:
    """The filters of a `filter_pipe`: objects, configurations, or Qlib's `to_config` dicts."""
    pipe = plain(pipe)
    if pipe is None:
        return []
    if isinstance(pipe, str | Mapping) or not isinstance(pipe, Sequence):
        raise ConfigError(f"filter_pipe must be a list of filters, got {pipe!r:.80}.")
    return [_build(item) for item in pipe]


def _build(item: Any) -> DynamicFilter:
    if isinstance(item, Mapping) and "filter_type" in item:
        given = {_QLIB_NAMES.get(k, k): v for k, v in item.items() if k != "filter_type"}
        kinds = {"NameDFilter": NameDFilter, "ExpressionDFilter": ExpressionDFilter}
        if item["filter_type"] not in kinds:
            raise ConfigError(unknown_name("filter_type", str(item["filter_type"]), kinds))
        item = {"class": item["filter_type"], "kwargs": given}
    made = init_instance_by_config(item, MODULE, accept_types=DynamicFilter)
    if not isinstance(made, DynamicFilter):
        raise DataError(f"{type(made).__name__} is no filter of instruments.")
    return made
