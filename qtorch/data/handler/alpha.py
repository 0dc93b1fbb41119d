"""The ready-made handlers of Qlib: Alpha158 and Alpha360, with a label on close or on vwap."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias
from weakref import WeakSet

from qtorch.core.errors import ConfigError, ExpressionError, join_names, unknown_name_message
from qtorch.core.tables import not_text_message
from qtorch.data.expression import expression_fields
from qtorch.data.expression.requirement import max_reach
from qtorch.data.handler.handler import DataHandlerLP
from qtorch.data.handler.loader import QlibDataLoader
from qtorch.data.panel.columns import Columns
from qtorch.data.panel.panel import Panel
from qtorch.data.panel.window_columns import FIELDS, WindowColumns
from qtorch.data.source.base import Source
from qtorch.data.source.derived import DerivedSource

Features: TypeAlias = tuple[list[str], list[str]]
"""Expressions and their names, in the same order."""

log = logging.getLogger(__name__)

FEATURE = "feature"
VWAP = "vwap"
VWAP_HINT = (
    "to compute a substitute, set vwap='(high+low+close)/3' (on the command line "
    "'handler.vwap=\"(high+low+close)/3\"')"
)
# Those that have warned already; an attribute would be part of a user's loader's cache key.
_loaders_without_vwap: WeakSet[AlphaDL] = WeakSet()
_BARE_FIELD = re.compile(r"(?<![\w$.])([A-Za-z_]\w*)(?!\w*\s*\()")
STEPS = 60  # the days of Alpha360's windows

LABEL = "Ref($close, -2)/Ref($close, -1) - 1"
"""The return from tomorrow's close to the next: what a signal at today's close can earn."""
VWAP_LABEL = "Ref($vwap, -2)/Ref($vwap, -1) - 1"
DEFAULT_LABEL: tuple[tuple[str, ...], tuple[str, ...]] = ((LABEL,), ("LABEL0",))
DEFAULT_VWAP_LABEL: tuple[tuple[str, ...], tuple[str, ...]] = ((VWAP_LABEL,), ("LABEL0",))

SELECTED_20 = (
    *("RESI5", "WVMA5", "RSQR5", "KLEN", "RSQR10", "CORR5", "CORD5", "CORR10", "ROC60", "RESI10"),
    *("VSTD5", "RSQR60", "CORR60", "WVMA60", "STD5", "RSQR20", "CORD60", "CORD10", "CORR20"),
    "KLOW",
)
"""The columns of Alpha158 on which Qlib's benchmarks train LSTM, GRU and similar networks."""

_WINDOWS = (5, 10, 20, 30, 60)
_PRICES = ("OPEN", "HIGH", "LOW", "VWAP")
_RANGE = "($high-$low+1e-12)"
_TOP, _BOTTOM = "Greater($open, $close)", "Less($open, $close)"

KBAR = {
    "KMID": "($close-$open)/$open",
    "KLEN": "($high-$low)/$open",
    "KMID2": f"($close-$open)/{_RANGE}",
    "KUP": f"($high-{_TOP})/$open",
    "KUP2": f"($high-{_TOP})/{_RANGE}",
    "KLOW": f"({_BOTTOM}-$low)/$open",
    "KLOW2": f"({_BOTTOM}-$low)/{_RANGE}",
    "KSFT": "(2*$close-$high-$low)/$open",
    "KSFT2": f"(2*$close-$high-$low)/{_RANGE}",
}
"""The shape of one day's bar."""


def _up_down_shares(field: str) -> dict[str, Callable[[int], str]]:
    """Build the shares of rises and falls in a field's absolute changes, and their difference."""
    rise, fall = f"{field}-Ref({field}, 1)", f"Ref({field}, 1)-{field}"

    def ratio(top: str) -> Callable[[int], str]:
        return lambda d: f"{top}/(Sum(Abs({rise}), {d})+1e-12)".replace("#", str(d))

    up, down = f"Sum(Greater({rise}, 0), #)", f"Sum(Greater({fall}, 0), #)"
    return {"P": ratio(up), "N": ratio(down), "D": ratio(f"({up}-{down})")}


_CLOSE_MOVES, _VOLUME_MOVES = _up_down_shares("$close"), _up_down_shares("$volume")
_WEIGHTED_MOVE = "Abs($close/Ref($close, 1)-1)*$volume"

ROLLING: dict[str, Callable[[int], str]] = {
    "ROC": lambda d: f"Ref($close, {d})/$close",
    "MA": lambda d: f"Mean($close, {d})/$close",
    "STD": lambda d: f"Std($close, {d})/$close",
    "BETA": lambda d: f"Slope($close, {d})/$close",
    "RSQR": lambda d: f"Rsquare($close, {d})",
    "RESI": lambda d: f"Resi($close, {d})/$close",
    "MAX": lambda d: f"Max($high, {d})/$close",
    "LOW": lambda d: f"Min($low, {d})/$close",
    "QTLU": lambda d: f"Quantile($close, {d}, 0.8)/$close",
    "QTLD": lambda d: f"Quantile($close, {d}, 0.2)/$close",
    "RANK": lambda d: f"Rank($close, {d})",
    "RSV": lambda d: f"($close-Min($low, {d}))/(Max($high, {d})-Min($low, {d})+1e-12)",
    "IMAX": lambda d: f"IdxMax($high, {d})/{d}",
    "IMIN": lambda d: f"IdxMin($low, {d})/{d}",
    "IMXD": lambda d: f"(IdxMax($high, {d})-IdxMin($low, {d}))/{d}",
    "CORR": lambda d: f"Corr($close, Log($volume+1), {d})",
    "CORD": lambda d: f"Corr($close/Ref($close,1), Log($volume/Ref($volume, 1)+1), {d})",
    "CNTP": lambda d: f"Mean($close>Ref($close, 1), {d})",
    "CNTN": lambda d: f"Mean($close<Ref($close, 1), {d})",
    "CNTD": lambda d: f"Mean($close>Ref($close, 1), {d})-Mean($close<Ref($close, 1), {d})",
    "SUMP": _CLOSE_MOVES["P"],
    "SUMN": _CLOSE_MOVES["N"],
    "SUMD": _CLOSE_MOVES["D"],
    "VMA": lambda d: f"Mean($volume, {d})/($volume+1e-12)",
    "VSTD": lambda d: f"Std($volume, {d})/($volume+1e-12)",
    "WVMA": lambda d: f"Std({_WEIGHTED_MOVE}, {d})/(Mean({_WEIGHTED_MOVE}, {d})+1e-12)",
    "VSUMP": _VOLUME_MOVES["P"],
    "VSUMN": _VOLUME_MOVES["N"],
    "VSUMD": _VOLUME_MOVES["D"],
}
"""Rolling columns: the expression for a window by the key of `include` and `exclude`, which is also
the column's prefix, but Qlib's LOW creates MIN5, MIN10, ..."""


def alpha158(
    *,
    kbar: bool = True,
    price_fields: Sequence[str] = _PRICES,
    price_windows: Iterable[int] = (0,),
    volume_windows: Iterable[int] = (),
    windows: Sequence[int] = _WINDOWS,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Features:
    """Return expressions and names of Alpha158, or of a part or an extension of it.

    `price_fields` and `volume_windows` add raw prices over today's close and volumes over today's
    volume at each of the windows' lags; `include` and `exclude` select the rolling columns by the
    keys of `ROLLING`. All values are known at the close of their date.

    Raises ConfigError for an unknown key.
    """
    for key in [*(include or ()), *exclude]:
        if key not in ROLLING:
            raise ConfigError(unknown_name_message("rolling column", key, ROLLING, limit=40))
    columns = dict(KBAR) if kbar else {}
    lags = list(price_windows)
    for field in price_fields:
        columns |= {
            f"{field.upper()}{d}": _lag_expression(field.lower(), d, "$close") for d in lags
        }
    columns |= {
        f"VOLUME{d}": _lag_expression("volume", d, "($volume+1e-12)") for d in volume_windows
    }
    for key, expression in ROLLING.items():
        if key not in exclude and (include is None or key in include):
            prefix = "MIN" if key == "LOW" else key
            columns |= {f"{prefix}{d}": expression(d) for d in windows}
    return list(columns.values()), list(columns)


def alpha158_from_config(config: dict[str, dict[str, object]]) -> Features:
    """Return the features of a config of Qlib's `Alpha158DL`: keys kbar, price, volume, rolling.

    A key enables its part, with Qlib's defaults for missing options (price and volume: lags 0 to
    4). Raises ConfigError for keys that Qlib does not know either.
    """
    known_options = {
        "kbar": set[str](),
        "price": {"windows", "feature"},
        "volume": {"windows"},
        "rolling": {"windows", "include", "exclude"},
    }
    for part, options in config.items():
        if part not in known_options:
            raise ConfigError(unknown_name_message("part of Alpha158", part, known_options))
        for option in options or {}:
            if option not in known_options[part]:
                raise ConfigError(
                    unknown_name_message(f"option of {part}", option, known_options[part])
                )
    price, volume, rolling = (config.get(k) or {} for k in ("price", "volume", "rolling"))
    fields = price.get("feature", ("OPEN", "HIGH", "LOW", "CLOSE", "VWAP"))
    return alpha158(
        kbar="kbar" in config,
        price_fields=_strings(fields) if "price" in config else (),
        price_windows=_numbers(price.get("windows", range(5))),
        volume_windows=_numbers(volume.get("windows", range(5))) if "volume" in config else (),
        windows=_numbers(rolling.get("windows", _WINDOWS)) if "rolling" in config else (),
        include=_strings(rolling["include"]) if rolling.get("include") is not None else None,
        exclude=_strings(rolling.get("exclude") or ()),
    )


def market_features(instruments: Sequence[str]) -> Features:
    """Return expressions and names of index features, the same for every instrument, 21 per index.

    They are the day's return, and mean and standard deviation of the returns and of the amounts
    (close times volume, divided by today's) of the last 5, 10, 20, 30 and 60 days. The amounts of
    an index without volume are NaN.

    This is the market information of MASTER (Li et al., AAAI 2024), which uses Chinese indices.
    Raises ConfigError for a name in place of a list of names.
    """
    if isinstance(instruments, str):
        raise ConfigError(f"market must be a list of instruments, got {instruments!r}.")
    for name in instruments:
        if not isinstance(name, str):
            raise ConfigError(not_text_message(name, "instrument of market"))
    daily_return, amount = "$close/Ref($close, 1)-1", "$close*$volume"
    columns = {"RET": daily_return}
    for d in _WINDOWS:
        columns |= {
            f"RETMEAN{d}": f"Mean({daily_return}, {d})",
            f"RETSTD{d}": f"Std({daily_return}, {d})",
        }
    for d in _WINDOWS:
        columns |= {
            f"AMOUNTMEAN{d}": f"Mean({amount}, {d})/({amount}+1e-12)",
            f"AMOUNTSTD{d}": f"Std({amount}, {d})/({amount}+1e-12)",
        }
    pairs = [(n, e, i) for i in instruments for n, e in columns.items()]
    return [f"Mask({e}, '{i}')" for _, e, i in pairs], [f"{n}_{i}" for n, _, i in pairs]


def alpha360() -> Features:
    """Return expressions and names of Alpha360: the last 60 bars over today's close and volume.

    Feature-major: CLOSE59..CLOSE0, then OPEN, HIGH, LOW, VWAP, VOLUME.
    """
    columns: dict[str, str] = {}
    for field in FIELDS:
        scale = "($volume+1e-12)" if field == "volume" else "$close"
        columns |= {
            f"{field.upper()}{d}": _lag_expression(field, d, scale) for d in reversed(range(STEPS))
        }
    return list(columns.values()), list(columns)


def select_features(
    features: tuple[Sequence[str], Sequence[str]], columns: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Select features by name in the feature set's order; all of them if `columns` is None."""
    expressions, names = features
    if columns is None:
        return list(expressions), list(names)
    for name in columns:
        if name not in names:
            raise ConfigError(unknown_name_message("feature", str(name), names))
    column_set = set(columns)
    pairs = [(e, n) for e, n in zip(expressions, names, strict=True) if n in column_set]
    return [e for e, _ in pairs], [n for _, n in pairs]


def _lag_expression(field: str, lag: int, scale: str) -> str:
    return f"Ref(${field}, {lag})/{scale}" if lag else f"${field}/{scale}"


def _strings(value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"expected a list of names, got {value!r}.")
    return tuple(str(v) for v in value)


def _numbers(value: object) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"expected a list of whole numbers, got {value!r}.")
    return tuple(int(v) for v in value)


# -- loaders ---------------------------------------------------------------------------------------


class AlphaDL(QlibDataLoader):
    """Common base of the Alpha loaders: what stands for a vwap that the bars do not have.

    `vwap`: an expression of the same bar's fields, such as `(high+low+close)/3`; None for NaN.
    """

    def __init__(
        self,
        features: Features,
        config: Mapping[str, Any] | None,
        filter_pipe: Sequence[Any] | None,
        swap_level: bool,
        freq: str | Mapping[str, str] | None,
        inst_processors: Sequence[Any] | Mapping[str, Any] | None,
        *,
        vwap: str | None,
        source: Any,
    ) -> None:
        self.vwap = None if vwap is None else _BARE_FIELD.sub(r"$\1", vwap)
        self._has_own_features = FEATURE in (config or {})
        super().__init__(
            {FEATURE: features, **(config or {})},
            filter_pipe,
            swap_level,
            freq,
            inst_processors,
            source=source,
        )

    def check_settings(self, instruments: Any = None, source: Source | None = None) -> None:
        max_reach([] if self.vwap is None else [self.vwap])
        super().check_settings(instruments, source)

    def field_source(
        self, source: Source | None, fields: Mapping[str, Mapping[str, str]]
    ) -> Source:
        source = super().field_source(source, fields)
        columns = [
            (name, group == FEATURE and not self._has_own_features)
            for group, expressions in fields.items()
            for name, expression in expressions.items()
            if VWAP in expression_fields(expression)
        ]
        if not columns or source.find_fields([VWAP], self.freq):
            return source
        own_columns = [name for name, is_alpha in columns if not is_alpha]
        if self.vwap is None and own_columns:
            raise ExpressionError(
                f"the bars have no field vwap, which {join_names(own_columns, 3)} reads; "
                f"{VWAP_HINT}."
            )
        if self.vwap is None and self not in _loaders_without_vwap:
            _loaders_without_vwap.add(self)
            log.warning(
                "the bars have no field vwap, so %s %s NaN; %s.",
                join_names([name for name, _ in columns], 3),
                "is" if len(columns) == 1 else "are",
                VWAP_HINT,
            )
        return DerivedSource(source, {VWAP: self.vwap})


class Alpha158DL(AlphaDL):
    """Load Alpha158's features as the group "feature"; `config` adds or replaces groups.

    `market`: indices whose `market_features` are appended to the features.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        filter_pipe: Sequence[Any] | None = None,
        swap_level: bool = True,
        freq: str | Mapping[str, str] | None = None,
        inst_processors: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        columns: Sequence[str] | None = None,
        market: Sequence[str] = (),
        vwap: str | None = None,
        source: Any = None,
    ) -> None:
        features, index_features = select_features(alpha158(), columns), market_features(market)
        super().__init__(
            (features[0] + index_features[0], features[1] + index_features[1]),
            config,
            filter_pipe,
            swap_level,
            freq,
            inst_processors,
            vwap=vwap,
            source=source,
        )

    @staticmethod
    def get_feature_config(
        config: Mapping[str, Any] | None = None,
    ) -> tuple[list[str], list[str]]:
        """Return expressions and names for Qlib's `{"kbar": {}, "price": {...}, ...}`."""
        return alpha158() if config is None else alpha158_from_config(dict(config))


class Alpha360DL(AlphaDL):
    """Load Alpha360's features as the group "feature", stored as windows of six fields.

    A column is only computed if it is requested by name. `config` adds or replaces groups; a group
    that replaces "feature" is computed like any other expressions.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        filter_pipe: Sequence[Any] | None = None,
        swap_level: bool = True,
        freq: str | Mapping[str, str] | None = None,
        inst_processors: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        columns: Sequence[str] | None = None,
        vwap: str | None = None,
        source: Any = None,
    ) -> None:
        self._uses_windows = FEATURE not in (config or {})
        super().__init__(
            select_features(alpha360(), columns),
            config,
            filter_pipe,
            swap_level,
            freq,
            inst_processors,
            vwap=vwap,
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


# -- handlers --------------------------------------------------------------------------------------

# Qlib's own defaults (qlib/contrib/data/handler.py). The infer processors have no fields_group
# and therefore also process the label: Fillna fills it, so DropnaLabel has nothing to drop.
LEARN_PROCESSORS: tuple[Any, ...] = (
    {"class": "DropnaLabel"},
    {"class": "CSZScoreNorm", "kwargs": {"fields_group": "label"}},
)
INFER_PROCESSORS_360: tuple[Any, ...] = (
    {"class": "ProcessInf", "kwargs": {}},
    {"class": "ZScoreNorm", "kwargs": {}},
    {"class": "Fillna", "kwargs": {}},
)


class AlphaHandler(DataHandlerLP):
    """Common base of the Alpha handlers: the label that their loaders add to the features."""

    label_config: ClassVar[tuple[Sequence[str], Sequence[str]]] = DEFAULT_LABEL

    def get_label_config(self) -> tuple[list[str], list[str]]:
        """Return the expressions and the names of the label."""
        expressions, names = self.label_config
        return list(expressions), list(names)

    def _loader_config(self, label: Any) -> dict[str, Any]:
        return {"label": self.get_label_config() if label is None else label}


class Alpha158(AlphaHandler):
    """158 features of the last 60 days' bars; the label is the return from tomorrow's close on.

    The label's return ends at the close of the day after tomorrow.

    `instruments`: a universe or a list (Qlib's default is "csi500", here it is every instrument).
    `infer_processors`, `learn_processors`, `shared_processors`, `process_type`, `drop_raw`, the
    fit window, `source` and `cache` are documented in DataHandlerLP. `label`: expressions, or
    (expressions, names).
    `columns` selects some of the 158 features by name; the others are not computed. Columns that a
    FilterCol or DropCol removes are not computed either, as long as the raw data is not requested.
    `market`: names of indices, whether or not they belong to the universe. 21 columns per index,
    the same for all instruments, are appended after the other columns (see
    `qtorch.data.handler.alpha.market_features`); MASTER's gate reads them.
    `vwap`: what stands for a vwap that the bars do not have, such as `(high+low+close)/3`; without
    it VWAP0 is NaN, with a warning, as in Qlib (a label on vwap is an error).
    """

    def __init__(
        self,
        instruments: Any = "all",
        start_time: Any = None,
        end_time: Any = None,
        freq: str | None = None,
        infer_processors: Sequence[Any] = (),
        learn_processors: Sequence[Any] = LEARN_PROCESSORS,
        fit_start_time: Any = None,
        fit_end_time: Any = None,
        process_type: str = DataHandlerLP.PTYPE_A,
        filter_pipe: Sequence[Any] | None = None,
        inst_processors: Sequence[Any] | None = None,
        *,
        shared_processors: Sequence[Any] = (),
        label: Any = None,
        columns: Sequence[str] | None = None,
        market: Sequence[str] = (),
        vwap: str | None = None,
        drop_raw: bool = False,
        allow_wide_fit: bool = False,
        init_data: bool = False,
        fetch_orig: bool = True,
        source: Any = None,
        cache: bool | str | Path = False,
        device: str = "cpu",
    ) -> None:
        loader = Alpha158DL(
            self._loader_config(label),
            filter_pipe,
            freq=freq,
            inst_processors=inst_processors,
            columns=columns,
            market=market,
            vwap=vwap,
        )
        super().__init__(
            instruments,
            start_time,
            end_time,
            loader,
            infer_processors,
            learn_processors,
            shared_processors,
            process_type,
            drop_raw,
            fit_start_time=fit_start_time,
            fit_end_time=fit_end_time,
            allow_wide_fit=allow_wide_fit,
            init_data=init_data,
            fetch_orig=fetch_orig,
            source=source,
            cache=cache,
            device=device,
        )


class Alpha158vwap(Alpha158):
    """Alpha158 with the label on vwap, for signals that are traded at the day's average price."""

    label_config = DEFAULT_VWAP_LABEL


class Alpha360(AlphaHandler):
    """The last 60 days of open, high, low, close, vwap and volume over today's close or volume.

    The arguments are those of Alpha158. The 360 columns are only computed if they are requested by
    name: a batch is a window `[60, 6]` of the raw fields that is normalised when it is gathered.
    """

    def __init__(
        self,
        instruments: Any = "all",
        start_time: Any = None,
        end_time: Any = None,
        freq: str | None = None,
        infer_processors: Sequence[Any] = INFER_PROCESSORS_360,
        learn_processors: Sequence[Any] = LEARN_PROCESSORS,
        fit_start_time: Any = None,
        fit_end_time: Any = None,
        filter_pipe: Sequence[Any] | None = None,
        inst_processors: Sequence[Any] | None = None,
        *,
        process_type: str = DataHandlerLP.PTYPE_A,
        shared_processors: Sequence[Any] = (),
        label: Any = None,
        columns: Sequence[str] | None = None,
        vwap: str | None = None,
        drop_raw: bool = False,
        allow_wide_fit: bool = False,
        init_data: bool = False,
        fetch_orig: bool = True,
        source: Any = None,
        cache: bool | str | Path = False,
        device: str = "cpu",
    ) -> None:
        loader = Alpha360DL(
            self._loader_config(label),
            filter_pipe,
            freq=freq,
            inst_processors=inst_processors,
            columns=columns,
            vwap=vwap,
        )
        super().__init__(
            instruments,
            start_time,
            end_time,
            loader,
            infer_processors,
            learn_processors,
            shared_processors,
            process_type,
            drop_raw,
            fit_start_time=fit_start_time,
            fit_end_time=fit_end_time,
            allow_wide_fit=allow_wide_fit,
            init_data=init_data,
            fetch_orig=fetch_orig,
            source=source,
            cache=cache,
            device=device,
        )


class Alpha360vwap(Alpha360):
    """Alpha360 with the label on vwap."""

    label_config = DEFAULT_VWAP_LABEL
