"""Qlib's ready handlers: Alpha158 and Alpha360, with the label on close or on vwap."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from qtorch.data.alpha_loader import Alpha158DL, Alpha360DL
from qtorch.data.features import DEFAULT_LABEL, DEFAULT_VWAP_LABEL
from qtorch.data.handler import DataHandlerLP
from qtorch.data.loader import QlibDataLoader

# Qlib's own defaults (qlib/contrib/data/handler.py). Without fields_group the infer processors
# act on the label too: Fillna then fills it, and DropnaLabel finds nothing to drop.
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
    """What the four have in common: a loader of features, and the label."""

    loader: ClassVar[type[Alpha158DL] | type[Alpha360DL]]
    label_config: ClassVar[tuple[Sequence[str], Sequence[str]]] = DEFAULT_LABEL

    def get_label_config(self) -> tuple[list[str], list[str]]:
        """Expressions and names of the label."""
        expressions, names = self.label_config
        return list(expressions), list(names)

    def _build_loader(
        self,
        label: Any,
        columns: Sequence[str] | None,
        filter_pipe: Sequence[Any] | None,
        freq: str,
        inst_processors: Sequence[Any] | None,
        **more: Any,
    ) -> QlibDataLoader:
        return self.loader(
            {"label": self.get_label_config() if label is None else label},
            filter_pipe,
            freq=freq,
            inst_processors=inst_processors,
            columns=columns,
            **more,
        )


class Alpha158(_Alpha):
    """158 features of the last 60 days' bars, and the return from tomorrow's close to the next.

    `instruments`: a universe or a list (Qlib's default is "csi500", here every instrument).
    `infer_processors`, `learn_processors`, `shared_processors`, `process_type`, `drop_raw`, the
    fit window, `source` and `cache` are DataHandlerLP's. `label`: expressions, or (expressions,
    names).
    `columns` takes some of the 158 by name: the others are then not computed; neither are those
    that a FilterCol or DropCol takes out, as long as nobody asks for the raw data.
    `market`: indices by name, of the universe or not; what they did comes behind the other
    columns, 21 of each index and the same for all instruments (see
    `qtorch.data.features.market_features`): the gate of MASTER.
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
    """Alpha158 with the label on vwap: a signal that trades at the day's average price."""

    label_config = DEFAULT_VWAP_LABEL


class Alpha360(_Alpha):
    """The last 60 days of open, high, low, close, vwap and volume, over today's close or volume.

    The arguments are Alpha158's. The 360 columns are never computed unless somebody asks for
    them by name: a batch is a window `[60, 6]` of the raw fields, normalised when it is gathered.
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
