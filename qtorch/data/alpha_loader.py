"""Data loaders for Qlib's feature sets Alpha158 and Alpha360."""

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
    """Load Alpha158's features as the group "feature"; `config` adds or replaces groups.

    `market`: indices whose `market_features` are appended to the features.
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
        features, index_features = select_features(alpha158(), columns), market_features(market)
        super().__init__(
            {
                FEATURE: (features[0] + index_features[0], features[1] + index_features[1]),
                **(config or {}),
            },
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
        """Return expressions and names for Qlib's `{"kbar": {}, "price": {...}, ...}`."""
        return alpha158() if config is None else alpha158_from_config(dict(config))


class Alpha360DL(QlibDataLoader):
    """Load Alpha360's features as the group "feature", stored as windows of six fields.

    A column is only computed if it is requested by name. `config` adds or replaces groups; a group
    that replaces "feature" is computed like any other expressions.
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
        self._uses_windows = FEATURE not in (config or {})
        super().__init__(
            {FEATURE: select_features(alpha360(), columns), **(config or {})},
            filter_pipe,
            swap_level,
            freq,
            inst_processors,
            source=source,
        )

    @staticmethod
    def get_feature_config() -> tuple[list[str], list[str]]:
        """Return expressions and names of the 360 columns."""
        return alpha360()

    def group_reach(self, group: str, expressions: Mapping[str, str]) -> tuple[int | None, int]:
        if group == FEATURE and self._uses_windows:
            return STEPS - 1, 0
        return super().group_reach(group, expressions)

    def group_fields(self, group: str, expressions: Mapping[str, str]) -> tuple[str, ...]:
        if group == FEATURE and self._uses_windows:
            return FIELDS
        return super().group_fields(group, expressions)

    def compute_columns(
        self,
        group: str,
        bars: Panel,
        span: slice,
        expressions: Mapping[str, str],
        mask_bars: Panel | None = None,
    ) -> Columns:
        if group != FEATURE or not self._uses_windows:
            return super().compute_columns(group, bars, span, expressions, mask_bars)
        first = max(0, span.start - STEPS + 1)
        dates = bars.calendar[[first, span.stop - 1]]
        window_bars = bars.select(start=dates[0], end=dates[1])
        columns = WindowColumns(window_bars, num_steps=STEPS, lead=span.start - first)
        names = tuple(expressions)
        return columns if names == columns.names else columns.keep(names)


def select_features(
    features: tuple[Sequence[str], Sequence[str]], columns: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Select features by name in the feature set's order; all of them if `columns` is None."""
    expressions, names = features
    if columns is None:
        return list(expressions), list(names)
    for name in columns:
        if name not in names:
            raise ConfigError(unknown_name("feature", str(name), names))
    column_set = set(columns)
    pairs = [(e, n) for e, n in zip(expressions, names, strict=True) if n in column_set]
    return [e for e, _ in pairs], [n for _, n in pairs]
