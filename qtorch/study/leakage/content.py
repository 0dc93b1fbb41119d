"""What the loaded numbers themselves tell: normalisation by all days, fills, pairs of days."""

from __future__ import annotations

import torch
from torch import Tensor

from qtorch.core.dates import date_rows
from qtorch.core.errors import DataError, format_count
from qtorch.data.dataset.dataset import TRAIN
from qtorch.data.handler.handler import DK_I, DK_L, DK_R
from qtorch.data.panel.columns import Columns, PanelColumns, column_parts
from qtorch.data.panel.view import View
from qtorch.study.leakage.comparison import cells_differ
from qtorch.study.leakage.labels import thin_rows
from qtorch.study.leakage.report import LEAK, OK, UNKNOWN, Line
from qtorch.study.leakage.subject import Subject

LABEL = "label"
EXACT, CLEARLY = 1e-3, 1e-2  # a statistic of all days is exact, that of the train days clearly not
ATTAINED = 1e-5  # how closely a maximum is attained
MIN_CELLS, MIN_VALUES = 20, 10
MOST, SOME = 0.9, 0.1  # shares of instruments
MIN_LEADING_DAYS, MIN_FILLED = 3, 3
MAX_PAIRS = 400


def load_columns(subject: Subject) -> dict[str, Columns]:
    """Return the numbers as they were loaded, without gaps: bars of the source, or a frame."""
    source = subject.source
    if source is not None:
        handler = subject.dataset.handler
        universe = handler.instruments
        if isinstance(universe, dict) and "market" in universe:
            universe = universe["market"]
        panel = source.load(
            instruments="all" if universe is None else universe,
            start_time=handler.start_time,
            end_time=handler.end_time,
            freq=getattr(handler.data_loader, "freq", "day"),
        )
        return {"bars": PanelColumns(panel)}
    view: View = subject.dataset.handler.view(DK_R)
    return {group: columns for group, columns in view.groups.items() if group != LABEL}


def normalisation_line(subject: Subject, columns: dict[str, Columns]) -> Line:
    """Find columns that were normalised with statistics of all days, test included.

    Their mean and deviation, or their maximum, are exact over all days and not over the train days,
    in the whole column or by instrument.
    """
    name = "normalisation"
    if TRAIN not in subject.base.segments:
        return Line(name, UNKNOWN, "there is no segment 'train'")
    start, end = subject.base.segments[TRAIN]
    leaks = []
    for group in columns.values():
        days = group.calendar
        train = slice(0, date_rows(days, start, end).stop)
        if not 0 < train.stop < len(days):
            continue
        for part in column_parts(group.names):
            for column, values in zip(part, group.block(part).cpu(), strict=True):
                leaks += [f"{column} {fault}" for fault in _column_faults(values, train)]
    if leaks:
        suffix = f" and {len(leaks) - 3} more" if len(leaks) > 3 else ""
        return Line(name, LEAK, f"{'; '.join(leaks[:3])}{suffix}")
    count = sum(len(group.names) for group in columns.values())
    return Line(name, OK, f"{format_count(count, 'column')}: no statistic of all days is exact")


def _column_faults(values: Tensor, train: slice) -> list[str]:
    """Describe what is exact over all days of `values [D, N]` but not over the train days."""
    finite = values[values.isfinite()]
    if len(finite) < 2 * MIN_CELLS or len(torch.unique(finite[:1000])) < MIN_VALUES:
        return []
    whole = _statistics(values.reshape(-1, 1))
    early = _statistics(values[train].reshape(-1, 1))
    if bool(_is_standardized(whole, early).all()):
        return ["has mean 0 and deviation 1 over all days, not over the train days"]
    if bool(_is_scaled(whole, early).all()):
        return ["has its maximum 1 over all days, not over the train days"]
    by_name, early_by_name = _statistics(values), _statistics(values[train])
    enough = (by_name["count"] >= 2 * MIN_CELLS) & (early_by_name["count"] >= MIN_CELLS)
    if not bool(enough.any()):
        return []
    is_standardized = _is_standardized(by_name, early_by_name)[enough]
    if float(is_standardized.float().mean()) > MOST:
        return ["has mean 0 and deviation 1 over all days of each instrument"]
    has_maximum = ((by_name["max"] - 1).abs() < ATTAINED)[enough]
    is_scaled = _is_scaled(by_name, early_by_name)[enough]
    if float(has_maximum.float().mean()) > MOST and float(is_scaled.float().mean()) > SOME:
        return ["has its maximum 1 over all days of each instrument, not over the train days"]
    return []


def _statistics(values: Tensor) -> dict[str, Tensor]:
    """Return count, mean, deviation and maximum of each column of `values [D, N]`."""
    used = values.isfinite()
    count = used.sum(0)
    exact = values.where(used, torch.tensor(0.0)).double()
    mean = exact.sum(0) / count.clamp(min=1)
    square = (exact - mean).square().where(used, torch.zeros((), dtype=torch.float64))
    highest = values.where(used, torch.tensor(-torch.inf)).amax(0)
    return {
        "count": count,
        "mean": mean,
        "std": (square.sum(0) / count.clamp(min=1)).sqrt(),
        "max": highest.double(),
    }


def _is_standardized(whole: dict[str, Tensor], early: dict[str, Tensor]) -> Tensor:
    count = whole["count"].clamp(min=2)
    sample_std = whole["std"] * (count / (count - 1)).sqrt()  # ddof 1
    is_unit = ((whole["std"] - 1).abs() < EXACT) | ((sample_std - 1).abs() < EXACT)
    exact = (whole["mean"].abs() < EXACT) & is_unit
    off = (early["mean"].abs() > CLEARLY) | ((early["std"] - 1).abs() > CLEARLY)
    return exact & off


def _is_scaled(whole: dict[str, Tensor], early: dict[str, Tensor]) -> Tensor:
    return ((whole["max"] - 1).abs() < ATTAINED) & (early["max"] < 1 - ATTAINED)


def leading_fill_line(columns: dict[str, Columns]) -> Line:
    """Find instruments whose first days repeat one row: filled backwards from a later day."""
    name, texts = "leading days", []
    for group, part in columns.items():
        if len(part.calendar) <= MIN_LEADING_DAYS or len(part.names) < 2:
            continue
        length = _leading_days(part)
        filled = torch.nonzero(length >= MIN_LEADING_DAYS)[:, 0].tolist()
        if len(filled) < MIN_FILLED or len(filled) > MOST * len(part.instruments):
            continue
        worst = max(filled, key=lambda k: int(length[k]))
        texts.append(
            f"{group}: {format_count(len(filled), 'instrument')} begin with equal rows, e.g. "
            f"{part.instruments[worst]} with {int(length[worst])}"
        )
    if texts:
        return Line(name, LEAK, f"{'; '.join(texts)}: filled backwards from a later day?")
    return Line(name, OK, "no instruments begin with repeated rows")


def _leading_days(columns: Columns) -> Tensor:
    """Return how many first days of each instrument are equal in all columns, `[N]`."""
    num_dates, num_instruments, _ = columns.shape
    is_equal = torch.ones(num_dates - 1, num_instruments, dtype=torch.bool)
    has_value = torch.zeros(num_dates, num_instruments, dtype=torch.bool)
    for part in column_parts(columns.names):
        block = columns.block(part).cpu()
        missing = block.isnan()
        same = (block[:, 1:] == block[:, :-1]) | (missing[:, 1:] & missing[:, :-1])
        is_equal &= same.all(0)
        has_value |= ~missing.all(0)
    first = torch.where(has_value.any(0), has_value.int().argmax(0), num_dates)
    order = torch.arange(num_dates - 1)[:, None]
    stop = torch.where(is_equal | (order < first), num_dates, order).amin(0)
    # The row `stop` is the last that equals the first one.
    return torch.where(stop < num_dates, stop - first + 1, torch.zeros_like(stop))


def pairing_line(subject: Subject) -> Line:
    """Look up samples by date and instrument: a batch holds the features and labels of its day."""
    name, faults, count = "pairs", [], 0
    for segment in subject.base.segments:
        for data_key in (DK_L, DK_I):
            try:
                faults += _pair_faults(subject, segment, data_key)
                count += 1
            except DataError:
                continue  # a segment without samples
    if faults:
        return Line(name, LEAK, "; ".join(dict.fromkeys(faults)))
    return Line(name, OK, "windows, labels and raw labels belong to the day of their sample")


def _pair_faults(subject: Subject, segment: str, data_key: str) -> list[str]:
    samples = subject.base.samples(segment, data_key=data_key)
    view = subject.base.view(data_key)
    rows = thin_rows(samples, 4, MAX_PAIRS)[:MAX_PAIRS]
    batch = samples.batch(rows)
    x = batch.x
    is_window = x.shape[1] * x.shape[2] == len(samples.feature_names)
    last = x.transpose(1, 2).flatten(1) if is_window else x[:, -1]
    index = samples.index[rows.numpy()]
    dates = torch.from_numpy(view.calendar.get_indexer(index.get_level_values(0)))
    places = torch.from_numpy(view.instruments.get_indexer(index.get_level_values(1)))
    raw = subject.base.handler.view(DK_R, groups=[LABEL])
    parts: list[tuple[str, Tensor | None, View, str, tuple[str, ...]]]
    parts = [("windows", last, view, "feature", samples.feature_names)]
    parts += [("labels", batch.y, view, LABEL, samples.label_names)]
    parts += [("raw labels", batch.extra.get("raw_label"), raw, LABEL, samples.label_names)]
    faults = []
    for kind, values, own_view, group, names in parts:
        columns = own_view.groups.get(group)
        if values is None or columns is None or values.shape[1] != len(names):
            continue
        for k, column in enumerate(names):
            if column not in columns.names:
                continue
            expected = columns.column(column).cpu()[dates, places]
            is_other = cells_differ(
                expected, values[:, k].cpu(), float(expected.nan_to_num().std())
            )
            if kind != "windows":  # infinite labels count as missing
                is_other &= expected.isfinite()
            if bool(is_other.any()):
                faults.append(f"{kind} of {segment} ({data_key}) are not those of their own day")
                break
    return faults
