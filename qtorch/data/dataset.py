"""Datasets: a handler's data by segments, as frames for people and samples for networks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self, TypeAlias

import pandas as pd
from torch import Tensor

from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError, DataError, unknown_name
from qtorch.core.instantiate import init_instance_by_config, plain
from qtorch.core.serial import Serializable, State
from qtorch.core.trust import trusted_type
from qtorch.data.extras import Extra, check_extras
from qtorch.data.fetch import CS_ALL
from qtorch.data.handler import DataHandlerLP
from qtorch.data.purge import check_segments
from qtorch.data.raw_handler import DK_I, DK_L, DK_R, DataHandler
from qtorch.data.sample_set import Samples
from qtorch.data.segment_samples import build_samples
from qtorch.data.view import View

log = logging.getLogger(__name__)

Segment: TypeAlias = tuple[Any, Any]
TRAIN = "train"


@trusted_type
class Dataset(Configured, Serializable):
    """Base of datasets; one of one's own gives `prepare`, and `samples` if it can."""


class DatasetH(Dataset):
    """A handler's data by named segments.

    `handler`: a DataHandler or its configuration. `segments`: `{name: (start, end)}`, both ends
    inclusive, None open. `prepare` gives what Qlib's gives; `samples` what networks are trained
    on. The segment "train", if there is one, is the fit window of the handler's processors
    unless they were given one.

    `horizon`: calendar rows that the label looks ahead, if the loader cannot read it from the
    label's expression. Overlapping segments are an error unless `allow_overlap`. `fetch_kwargs`
    are passed to `handler.fetch` by `prepare`. `extras`: tensors that go with each sample by
    name, for networks that ask for them (`qtorch.data.Concepts`, or an `Extra` of one's own).
    """

    def __init__(
        self,
        handler: Any,
        segments: Mapping[str, Any],
        fetch_kwargs: Mapping[str, Any] | None = None,
        *,
        horizon: int | None = None,
        allow_overlap: bool = False,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        self.handler: DataHandler = _handler(handler)
        self.allow_overlap = allow_overlap
        self.segments = self._checked(segments)
        self.fetch_kwargs = dict(plain(fetch_kwargs) or {})
        self.horizon = horizon
        self.extras: dict[str, Extra] = {
            name: init_instance_by_config(each, accept_types=Extra)
            for name, each in check_extras(plain(extras)).items()
        }
        # The configuration is that of the parts as they are now, also after `config(...)`.
        self._arguments = {
            **self._arguments,
            "handler": self.handler,
            "segments": self.segments,
        }

    def _checked(self, segments: Mapping[str, Any]) -> dict[str, Segment]:
        segments = plain(segments)
        if not isinstance(segments, Mapping):
            raise ConfigError(f"segments must be {{name: (start, end)}}, got {segments!r:.80}.")
        found = {str(name): span_of(name, value) for name, value in segments.items()}
        if not self.allow_overlap:
            check_segments(found)
        return found

    # -- data ----------------------------------------------------------------------------------

    def view(self, data_key: str = DK_I, *, groups: Sequence[str] | None = None) -> View:
        """The handler's view of a key, its processors fitted on this dataset's train segment."""
        return self._bound().view(data_key, groups=groups)

    def _bound(self) -> DataHandler:
        if TRAIN in self.segments and isinstance(self.handler, DataHandlerLP):
            self.handler.bind_train(*self.segments[TRAIN])
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
        """Frames of segments: a name gives one, a list of names a list; else dates.

        A slice or a pair of dates (inclusive), or whatever `handler.fetch` takes. Nothing is
        purged here. Raises DataError for a named segment without rows.
        """
        options = {"level": level, "squeeze": squeeze, "proc_func": proc_func}
        return self._each(
            segments, lambda which, name: self._frame(which, name, col_set, data_key, options)
        )

    def _each(self, segments: Any, prepare: Callable[[Any, str | None], Any]) -> Any:
        """`prepare` of one segment, of each of a list of names, or of dates."""
        segments = plain(segments)
        if isinstance(segments, str) and segments in self.segments:
            return prepare(slice(*self.segments[segments]), segments)
        if isinstance(segments, list | tuple) and all(
            isinstance(s, str) and s in self.segments for s in segments
        ):
            return [prepare(slice(*self.segments[s]), s) for s in segments]
        if isinstance(segments, str) and not _is_date(segments):
            raise ConfigError(unknown_name("segment", segments, self.segments))
        return prepare(segments, None)

    def _frame(
        self,
        selector: Any,
        name: str | None,
        col_set: str | Sequence[str],
        data_key: str,
        options: Mapping[str, Any],
    ) -> Any:
        handler = self._bound()
        frame = handler.fetch(
            selector,
            col_set=col_set,
            data_key=data_key,
            **{**options, **self.fetch_kwargs},
        )
        if name is not None and not len(frame):
            raise DataError(self._empty(name, handler.view(data_key)))
        return frame

    def _empty(self, name: str, view: View) -> str:
        start, end = self.segments[name]
        days = view.calendar[view.rows.any(1).cpu().numpy()]
        held = f"{days[0]:%Y-%m-%d}..{days[-1]:%Y-%m-%d}" if len(days) else "no rows"
        return f"segment {name!r} ({start}..{end}) holds no row; the data covers {held}."

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
        """The samples of a segment (a name, a slice or a pair of dates) for a network.

        `purge` leaves out samples whose label reaches into the segment behind (None: for the key
        "learn"); the reach is `horizon`, else the dataset's, else read from the label's
        expression. Raises DataError for a segment without samples.
        """
        name, (start, end) = self._dates(segment)
        view = self.view(data_key)
        purged = data_key == DK_L if purge is None else purge
        return build_samples(
            view,
            start=start,
            end=end,
            name=name,
            raw_label=self._raw_label(label_group),
            step_len=self._step_len(),
            fill=self._fill(),
            feature_group=feature_group,
            label_group=label_group,
            rows=self._sample_mask(data_key),
            horizon=self._horizon(horizon, label_group) if purged else 0,
            later_starts=self._starts_behind(name, end) if purged else (),
            learn=data_key == DK_L,
            extras=self.extras,
        )

    def _dates(self, segment: Any) -> tuple[str, Segment]:
        segment = plain(segment)
        if isinstance(segment, str):
            if segment not in self.segments:
                raise ConfigError(unknown_name("segment", segment, self.segments))
            return segment, self.segments[segment]
        return "the dates", span_of("segment", segment)

    def _starts_behind(self, name: str, end: Any) -> list[Any]:
        """The first dates of the segments that begin after this one's end."""
        if end is None:
            return []
        last = pd.Timestamp(end)
        others = [s for n, (s, _) in self.segments.items() if n != name and s is not None]
        return [s for s in others if pd.Timestamp(s) > last]

    def _horizon(self, given: int | None, label_group: str) -> int:
        for each in (given, self.horizon, self.handler.horizon(label_group)):
            if each is not None:
                return each
        log.warning(
            "how far the label looks ahead is not known, so no sample is purged; give the "
            "dataset horizon=... (days)."
        )
        return 0

    def _raw_label(self, group: str) -> Any:
        handler = self._bound()
        if isinstance(handler, DataHandlerLP) and handler.from_cast:
            return None
        try:
            return handler.view(DK_R, groups=[group]).groups.get(group)
        except ConfigError:
            return None  # drop_raw: the label was given up with the rest

    def _sample_mask(self, data_key: str) -> Tensor | None:
        """`[D, N]` bool of the rows that may be samples; None for all."""
        return None

    def _step_len(self) -> int:
        return 1

    def _fill(self) -> str:
        return "none"

    # -- configuration and storing -------------------------------------------------------------

    def config(
        self,
        dump_all: bool | None = None,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
        recursive: bool = False,
        *,
        handler_kwargs: Mapping[str, Any] | None = None,
        segments: Mapping[str, Any] | None = None,
    ) -> None:
        """Other segments, and arguments for the handler's `config` (dates, instruments)."""
        if handler_kwargs is not None:
            self.handler.config(**handler_kwargs)
        if segments is not None:
            self.segments = self._checked(segments)
            self._arguments = {**self._arguments, "segments": self.segments}
        super().config(dump_all, exclude, include, recursive)

    def setup_data(
        self, handler_kwargs: Mapping[str, Any] | None = None, *, source: Any = None
    ) -> None:
        """Load the data again; `handler_kwargs` go to the handler's `setup_data`.

        `init_type="load_state"` among them keeps what the processors have learnt. `source` puts
        the handler on other data, and keeps it too.
        """
        if source is not None:
            self.handler.set_source(source)
        if handler_kwargs is not None:
            self._bound().setup_data(**handler_kwargs)

    def fingerprint(self) -> str:
        """A hash of the content of the data behind it."""
        return self.handler.fingerprint()

    def to_state(self) -> State:
        """The configuration and what the processors have learnt; no data.

        Raises ConfigError where a part has no configuration (a live DataFrame).
        """
        state = State({"dataset": self.to_config()})
        if isinstance(self.handler, DataHandlerLP):
            learnt = self.handler.fitted_state()
            state.config["handler"], state.tensors = learnt.config, learnt.tensors
        return state

    @classmethod
    def from_state(cls, state: State) -> Self:
        """The dataset again; data is loaded when it is asked for, nothing is fitted anew."""
        dataset = init_instance_by_config(state.config["dataset"], stored=True)
        if not isinstance(dataset, cls):
            raise DataError(f"the state is of a {type(dataset).__name__}, not a {cls.__name__}.")
        if isinstance(dataset.handler, DataHandlerLP):
            dataset.handler.load_fitted(State(state.config["handler"], state.tensors))
        return dataset

    def __repr__(self) -> str:
        return f"{type(self).__name__}(handler={self.handler!r}, segments={self.segments})"

    # -- Qlib's helpers ------------------------------------------------------------------------

    @staticmethod
    def get_min_time(segments: Mapping[str, Segment]) -> Any:
        """The earliest start; None if one is open."""
        return _extreme([s for s, _ in segments.values()], min)

    @staticmethod
    def get_max_time(segments: Mapping[str, Segment]) -> Any:
        """The latest end; None if one is open."""
        return _extreme([e for _, e in segments.values()], max)


def _handler(config: Any) -> DataHandler:
    handler = init_instance_by_config(config, accept_types=DataHandler)
    if not isinstance(handler, DataHandler):
        raise ConfigError(
            f"handler is a {type(handler).__name__}; expected a DataHandler or its configuration. "
            "For a DataFrame: DataHandlerLP.from_df(frame)."
        )
    return handler


def span_of(name: Any, value: Any) -> Segment:
    """`(start, end)` of a pair of dates or a slice."""
    if isinstance(value, slice):
        return value.start, value.stop
    if isinstance(value, list | tuple) and len(value) == 2:
        return value[0], value[1]
    raise ConfigError(f"{name!r} must be two dates (start, end), got {value!r:.80}.")


def _is_date(text: str) -> bool:
    try:
        pd.Period(text)
    except ValueError:
        return False
    return True


def _extreme(dates: Sequence[Any], which: Callable[..., Any]) -> Any:
    return None if not dates or any(d is None for d in dates) else which(dates, key=pd.Timestamp)
