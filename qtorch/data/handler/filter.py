"""Dynamic universes: filters that decide on which days an instrument is a member."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError, DataError, unknown_name_message
from qtorch.core.instantiate import init_instance_by_config, resolve_config
from qtorch.core.trust import trust_subclasses
from qtorch.data.expression import evaluate
from qtorch.data.expression.requirement import mask_instruments
from qtorch.data.panel.panel import Panel

MODULE = "qtorch.data"


@trust_subclasses
class DynamicFilter(Configured, ABC):
    """A rule of a `filter_pipe`: between two dates, instruments that fail it are not members.

    Dates are inclusive, None is open; outside them the membership is unchanged. The rule of day t
    may use whatever its expression refers to. Corresponds to qlib/data/filter.py (SeriesDFilter).
    """

    fstart_time: Any = None
    fend_time: Any = None

    @abstractmethod
    def passes(self, bars: Panel, mask_bars: Panel | None = None) -> Tensor:
        """Return `[D, N]` bool: the days on which an instrument passes the rule."""

    def expressions(self) -> tuple[str, ...]:
        """Return the rule's expressions, so that their fields and history are loaded."""
        return ()

    def members(self, bars: Panel, mask_bars: Panel | None = None) -> Tensor:
        """Return the panel's membership `[D, N]` after this rule.

        `mask_bars` are the bars of further instruments that expressions may name, also outside the
        universe. `passes` receives them only if the rule's own expressions name an instrument.
        """
        span = bars.rows(self.fstart_time, self.fend_time)
        mask = bars.mask.clone()
        names_instruments = mask_bars is not None and mask_instruments(self.expressions())
        arguments = {"mask_bars": mask_bars} if names_instruments else {}
        mask[span] &= self.passes(bars, **arguments)[span]
        return mask


class NameDFilter(DynamicFilter):
    """Keep instruments whose name matches a regular expression (from its beginning)."""

    def __init__(self, name_rule_re: str, fstart_time: Any = None, fend_time: Any = None) -> None:
        try:
            re.compile(name_rule_re)
        except re.error as error:
            raise ConfigError(
                f"{name_rule_re!r} is not a valid regular expression: {error}."
            ) from error
        self.name_rule_re = name_rule_re
        self.fstart_time = fstart_time
        self.fend_time = fend_time

    def passes(self, bars: Panel, mask_bars: Panel | None = None) -> Tensor:
        is_match = [re.match(self.name_rule_re, name) is not None for name in bars.instruments]
        return torch.tensor(is_match, device=bars.device).expand(bars.mask.shape)


class ExpressionDFilter(DynamicFilter):
    """Keep days on which an expression is true (not zero), e.g. `"$close > 5"`.

    The rule may look at other instruments (`Mask`, `ChangeInstrument`), also at those outside the
    universe. A missing value is false (Qlib treats it as true). With `keep`, an instrument without
    a stored day between the dates stays a member there; it has no rows there in either case.
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

    def passes(self, bars: Panel, mask_bars: Panel | None = None) -> Tensor:
        value = evaluate([self.rule_expression], bars, mask_bars=mask_bars).values[:, :, 0]
        return (value != 0) & ~value.isnan()


_QLIB_NAMES = {"filter_start_time": "fstart_time", "filter_end_time": "fend_time"}


def build_filters(pipe: Sequence[Any] | None) -> list[DynamicFilter]:
    """Build a `filter_pipe` from objects, configurations, or Qlib's `to_config` dicts."""
    pipe = resolve_config(pipe)
    if pipe is None:
        return []
    if isinstance(pipe, str | Mapping) or not isinstance(pipe, Sequence):
        raise ConfigError(f"filter_pipe must be a list of filters, got {pipe!r:.80}.")
    return [_build(item) for item in pipe]


def _build(item: Any) -> DynamicFilter:
    if isinstance(item, Mapping) and "filter_type" in item:
        kwargs = {_QLIB_NAMES.get(k, k): v for k, v in item.items() if k != "filter_type"}
        filter_types = {"NameDFilter": NameDFilter, "ExpressionDFilter": ExpressionDFilter}
        if item["filter_type"] not in filter_types:
            raise ConfigError(
                unknown_name_message("filter_type", str(item["filter_type"]), filter_types)
            )
        item = {"class": item["filter_type"], "kwargs": kwargs}
    dynamic_filter = init_instance_by_config(item, MODULE, accept_types=DynamicFilter)
    if not isinstance(dynamic_filter, DynamicFilter):
        raise DataError(
            f"{type(dynamic_filter).__name__} is not a filter of instruments (DynamicFilter)."
        )
    return dynamic_filter
