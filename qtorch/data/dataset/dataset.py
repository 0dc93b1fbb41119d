"""Datasets: a handler's data by named segments, as frames or as samples for training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeAlias

import pandas as pd
import torch
from torch import Tensor

from qtorch.core.configured import Configured, copy_attributes
from qtorch.core.dates import as_stamp, last_instant, parse_period
from qtorch.core.errors import ConfigError, DataError, check_name, unknown_name_message
from qtorch.core.instantiate import init_instance_by_config, resolve_config
from qtorch.core.serial import Serializable, State
from qtorch.core.terminal import html_summary
from qtorch.core.trust import trust_subclasses
from qtorch.data.dataset.extras import Extra, check_extras
from qtorch.data.dataset.sampler import TSDataSampler
from qtorch.data.dataset.samples import Samples, build_samples, check_segments
from qtorch.data.handler.fetch import CS_ALL, select_groups
from qtorch.data.handler.handler import DK_I, DK_L, DK_R, DataHandler, DataHandlerLP
from qtorch.data.panel.gather import check_fill
from qtorch.data.panel.panel import coverage_dates
from qtorch.data.panel.view import View

log = logging.getLogger(__name__)

Segment: TypeAlias = tuple[Any, Any]
TRAIN = "train"
FEATURE_DTYPES = ("float32", "float16", "bfloat16")


@trust_subclasses
class Dataset(Configured, Serializable):
    """Base class of datasets. A user's dataset implements `prepare`, and `samples` if possible."""


class DatasetH(Dataset):
    """A handler's data, split into named segments.

    `handler`: a DataHandler or its configuration. `segments`: `{name: (start, end)}`, both ends
    inclusive, None is open; a partial date means its whole period (`("2008", "2014-06")` ends with
    June 2014). `prepare` returns what Qlib's `prepare` returns; `samples` returns
    the samples that networks are trained on. If there is a segment "train", the handler's
    processors are fitted on it unless they have a fit window of their own.

    `horizon`: calendar rows that the label looks ahead, if the loader cannot read it from the
    label's expression. Overlapping segments are an error unless `allow_overlap` is set.
    `prepare` passes `fetch_kwargs` to `handler.fetch`. `extras`: named tensors that accompany each
    sample, for networks that request them (`qtorch.data.Concepts` or a user's `Extra`).
    `feature_dtype`: "float16" or "bfloat16" store the processed features in half the memory, on the
    device or on the host; batches are float32 with the rounded values.
    """

    #: Windows of one day: TSDatasetH sets both for longer ones.
    step_len: int = 1
    fillna_type: str = "none"

    def __init__(
        self,
        handler: Any,
        segments: Mapping[str, Any],
        fetch_kwargs: Mapping[str, Any] | None = None,
        *,
        horizon: int | None = None,
        allow_overlap: bool = False,
        extras: Mapping[str, Any] | None = None,
        feature_dtype: str = "float32",
    ) -> None:
        check_name("feature_dtype", feature_dtype, FEATURE_DTYPES)
        self.feature_dtype = str(feature_dtype)
        self.handler: DataHandler = _build_handler(handler)
        self.allow_overlap = allow_overlap
        self.segments = self._validate_segments(segments)
        self.fetch_kwargs = dict(resolve_config(fetch_kwargs) or {})
        if horizon is not None and horizon < 0:
            raise ConfigError(f"horizon is {horizon}; expected a number of bars, at least 0.")
        self.horizon = horizon
        self.extras: dict[str, Extra] = {
            name: init_instance_by_config(extra, accept_types=Extra)
            for name, extra in check_extras(resolve_config(extras)).items()
        }
        # Store the built parts, so that the configuration stays correct after `config(...)`.
        self._arguments = {
            **self._arguments,
            "handler": self.handler,
            "segments": self.segments,
        }

    def _validate_segments(self, segments: Mapping[str, Any]) -> dict[str, Segment]:
        segments = resolve_config(segments)
        if not isinstance(segments, Mapping):
            raise ConfigError(f"segments must be {{name: (start, end)}}, got {segments!r:.80}.")
        spans = {str(name): parse_span(name, value) for name, value in segments.items()}
        if not self.allow_overlap:
            check_segments(spans)
        return spans

    def check_settings(self) -> None:
        """Raise an error for settings that no samples can be built with; no data is loaded."""
        self.handler.check_settings()
        for name, (start, end) in self.segments.items():
            self.handler.check_dates(start, end, f"segment {name!r}")
        self._bind_handler().check_fit_windows()

    # -- data ----------------------------------------------------------------------------------

    def view(self, data_key: str = DK_I, *, groups: Sequence[str] | None = None) -> View:
        """Return the handler's view of a key, with its processors fitted on the train segment."""
        return self._bind_handler().view(data_key, groups=groups)

    def _bind_handler(self) -> DataHandler:
        if TRAIN in self.segments:
            self.handler.bind_train_segment(*self.segments[TRAIN])
        return self.handler

    def prepare(
        self,
        segments: Any,
        col_set: str | Sequence[str] = CS_ALL,
        data_key: str = DK_I,
        *,
        level: str | int | None = "datetime",
        squeeze: bool = False,
        proc_func: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
    ) -> Any:
        """Return the frames of segments: one for a name or for dates, a list for a list of names.

        Dates are a slice, a pair (both inclusive), or whatever `handler.fetch` accepts. Nothing is
        purged here. Raises DataError for a named segment without rows.
        """
        options = {"level": level, "squeeze": squeeze, "proc_func": proc_func, **self.fetch_kwargs}

        def fetch(selector: Any, name: str | None) -> Any:
            handler = self._bind_handler()
            frame = handler.fetch(selector, col_set=col_set, data_key=data_key, **options)
            if name is not None and not len(frame):
                raise DataError(self._empty_segment_message(name, handler.view(data_key)))
            return frame

        return self._prepare_each(segments, fetch)

    def _prepare_each(self, segments: Any, prepare: Callable[[Any, str | None], Any]) -> Any:
        """Call `prepare` for one segment, for each of a list of names, or for dates."""
        segments = resolve_config(segments)
        if isinstance(segments, str) and segments in self.segments:
            return prepare(slice(*self.segments[segments]), segments)
        if isinstance(segments, list | tuple) and all(
            isinstance(s, str) and s in self.segments for s in segments
        ):
            return [prepare(slice(*self.segments[s]), s) for s in segments]
        if isinstance(segments, str) and parse_period(segments) is None:
            raise ConfigError(unknown_name_message("segment", segments, self.segments))
        return prepare(segments, None)

    def _empty_segment_message(self, name: str, view: View) -> str:
        start, end = self.segments[name]
        dates = coverage_dates(view.dates, empty="no rows")
        return f"segment {name!r} ({start}..{end}) has no rows; the data has {dates}."

    # -- samples -------------------------------------------------------------------------------

    def samples(
        self,
        segment: Any = TRAIN,
        *,
        data_key: str = DK_L,
        purge: bool | None = None,
        horizon: int | None = None,
        feature_group: str = "feature",
        label_group: str = "label",
    ) -> Samples:
        """Return the samples of a segment (a name, a slice or a pair of dates) for a network.

        `purge` leaves out samples whose label reaches into the next segment (None: only for the key
        "learn"). The label's reach is `horizon`, else the dataset's horizon, else it is read from
        the label's expression. Raises DataError for a segment without samples.
        """
        name, (start, end) = self._parse_segment(segment)
        view = self.view(data_key)
        should_purge = data_key == DK_L if purge is None else purge
        return build_samples(
            view,
            start=start,
            end=end,
            name=name,
            raw_label=self._load_raw_label(label_group),
            step_len=self.step_len,
            fill=self.fillna_type,
            feature_group=feature_group,
            label_group=label_group,
            rows=self._sample_mask(data_key),
            horizon=self._resolve_horizon(horizon, label_group) if should_purge else 0,
            later_starts=self._later_segment_starts(name, end) if should_purge else (),
            learn=data_key == DK_L,
            extras=self.extras,
            feature_dtype=getattr(torch, self.feature_dtype),
        )

    def _parse_segment(self, segment: Any) -> tuple[str, Segment]:
        segment = resolve_config(segment)
        if isinstance(segment, str):
            if segment not in self.segments:
                raise ConfigError(unknown_name_message("segment", segment, self.segments))
            return segment, self.segments[segment]
        return "the dates", parse_span("segment", segment)

    def _later_segment_starts(self, name: str, end: Any) -> list[Any]:
        """Return the start dates of the segments that begin after this segment's end."""
        if end is None:
            return []
        last = last_instant(end)
        starts = [s for n, (s, _) in self.segments.items() if n != name and s is not None]
        return [s for s in starts if as_stamp(s) > last]

    def _resolve_horizon(self, horizon: int | None, label_group: str) -> int:
        for value in (horizon, self.horizon, self.handler.horizon(label_group)):
            if value is not None:
                return value
        log.warning(
            "cannot tell how far the label looks ahead, so no samples are purged; pass "
            "horizon=... (bars) to the dataset."
        )
        return 0

    def _load_raw_label(self, group: str) -> Any:
        handler = self._bind_handler()
        if isinstance(handler, DataHandlerLP) and handler.from_cast:
            return None
        try:
            return handler.view(DK_R, groups=[group]).groups.get(group)
        except ConfigError:
            return None  # drop_raw=True: the raw label was dropped with the other raw data

    def _sample_mask(self, data_key: str) -> Tensor | None:
        """Return a mask `[D, N]` of the rows that may be samples; None for all."""
        return None

    # -- configuration and storage -------------------------------------------------------------

    def config(
        self,
        *args: Any,
        handler_kwargs: Mapping[str, Any] | None = None,
        segments: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Change the segments, or pass arguments to the handler's `config` (dates, instruments).

        The other arguments are those of `Serializable.config`.
        """
        if handler_kwargs is not None:
            self.handler.config(**handler_kwargs)
        if segments is not None:
            self.segments = self._validate_segments(segments)
            self._arguments = {**self._arguments, "segments": self.segments}
        super().config(*args, **kwargs)

    def setup_data(
        self, handler_kwargs: Mapping[str, Any] | None = None, *, source: Any = None
    ) -> None:
        """Reload the data; `handler_kwargs` are passed to the handler's `setup_data`.

        `init_type="load_state"` in `handler_kwargs` keeps the fitted processors. `source` replaces
        the handler's data source; the processors then stay fitted as well.
        """
        if source is not None:
            self.handler.set_source(source)
        if handler_kwargs is not None:
            self._bind_handler().setup_data(**handler_kwargs)

    def with_handler(self, handler: DataHandler) -> Self:
        """Return a dataset with the same settings on another handler."""
        dataset = copy_attributes(self)
        dataset.handler = handler
        dataset._arguments = {**self._arguments, "handler": handler}
        return dataset

    def fingerprint(self) -> str:
        """Return a hash of the content of the underlying data."""
        return self.handler.fingerprint()

    def to_state(self) -> State:
        """Return the configuration and the fitted parameters of the processors, without data.

        Raises ConfigError if a part has no configuration (e.g. a live DataFrame).
        """
        state = State({"dataset": self.to_config()})
        if isinstance(self.handler, DataHandlerLP):
            processor_state = self.handler.get_fitted_state()
            state.config["handler"], state.tensors = processor_state.config, processor_state.tensors
        return state

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Restore a dataset; data is loaded on first use and the processors are not refitted."""
        dataset = init_instance_by_config(state.config["dataset"])
        if not isinstance(dataset, cls):
            raise DataError(
                f"the state describes a {type(dataset).__name__}, expected a {cls.__name__}."
            )
        if isinstance(dataset.handler, DataHandlerLP):
            dataset.handler.load_fitted_state(State(state.config["handler"], state.tensors))
        return dataset

    def __repr__(self) -> str:
        return f"{type(self).__name__}(handler={self.handler!r}, segments={self.segments})"

    def _repr_html_(self) -> str:
        """Show handler and segments in a notebook; nothing is loaded for that."""
        segments = {name: f"{start} to {end}" for name, (start, end) in self.segments.items()}
        source = getattr(self.handler, "source", None)
        facts = {"handler": repr(self.handler), "source": repr(source)[:200], **segments}
        return html_summary(type(self).__name__, facts)

    # -- Qlib's API ----------------------------------------------------------------------------

    @staticmethod
    def get_min_time(segments: Mapping[str, Segment]) -> Any:
        """Return the earliest start; None if one is open."""
        starts = [s for s, _ in segments.values()]
        return None if not starts or None in starts else min(starts, key=as_stamp)

    @staticmethod
    def get_max_time(segments: Mapping[str, Segment]) -> Any:
        """Return the latest end; None if one is open."""
        ends = [e for _, e in segments.values()]
        return None if not ends or None in ends else max(ends, key=last_instant)


def _build_handler(config: Any) -> DataHandler:
    handler = init_instance_by_config(config, accept_types=DataHandler)
    if not isinstance(handler, DataHandler):
        raise ConfigError(
            f"handler is a {type(handler).__name__}; expected a DataHandler or its configuration. "
            "For a DataFrame use DataHandlerLP.from_df(frame)."
        )
    return handler


def parse_span(name: Any, value: Any) -> Segment:
    """Return `(start, end)` for a pair of dates or a slice."""
    if isinstance(value, slice):
        return value.start, value.stop
    if isinstance(value, list | tuple) and len(value) == 2:
        return value[0], value[1]
    raise ConfigError(f"{name!r} must be two dates (start, end), got {value!r:.80}.")


class TSDatasetH(DatasetH):
    """Windows of the last `step_len` days of each sample, including its own day.

    Windows reach back before the segment's start. `fillna_type` ("none", "ffill",
    "ffill+bfill") selects what a network's window shows for days on which the instrument has no
    row; Qlib's models set "ffill+bfill". `flt_col`: a group with one boolean column; rows where
    it is false or missing are not samples, but windows include them. `prepare` returns a
    `TSDataSampler`, which starts with "none", as Qlib's does.
    """

    DEFAULT_STEP_LEN = 30  # Qlib's

    def __init__(
        self,
        handler: Any,
        segments: Mapping[str, Any],
        step_len: int = DEFAULT_STEP_LEN,
        flt_col: str | None = None,
        fetch_kwargs: Mapping[str, Any] | None = None,
        *,
        fillna_type: str = "ffill+bfill",
        horizon: int | None = None,
        allow_overlap: bool = False,
        extras: Mapping[str, Any] | None = None,
        feature_dtype: str = "float32",
    ) -> None:
        check_fill(fillna_type)
        self.step_len = _check_step_len(step_len)
        self.flt_col = flt_col
        self.fillna_type = fillna_type
        super().__init__(
            handler,
            segments,
            fetch_kwargs,
            horizon=horizon,
            allow_overlap=allow_overlap,
            extras=extras,
            feature_dtype=feature_dtype,
        )

    def prepare(  # type: ignore[override]  # returns samplers, as in Qlib
        self,
        segments: Any,
        col_set: str | Sequence[str] = CS_ALL,
        data_key: str = DK_I,
        *,
        flt_col: str | None = None,
        dtype: Any = None,
    ) -> Any:
        """Return samplers of segments; names, lists and dates as in `DatasetH.prepare`."""

        def sampler(selector: Any, name: str | None) -> TSDataSampler:
            view = self.view(data_key)
            ts_sampler = TSDataSampler(
                view,
                view.date_rows(*parse_span(name or "segment", selector)),
                step_len=self.step_len,
                groups=select_groups(view, col_set) or list(view.groups),
                samples=self._sample_mask(data_key, flt_col),
                dtype=dtype,
            )
            if name is not None and ts_sampler.empty:
                raise DataError(self._empty_segment_message(name, view))
            return ts_sampler

        return self._prepare_each(segments, sampler)

    def check_settings(self) -> None:
        super().check_settings()
        calendar = self.handler.find_calendar()
        if calendar is not None and self.step_len > len(calendar):
            raise ConfigError(
                f"step_len is {self.step_len}, but the data has {len(calendar)} bars of each "
                "instrument: choose a shorter window."
            )
        names = self.handler.data_loader.names()
        if self.flt_col is None or names is None:
            return
        check_name("flt_col (a group of one boolean column)", self.flt_col, names)
        _check_flag_group(self.flt_col, names[self.flt_col])

    def _sample_mask(self, data_key: str, flt_col: str | None = None) -> Tensor | None:
        group = self.flt_col if flt_col is None else flt_col
        if group is None:
            return None
        columns = self.view(data_key).group(group)
        _check_flag_group(group, columns.names)
        value = columns.column(columns.names[0])
        return (value != 0) & ~torch.isnan(value)

    def config(self, *args: Any, step_len: int | None = None, **kwargs: Any) -> None:
        """Extend DatasetH's `config` by another `step_len`."""
        if step_len is not None:
            self.step_len = _check_step_len(step_len)
            self._arguments = {**self._arguments, "step_len": step_len}
        super().config(*args, **kwargs)


def _check_flag_group(group: str, names: Sequence[str]) -> None:
    if len(names) != 1:
        raise ConfigError(f"flt_col={group!r} must be a group of one column, it has {len(names)}.")


def _check_step_len(step_len: int) -> int:
    if step_len < 1:
        raise ConfigError(f"step_len must be at least 1, got {step_len}.")
    return int(step_len)
