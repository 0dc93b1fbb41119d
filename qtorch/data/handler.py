"""The handler with processors: raw data, and its views for inference and for learning."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import pandas as pd

from qtorch.core.errors import ConfigError, NotFittedError, unknown_name
from qtorch.core.serial import State
from qtorch.data import pipeline
from qtorch.data.loader import StaticDataLoader
from qtorch.data.pipeline import Window
from qtorch.data.processor.base import Names, Processor, names_of
from qtorch.data.processor.build import build_processors
from qtorch.data.raw_handler import DK_L, DK_R, DataHandler, check_key
from qtorch.data.view import View

log = logging.getLogger(__name__)


class DataHandlerLP(DataHandler):
    """A handler with processors: the keys "raw", "infer" and "learn" are three views.

    `shared_processors` run first. "infer" is after `infer_processors`, "learn" after
    `learn_processors`: on top of infer with `process_type` "append", on top of the shared ones
    with "independent". The views share columns, so that three keys cost little more than one.
    Each processor is fitted once, on what the one before it gave.

    The fit window is the processors' own, else `fit_start_time..fit_end_time`, else the train
    segment of the dataset that the handler stands in. A given one that reaches beyond the train
    segment is refused unless `allow_wide_fit`. `drop_raw` gives the raw data up once it is
    processed. Infinite bars, or infinite values of one's own frame, need a ProcessInf before the
    first processor that learns; what a division makes infinite is left to the processors, but no
    other one may take an infinite label away. A processor is an object, `{"_target_": ...}`,
    `{"class": ..., "kwargs": {...}}`, or a bare name of qtorch.data.processor; pandas processors
    are adapted.
    """

    PTYPE_I: ClassVar[str] = "independent"
    PTYPE_A: ClassVar[str] = "append"
    IT_FIT_SEQ: ClassVar[str] = "fit_seq"
    IT_FIT_IND: ClassVar[str] = "fit_ind"
    IT_LS: ClassVar[str] = "load_state"

    from_cast: bool = False
    #: Whether the processors have learnt; `is_frozen` if from a store: then only
    #: `setup_data(init_type="fit_seq")` fits them again.
    is_fitted: bool = False
    is_learn_fitted: bool = False
    is_frozen: bool = False

    _shared: View | None = None
    _infer: View | None = None
    _learn: View | None = None
    _train: Window | None = None
    _raw_is_whole: bool = False

    def __init__(
        self,
        instruments: Any = None,
        start_time: Any = None,
        end_time: Any = None,
        data_loader: Any = None,
        infer_processors: Sequence[Any] = (),
        learn_processors: Sequence[Any] = (),
        shared_processors: Sequence[Any] = (),
        process_type: str = PTYPE_A,
        drop_raw: bool = False,
        *,
        fit_start_time: Any = None,
        fit_end_time: Any = None,
        allow_wide_fit: bool = False,
        init_data: bool = False,
        fetch_orig: bool = True,
        source: Any = None,
        cache: bool | str | Path = False,
    ) -> None:
        if process_type not in (self.PTYPE_A, self.PTYPE_I):
            known = (self.PTYPE_A, self.PTYPE_I)
            raise ConfigError(unknown_name("process_type", str(process_type), known))
        self.infer_processors = build_processors(infer_processors, "infer_processors")
        self.learn_processors = build_processors(learn_processors, "learn_processors")
        self.shared_processors = build_processors(shared_processors, "shared_processors")
        pipeline.check_for_inference(self.infer_processors, "infer_processors")
        pipeline.check_for_inference(self.shared_processors, "shared_processors")
        self.process_type = process_type
        self.drop_raw = drop_raw
        self.fit_start_time = fit_start_time
        self.fit_end_time = fit_end_time
        self.allow_wide_fit = allow_wide_fit
        super().__init__(
            instruments,
            start_time,
            end_time,
            data_loader,
            init_data,
            fetch_orig,
            source=source,
            cache=cache,
        )

    def get_all_processors(self) -> list[Processor]:
        """Shared, infer and learn processors, in this order."""
        return [*self.shared_processors, *self.infer_processors, *self.learn_processors]

    # -- the three views -----------------------------------------------------------------------

    def view(
        self, data_key: str = DataHandler.DK_I, *, groups: Sequence[str] | None = None
    ) -> View:
        check_key(data_key)
        if data_key == DK_R:
            return self._raw_view(groups)
        if self._infer is None:
            self._process_infer()
        if data_key == DK_L and self._learn is None:
            self._process_learn()
        view = self._learn if data_key == DK_L else self._infer
        assert view is not None
        return view

    def _mends_infinite(self) -> bool:
        lists = [[*self.shared_processors, *self.infer_processors]]
        if self.process_type == self.PTYPE_I:
            lists.append([*self.shared_processors, *self.learn_processors])
        return all(pipeline.mends_infinite(each) for each in lists)

    def _raw_view(self, groups: Sequence[str] | None = None) -> View:
        if self.drop_raw and self._infer is not None:
            if self._raw is not None and groups and all(g in self._raw.groups for g in groups):
                return self._raw
            raise ConfigError(
                "the raw data was given up (drop_raw=True; the label alone is kept); build the "
                "handler with drop_raw=False to have it."
            )
        if self.from_cast:
            raise ConfigError("a handler made by cast(...) has no raw data.")
        if self._raw is not None and not self._raw_is_whole and not self._holds(groups):
            self._raw = None
        if self._raw is None:
            self._raw = self._load(None)
            self._raw_is_whole = True
        return self._raw

    def _holds(self, groups: Sequence[str] | None) -> bool:
        """Whether the narrowed raw view has these groups whole."""
        names, raw = self.data_loader.names(), self._raw
        if groups is None or names is None or raw is None:
            return False
        known = [g for g in groups if g in names]
        return all(g in raw.groups and raw.groups[g].names == names[g] for g in known)

    def _process_infer(self) -> None:
        """Load what the processors need, fit those of inference once, and run them."""
        names = self.data_loader.names()
        columns = None
        if names is not None:
            needed = self._needed(names)
            columns = None if needed == names else needed
        raw = self._raw
        if raw is None:
            raw = self._load(columns)
            self._raw_is_whole = columns is None
        if names is None:
            self._needed(names_of(raw))
        fit, window = not self.is_fitted, self._window()
        if fit:
            self._check_windows(raw)
        shared = pipeline.run(raw, self.shared_processors, fit=fit, window=window)
        infer = pipeline.run(shared, self.infer_processors, fit=fit, window=window)
        self._raw = _label_alone(raw) if self.drop_raw else raw
        self._shared, self._infer = shared, infer
        self.is_fitted = True

    def _process_learn(self) -> None:
        """The same for learning; apart, because new data may have no label yet."""
        base = self._infer if self.process_type == self.PTYPE_A else self._shared
        assert base is not None
        fit = not self.is_learn_fitted
        self._learn = pipeline.run(base, self.learn_processors, fit=fit, window=self._window())
        self.is_learn_fitted = True

    def _needed(self, names: Names) -> Names:
        """The columns that infer and learn depend on; the processors' names are checked."""
        inference = [*self.shared_processors, *self.infer_processors]
        appended = self.process_type == self.PTYPE_A
        learning = [*(inference if appended else self.shared_processors), *self.learn_processors]
        pipeline.check_names(self.get_all_processors() if appended else inference, names)
        pipeline.warn_of_dropped_labels(inference, names)
        needed = pipeline.needed_columns(inference, names)
        if appended:
            return needed
        return pipeline.union_of_columns(needed, pipeline.needed_columns(learning, names), names)

    # -- fitting -------------------------------------------------------------------------------

    def bind_train(self, start: Any, end: Any) -> None:
        """Say the dataset's train segment: the fit window where none is given, and its bound.

        Processors that were fitted on another train segment are fitted again when next used.
        Raises ConfigError where a given window reaches beyond the segment.
        """
        train = Window(start, end)
        if train == self._train:
            return
        self._train = train
        if self.is_frozen or self.from_cast:
            return
        if self._infer is not None:
            self._check_windows(self._infer)
        if any(p.has_fit_window() and not self._is_given(p) for p in self.get_all_processors()):
            self._forget_processed()
            self.is_fitted = self.is_learn_fitted = False

    def _is_given(self, processor: Processor) -> bool:
        """Whether the fit window does not depend on the train segment."""
        own = None not in (self.fit_start_time, self.fit_end_time)
        return own or pipeline.has_own_window(processor)

    def _window(self) -> Window | None:
        train = self._train
        if train is None and self.fit_start_time is None and self.fit_end_time is None:
            return None
        start, end = train or (None, None)
        return Window(
            start if self.fit_start_time is None else self.fit_start_time,
            end if self.fit_end_time is None else self.fit_end_time,
        )

    def _check_windows(self, view: View) -> None:
        if self._train is None:
            return
        for processor in self.get_all_processors():
            window = self._window()
            if pipeline.has_own_window(processor):
                window = Window(processor.fit_start_time, processor.fit_end_time)
            if processor.has_fit_window() and window is not None:
                who = type(processor).__name__
                pipeline.check_window(view.calendar, window, self._train, who, self.allow_wide_fit)

    def fit(self) -> None:
        """Fit every processor on the raw data, without processing it."""
        for processor in self.get_all_processors():
            pipeline.fit_one(processor, self._raw_view(), self._window())
        self.is_fitted = self.is_learn_fitted = True

    def fit_process_data(self) -> None:
        """Fit each processor on what the one before it gives."""
        self.process_data(with_fit=True)

    def process_data(self, with_fit: bool = False) -> None:
        """Run the processors again; `with_fit` fits them too."""
        if not with_fit and not self.is_fitted:
            raise NotFittedError(
                "the processors are not fitted: process_data(with_fit=True), or load a state."
            )
        if with_fit:
            self.is_fitted = self.is_learn_fitted = False
        self._forget_processed()
        self._process_infer()

    def setup_data(self, init_type: str = IT_FIT_SEQ) -> None:
        """Load the data again and process it.

        `init_type`: "fit_seq" fits each processor on the output of the one before, "fit_ind" all
        on the raw data, "load_state" keeps what they have learnt.
        """
        known = (self.IT_FIT_SEQ, self.IT_FIT_IND, self.IT_LS)
        if init_type not in known:
            raise ConfigError(unknown_name("init_type", str(init_type), known))
        self._forget()
        self.is_frozen = init_type == self.IT_LS
        if init_type == self.IT_FIT_IND:
            self.fit()
        self.process_data(with_fit=init_type == self.IT_FIT_SEQ)

    def config(
        self,
        dump_all: bool | None = None,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
        recursive: bool = False,
        *,
        instruments: Any = None,
        start_time: Any = None,
        end_time: Any = None,
        processor_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """As DataHandler's; `processor_kwargs` go to every processor's `config`."""
        if processor_kwargs:
            for processor in self.get_all_processors():
                processor.config(**processor_kwargs)
            lists = ("infer_processors", "learn_processors", "shared_processors")
            given = {n: getattr(self, n) for n in lists if getattr(self, n)}
            self._arguments = {**self._arguments, **given}
        super().config(
            dump_all,
            exclude,
            include,
            recursive,
            instruments=instruments,
            start_time=start_time,
            end_time=end_time,
        )

    def _forget(self) -> None:
        super()._forget()
        self._raw_is_whole = False
        self._forget_processed()

    def _forget_processed(self) -> None:
        self._shared = self._infer = self._learn = None

    # -- storing -------------------------------------------------------------------------------

    def fitted_state(self) -> State:
        """What the processors have learnt: plain data and tensors."""
        first_of_learn = len(self.get_all_processors()) - len(self.learn_processors)
        learnt: list[dict[str, Any] | None] = []
        tensors = {}
        for k, processor in enumerate(self.get_all_processors()):
            fitted = self.is_fitted if k < first_of_learn else self.is_learn_fitted
            state = processor.fitted_state() if fitted else None
            learnt.append(None if state is None else state.config)
            for name, tensor in ({} if state is None else state.tensors).items():
                tensors[f"processors.{k}.{name}"] = tensor
        flags = {"fitted": self.is_fitted, "learn_fitted": self.is_learn_fitted}
        return State({**flags, "processors": learnt}, tensors)

    def load_fitted(self, state: State) -> None:
        """Take over what another handler's processors have learnt; they are not fitted again.

        Raises ConfigError where that handler had another number of processors.
        """
        stored, own_count = state.config["processors"], len(self.get_all_processors())
        if len(stored) != own_count:
            raise ConfigError(
                f"the state is of {len(stored)} processors, this handler has {own_count}."
            )
        self._forget_processed()
        for k, learnt in enumerate(stored):
            if learnt is None:
                continue
            start = f"processors.{k}."
            own = {n[len(start) :]: t for n, t in state.tensors.items() if n.startswith(start)}
            self.get_all_processors()[k].load_fitted(State(learnt, own))
        self.is_fitted = self.is_frozen = bool(state.config["fitted"])
        self.is_learn_fitted = bool(state.config["learn_fitted"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.is_frozen = self.is_fitted

    @classmethod
    def cast(cls, handler: DataHandlerLP) -> DataHandlerLP:
        """A plain DataHandlerLP that holds the processed data alone.

        What a subclass of one's own has made is shared without the subclass:
        `DataHandlerLP.cast(h).to_pickle(path, dump_all=True)`.
        """
        infer, learn = handler.view(cls.DK_I), handler.view(cls.DK_L)
        new = DataHandlerLP(data_loader=StaticDataLoader(None))
        for name in ("instruments", "start_time", "end_time", "fetch_orig", "drop_raw"):
            setattr(new, name, getattr(handler, name))
        new.from_cast = new.is_fitted = new.is_learn_fitted = new.is_frozen = True
        new._infer, new._learn = infer, learn
        return new

    @classmethod
    def from_df(
        cls, df: pd.DataFrame, *, label: str | Sequence[str] | None = None, **options: Any
    ) -> Self:
        """A handler over one's own `(datetime, instrument)` frame.

        Two-level columns are `(group, column)`, as Qlib has them: `feature` and `label`. For a
        frame with one level `label` names the label's columns; all others are features. Further
        `options` are the constructor's (infer_processors, learn_processors, ...).
        """
        if label is None:
            return cls(data_loader=StaticDataLoader(df), **options)
        names = [label] if isinstance(label, str) else list(label)
        if df.columns.nlevels != 1:
            raise ConfigError("label=... is for frames whose columns have one level.")
        for name in names:
            if name not in df.columns:
                raise ConfigError(unknown_name("column", name, map(str, df.columns)))
        parts = {"feature": df.drop(columns=names), "label": df[names]}
        return cls(data_loader=StaticDataLoader(parts), **options)


def _label_alone(view: View) -> View | None:
    """The raw label without the rest: what predictions are judged by."""
    groups = {g: c for g, c in view.groups.items() if g == "label"}
    return View(groups, view.rows, view.history) if groups else None
