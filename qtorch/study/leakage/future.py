"""What moves before a date when the data after it changes: features, rows, samples, scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import NotFittedError
from qtorch.core.serial import State
from qtorch.data.dataset.dataset import DatasetH
from qtorch.data.dataset.samples import Samples
from qtorch.data.handler.handler import DK_I, DataHandlerLP
from qtorch.data.panel.columns import Columns
from qtorch.data.panel.view import View
from qtorch.study.leakage.comparison import (
    Moves,
    cells_differ,
    column_scales,
    compare_columns,
    compare_masks,
    read_cells,
)
from qtorch.study.leakage.report import LEAK, OK, UNKNOWN, Line
from qtorch.study.leakage.subject import Subject, get_loaded_view, learn_view, load_labels

LABEL = "label"
ROWS_BEFORE = 256  # rows before a date on which columns are compared
DAYS_BEFORE, DAYS_AFTER = 3, 3  # days around a date whose samples are compared and scored
MAX_WINDOWS = 4096


class FutureCheck:
    """Compare the base copy of a subject with every copy whose future is changed.

    `model`: a fitted model whose scores are compared too, with the fitted processors of `state`.
    """

    def __init__(self, subject: Subject, model: Any = None, state: State | None = None) -> None:
        self.subject, self.model, self.state = subject, model, state
        self.features = Moves("features")
        self.processed = Moves("processed features")
        self.market = Moves("market columns")
        self.fills = Moves("fills")
        self.universe = Moves("universe")
        self.rows = Moves("rows")
        self.learn = Moves("learn data")
        self.windows = Moves("windows")
        self.days = Moves("day batches")
        self.extras = Moves("extras")
        self.scores = Moves("scores", "scores")
        self.score_note = "no fitted model was given"
        self.label_reaches: dict[str, int] = {}  # days that each label looks ahead, as measured
        self._views = {"infer": subject.base.view(), "learn": learn_view(subject.base)}
        self._raw = get_loaded_view(subject.base)
        self._base_scores: dict[pd.Timestamp, pd.Series] = {}
        self._score_dataset: DatasetH | None = None

    @property
    def label_reach(self) -> int:
        """How many days the labels look ahead at most, as measured; 0 if none moved."""
        return max(self.label_reaches.values(), default=0)

    def run(self, methods: Sequence[str]) -> list[Line]:
        """Compare every date and method; return the lines of the report."""
        for date in self.subject.dates:
            for method in methods:
                self._compare_copy(date, method)
        return self.lines()

    def lines(self) -> list[Line]:
        """Return the lines of the report."""
        return [
            self.features.line("as loaded, unmoved by later data"),
            self.processed.line("unmoved by later data, processors refitted"),
            self.market.line("unmoved by later data", "no column is equal for a whole day"),
            self.fills.line("a gap shows no later value"),
            self.universe.line("the universe of a day is known on that day"),
            self.rows.line("processors drop rows by what is known on the day"),
            self.learn.line("features and labels for learning, as far as labels are known"),
            self.windows.line("windows end with their own day"),
            self.days.line("whole days, unmoved by later data"),
            self.extras.line("unmoved by later data", "the dataset has no extras"),
            self.scores.line("of a fitted model, unmoved by later data", self.score_note),
        ]

    # -- views ---------------------------------------------------------------------------------

    def _compare_copy(self, date: pd.Timestamp, method: str) -> None:
        changed = self.subject.copy_future(date, method)
        if self.subject.is_fit_window(date) and isinstance(changed.handler, DataHandlerLP):
            # The processors may know their fit window: compare what they do, not what they learn.
            self._load_state(changed, self.subject.get_fitted_state())
        infer = changed.view()
        self._compare_raw(get_loaded_view(changed), date, method)
        base = self._views["infer"]
        stop = _stop_row(base, date)
        compare_masks(self.rows, base, infer, (base.rows, infer.rows), stop, method=method)
        compare_masks(self.rows, base, infer, (base.history, infer.history), stop, method=method)
        self._compare_groups(self.processed, base, infer, stop, method)
        self._measure_label(changed, date)
        self._compare_learn(changed, date, method)
        self._compare_samples(changed, date, method)
        if self.model is not None:
            self._compare_scores(changed, date, method)

    def _compare_raw(self, raw: View, date: pd.Timestamp, method: str) -> None:
        base = self._raw
        stop = _stop_row(base, date)
        compare_masks(self.universe, base, raw, (base.rows, raw.rows), stop, method=method)
        self._compare_groups(self.features, base, raw, stop, method)

    def _compare_groups(
        self, moves: Moves, base: View, changed: View, stop: int, method: str
    ) -> None:
        """Compare every group but the label; cells in gaps belong to the line `fills`."""
        rows = slice(max(0, stop - ROWS_BEFORE), stop)
        cells, is_gap = base.history[rows].cpu(), self.subject.gap_cells(base)[rows]
        parts = [(moves, cells & ~is_gap), (self.fills, cells & is_gap)]
        for group, columns in base.groups.items():
            if group == LABEL:
                continue
            changed_columns = changed.groups.get(group)
            if changed_columns is None:
                moves.add(
                    int(cells.sum()), group, len(cells), f"the group {group} is missing", method
                )
                continue
            compare_columns(parts, columns, changed_columns, rows, method=method)
            shared = columns.keep(market_columns(columns, cells, rows))
            if shared.names:
                compare_columns(
                    [(self.market, cells)], shared, changed_columns, rows, method=method
                )

    def _measure_label(self, changed: DatasetH, date: pd.Timestamp) -> None:
        """Measure how many days before the change a raw label moves: so far it looks ahead."""
        base, other = load_labels(self.subject.base), load_labels(changed)
        if base is None or other is None or not base.names:
            return
        stop = int(base.calendar.searchsorted(date, side="right"))
        rows = slice(max(0, stop - ROWS_BEFORE), stop)
        cells = torch.ones(stop - rows.start, len(base.instruments), dtype=torch.bool)
        for name in base.names:
            moves = Moves(LABEL)
            compare_columns([(moves, cells)], base.keep([name]), other, rows, method="")
            self.label_reaches[name] = max(self.label_reaches.get(name, 0), moves.days_before)

    def _compare_learn(self, changed: DatasetH, date: pd.Timestamp, method: str) -> None:
        """Compare the data for learning up to the last day whose label is known on the date."""
        base, other = self._views["learn"], learn_view(changed)
        stop = _stop_row(base, date) - self.label_reach
        if stop <= 0:
            return
        compare_masks(self.learn, base, other, (base.rows, other.rows), stop, method=method)
        rows = slice(max(0, stop - ROWS_BEFORE), stop)
        for group, columns in base.groups.items():
            if columns is self._views["infer"].groups.get(group):
                continue  # compared already
            other_columns = other.groups.get(group, columns)
            compare_columns(
                [(self.learn, base.rows[rows])], columns, other_columns, rows, method=method
            )

    # -- samples -------------------------------------------------------------------------------

    def _span(self, date: pd.Timestamp) -> slice:
        calendar = self.subject.calendar
        row = int(calendar.searchsorted(date, side="right")) - 1
        last = min(len(calendar) - 1, row + DAYS_AFTER)
        return slice(calendar[max(0, row + 1 - DAYS_BEFORE)], calendar[last])

    def _compare_samples(self, changed: DatasetH, date: pd.Timestamp, method: str) -> None:
        base = early_samples(self.subject.base, self._span(date), date)
        other = early_samples(changed, self._span(date), date)
        num_missing = len(base.index.symmetric_difference(other.index))
        self.rows.record(len(base.index))
        example = f"the samples of {date:%Y-%m-%d}"
        self.rows.add(num_missing, "samples", DAYS_BEFORE, example, method)
        shared_index = base.index.intersection(other.index)[:MAX_WINDOWS]
        if not len(shared_index):
            return
        first, second = (s.gather(shared_index) for s in (base, other))
        for name, tensor in first.items():
            moves = self.windows if name == "x" else self.extras
            _compare_tensors(moves, name, tensor, second[name], date, method)
        day_tensors = (base.gather_days(), other.gather_days())
        for name, tensor in day_tensors[0].items():
            _compare_tensors(self.days, name, tensor, day_tensors[1][name], date, method)

    # -- scores --------------------------------------------------------------------------------

    def _compare_scores(self, changed: DatasetH, date: pd.Timestamp, method: str) -> None:
        self._load_state(changed, self.state)
        try:
            if date not in self._base_scores:
                base = self._get_scored_base()
                scores = self.model.predict(base, self._span(date))
                self._base_scores[date] = until(scores, date)
            scores = until(self.model.predict(changed, self._span(date)), date)
        except NotFittedError as error:
            self.model, self.score_note = None, str(error)
            return
        first = self._base_scores[date]
        index = first.index.union(scores.index)
        tensors = [
            torch.from_numpy(s.reindex(index).to_numpy("float32", copy=True))
            for s in (first, scores)
        ]
        _compare_tensors(self.scores, "score", tensors[0], tensors[1], date, method)

    def _get_scored_base(self) -> DatasetH:
        """Return a copy of the base with the model's own processors; the base keeps its own."""
        if self._score_dataset is None:
            self._score_dataset = self.subject.with_raw_view(self._raw)
            self._load_state(self._score_dataset, self.state)
        return self._score_dataset

    def _load_state(self, dataset: DatasetH, state: State | None) -> None:
        if state is not None and isinstance(dataset.handler, DataHandlerLP):
            dataset.handler.load_fitted_state(state)


class EarlySamples:
    """The samples of some days around a date, of which only those up to the date are gathered."""

    def __init__(self, samples: Samples, date: pd.Timestamp) -> None:
        self.samples = samples
        index = samples.index
        is_early = index.get_level_values(0) <= date
        self.rows = torch.from_numpy(is_early.nonzero()[0])
        self.index = index[is_early]

    def gather(self, index: pd.MultiIndex) -> dict[str, Tensor]:
        """Return windows `x` and extras of the samples of an index."""
        rows = self.rows[torch.from_numpy(self.index.get_indexer(index).astype("int64"))]
        batch = self.samples.batch(rows)
        extras = {k: v for k, v in batch.extra.items() if k != "raw_label"}
        return {"x": batch.x, **extras}

    def gather_days(self) -> dict[str, Tensor]:
        """Return the samples of the last day as a day batch gathers them beside the later days."""
        num_early = len(self.index.get_level_values(0).unique())
        if not num_early:
            return {}
        days = torch.arange(num_early - 1, self.samples.num_days)
        batch = self.samples.day_batch(days)
        assert batch.mask is not None, "a day batch has a mask"
        mask = batch.mask[0]
        extras = {k: v for k, v in batch.extra.items() if k != "raw_label"}
        return {n: t[0][mask] for n, t in {"x": batch.x, **extras}.items()}


def early_samples(dataset: DatasetH, span: slice, date: pd.Timestamp) -> EarlySamples:
    """Return the samples of a span for prediction, and which of them are not after a date."""
    return EarlySamples(dataset.samples(span, data_key=DK_I, purge=False), date)


def until(scores: pd.Series, date: pd.Timestamp) -> pd.Series:
    """Return the scores up to a date."""
    return scores[scores.index.get_level_values("datetime") <= date]


def market_columns(columns: Columns, cells: Tensor, rows: slice) -> list[str]:
    """Return the columns whose values are equal for all instruments of a day, with several values.

    They are searched on the last ten of the rows.
    """
    last = slice(max(rows.start, rows.stop - 10), rows.stop)
    mask = cells[len(cells) - (last.stop - last.start) :]
    if int(mask.sum(1).min()) < 2:
        return []
    dates = columns.calendar[last]
    values = read_cells(columns, columns.names, dates, columns.instruments)
    low = values.where(mask & ~values.isnan(), torch.tensor(torch.inf)).amin(2)
    high = values.where(mask & ~values.isnan(), torch.tensor(-torch.inf)).amax(2)
    is_shared = (low == high).all(1) & low.isfinite().all(1) & (low.amax(1) > low.amin(1))
    return [name for name, shared in zip(columns.names, is_shared.tolist(), strict=True) if shared]


def label_line(reach: int, has_labels: bool, declared: int | None) -> Line:
    """Compare how far the label looks ahead with what the dataset declares."""
    if not has_labels:
        return Line(LABEL, UNKNOWN, "the data has no group 'label'")
    if not reach:
        declared_text = "" if declared is None else f"; declared: {declared} days"
        detail = "the labels do not come from the bars, so how far they look ahead is not measured"
        return Line(LABEL, OK if declared is not None else UNKNOWN, f"{detail}{declared_text}")
    if declared is None:
        detail = f"looks {reach} days ahead, but the dataset knows no horizon: pass horizon={reach}"
        return Line(LABEL, LEAK, detail)
    if reach > declared:
        detail = f"looks {reach} days ahead, but the dataset declares {declared}: nothing purges it"
        return Line(LABEL, LEAK, detail)
    return Line(LABEL, OK, f"looks {reach} days ahead; declared: {declared}")


def _stop_row(view: View, date: pd.Timestamp) -> int:
    return int(view.calendar.searchsorted(date, side="right"))


def _compare_tensors(
    moves: Moves, name: str, first: Tensor, second: Tensor, date: pd.Timestamp, method: str
) -> None:
    moves.record(first.numel())
    example = f"{name} up to {date:%Y-%m-%d}"
    if first.shape != second.shape:
        moves.add(first.numel(), name, DAYS_BEFORE, f"{example} has another shape", method)
        return
    columns = first.float().reshape(-1, first.shape[-1] if first.dim() > 1 else 1)
    scale = column_scales(columns.t()[:, None], torch.ones((), dtype=torch.bool)).reshape(1, -1)
    other_columns = second.float().reshape(columns.shape)
    moved = cells_differ(columns, other_columns, scale)
    moves.add(int(moved.sum()), name, DAYS_BEFORE, example, method)
