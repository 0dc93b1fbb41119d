"""The ready-made handlers of Qlib: Alpha158 and Alpha360, with a label on close or on vwap."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from qtorch.data.alpha_loader import Alpha158DL, Alpha360DL
from qtorch.data.features import DEFAULT_LABEL, DEFAULT_VWAP_LABEL
from qtorch.data.handler import DataHandlerLP
from qtorch.data.loader import QlibDataLoader

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


class _Alpha(DataHandlerLP):
    """Common base of the Alpha handlers: a feature loader plus a label."""

    loader: ClassVar[type[Alpha158DL] | type[Alpha360DL]]
    label_config: ClassVar[tuple[Sequence[str], Sequence[str]]] = DEFAULT_LABEL

    def get_label_config(self) -> tuple[list[str], list[str]]:
        """Return the expressions and the names of the label."""
        expressions, names = self.label_config
        return list(expressions), list(names)

    def _build_loader(
        self,
        label: Any,
        columns: Sequence[str] | None,
        filter_pipe: Sequence[Any] | None,
        freq: str,
        inst_processors: Sequence[Any] | None,
        **loader_options: Any,
    ) -> QlibDataLoader:
        return self.loader(
            {"label": self.get_label_config() if label is None else label},
            filter_pipe,
            freq=freq,
            inst_processors=inst_processors,
            columns=columns,
            **loader_options,
        )


class Alpha158(_Alpha):
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
    `qtorch.data.features.market_features`); MASTER's gate reads them.
    """

    loader = Alpha158DL

    def __init__(
        self,
        instruments: Any = "all",
        start_time: Any = None,
        end_time: Any = None,
        freq: str = "day",
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
        drop_raw: bool = False,
        allow_wide_fit: bool = False,
        init_data: bool = False,
        fetch_orig: bool = True,
        source: Any = None,
        cache: bool | str | Path = False,
    ) -> None:
        loader = self._build_loader(
            label, columns, filter_pipe, freq, inst_processors, market=market
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
        )


class Alpha158vwap(Alpha158):
    """Alpha158 with the label on vwap, for signals that are traded at the day's average price."""

    label_config = DEFAULT_VWAP_LABEL


class Alpha360(_Alpha):
    """The last 60 days of open, high, low, close, vwap and volume over today's close or volume.

    The arguments are those of Alpha158. The 360 columns are only computed if they are requested by
    name: a batch is a window `[60, 6]` of the raw fields that is normalised when it is gathered.
    """

    loader = Alpha360DL

    def __init__(
        self,
        instruments: Any = "all",
        start_time: Any = None,
        end_time: Any = None,
        freq: str = "day",
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
        drop_raw: bool = False,
        allow_wide_fit: bool = False,
        init_data: bool = False,
        fetch_orig: bool = True,
        source: Any = None,
        cache: bool | str | Path = False,
    ) -> None:
        loader = self._build_loader(label, columns, filter_pipe, freq, inst_processors)
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
        )


class Alpha360vwap(Alpha360):
    """Alpha360 with the label on vwap."""

    label_config = DEFAULT_VWAP_LABEL
