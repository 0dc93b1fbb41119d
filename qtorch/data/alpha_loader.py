"""Loaders of Qlib's two feature sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.data.columns import Columns
from qtorch.data.features import alpha158, alpha158_from_config, alpha360, market_features
from qtorch.data.loader import QlibDataLoader
from qtorch.data.panel import Panel
from qtorch.data.window_columns import FIELDS, WindowColumns

FEATURE = "feature"
STEPS = 60


class Alpha158DL(QlibDataLoader):
    """Alpha158's features under the group "feature"; `config` adds or replaces groups.

    `market`: indices whose `market_features` come behind them.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        filter_pipe: Sequence[Any] | None = None,
        swap_level: bool = True,
        freq: str | Mapping[str, str] = "day",
        inst_processors: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        columns: Sequence[str] | None = None,
        market: Sequence[str] = (),
        source: Any = None,
    ) -> None:
        own, ours = chosen(alpha158(), columns), market_features(market)
        super().__init__(
            {FEATURE: (own[0] + ours[0], own[1] + ours[1]), **(config or {})},
            filter_pipe,
            swap_level,
            freq,
            inst_processors,
            source=source,
        )

    @staticmethod
    def get_feature_config(
        config: Mapping[str, Any] | None = None,
    ) -> tuple[list[str], list[str]]:
        """Expressions and names of Qlib's `{"kbar": {}, "price": {...}, "rolling": {...}}`."""
        return alpha158() if config is None else alpha158_from_config(dict(config))


class Alpha360DL(QlibDataLoader):
    """Alpha360's features under the group "feature", as windows of six fields.

    No column is computed before somebody asks for it by name. `config` adds or replaces groups;
    one that replaces "feature" is computed like any other expressions.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        filter_pipe: Sequence[Any] | None = None,
        swap_level: bool = True,
        freq: str | Mapping[str, str] = "day",
        inst_processors: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        columns: Sequence[str] | None = None,
        source: Any = None,
    ) -> None:
        self._windowed = FEATURE not in (config or {})
        super().__init__(
            {FEATURE: chosen(alpha360(), columns), **(config or {})},
            filter_pipe,
            swap_level,
            freq,
            inst_processors,
            source=source,
        )

    @staticmethod
    def get_feature_config() -> tuple[list[str], list[str]]:
        """Expressions and names of the 360 columns."""
        return alpha360()

    def needs(self, group: str, expressions: Mapping[str, str]) -> tuple[int | None, int]:
        if group == FEATURE and self._windowed:
            return STEPS - 1, 0
        return super().needs(group, expressions)

    def fields_of_group(self, group: str, expressions: Mapping[str, str]) -> tuple[str, ...]:
        if group == FEATURE and self._windowed:
            return FIELDS
        return super().fields_of_group(group, expressions)

    def columns_of(
        self,
        group: str,
        bars: Panel,
        span: slice,
        expressions: Mapping[str, str],
        others: Panel | None = None,
    ) -> Columns:
        if group != FEATURE or not self._windowed:
            return super().columns_of(group, bars, span, expressions, others)
        first = max(0, span.start - STEPS + 1)
        dates = bars.calendar[[first, span.stop - 1]]
        seen = bars.select(start=dates[0], end=dates[1])
        columns = WindowColumns(seen, num_steps=STEPS, lead=span.start - first)
        names = tuple(expressions)
        return columns if names == columns.names else columns.keep(names)


def chosen(
    features: tuple[Sequence[str], Sequence[str]], columns: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Some of the features by name, in the set's own order; all if `columns` is None."""
    expressions, names = features
    if columns is None:
        return list(expressions), list(names)
    for name in columns:
        if name not in names:
            raise ConfigError(unknown_name("feature", str(name), names))
    wanted = set(columns)
    kept = [(e, n) for e, n in zip(expressions, names, strict=True) if n in wanted]
    return [e for e, _ in kept], [n for _, n in kept]
