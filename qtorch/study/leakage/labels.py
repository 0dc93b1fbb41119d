"""What rows, features and signals owe to the labels: hidden labels, permuted labels, lost tails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import DataError, format_count
from qtorch.data.dataset.dataset import TRAIN, DatasetH
from qtorch.data.dataset.samples import Samples
from qtorch.data.handler.handler import DK_I, DK_L, DataHandlerLP
from qtorch.data.processor.cross_section import MAD_SCALE, day_median, day_rank_norm
from qtorch.study.leakage.comparison import Moves, compare_columns, compare_masks
from qtorch.study.leakage.report import LEAK, OK, UNKNOWN, Line
from qtorch.study.leakage.subject import Subject, get_loaded_view, load_labels

LABEL = "label"
ROWS_COMPARED = 256
EXTREME, EXTREME_SHARE, HIDDEN_SHARE = 100.0, 0.05, 0.2
# Labels are compared in deviations (1.4826 MAD) from the median of their day. Of those beyond
# INNER * tail, the train segment has a share beyond the tail; if it leads to expect MIN_EXTREMES of
# them in another segment, this has TAIL_RATIO of them at least, also where its tails are thinner.
TAILS, INNER, MIN_EXTREMES, TAIL_RATIO = (3.0, 4.0, 5.0, 6.0, 8.0), 0.7, 30, 0.3
MAX_SCAN_DAYS, MAX_LINEAR_ROWS, ROWS_AT_ONCE = 120, 60_000, 4096
HIGH_IC = 0.3  # no honest column ranks the returns of another day so well
RIDGE, LUCK_T, LUCK_IC = 1e-3, 5.0, 0.02
OVERLAP = 0.2  # labels of neighbouring days correlate more than this if their spans overlap


def with_labels(subject: Subject, change: Any) -> DatasetH | None:
    """Return the base copy with `change(values [D, N], rows [D, N])` of each raw label.

    Its processors are not fitted. None if the data has no labels.
    """
    raw = get_loaded_view(subject.base)
    labels = raw.groups.get(LABEL)
    if labels is None or not labels.names:
        return None
    values = {name: change(labels.column(name), raw.rows) for name in labels.names}
    view = raw.with_group(LABEL, labels.with_columns(values))
    return subject.with_raw_view(view)


def permute_by_day(values: Tensor, rows: Tensor, seed: int = 0) -> Tensor:
    """Permute the values `[D, N]` of each day among the instruments that have one."""
    generator = torch.Generator().manual_seed(seed)
    used = (rows & ~values.isnan()).cpu()
    noise = torch.rand(values.shape, generator=generator)
    # Both orders put the cells in use first, so the k-th of one takes the value of the k-th.
    first = torch.where(used, torch.arange(values.shape[1]) / values.shape[1], 2.0)
    first = first.argsort(dim=1, stable=True)
    second = torch.where(used, noise, 2.0).argsort(dim=1, stable=True)
    out = values.clone()
    out.scatter_(1, first.to(out.device), values.gather(1, second.to(out.device)))
    return out


def hide_labels(values: Tensor, rows: Tensor, seed: int = 1) -> Tensor:
    """Permute labels by day, make some of them extreme and others missing."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(values.shape, generator=generator).to(values.device)
    out = permute_by_day(values, rows, seed)
    out = torch.where(draws < EXTREME_SHARE, out * EXTREME, out)
    return out.masked_fill(draws > 1 - HIDDEN_SHARE, torch.nan)


def label_rows_line(subject: Subject) -> Line:
    """Hide and change the labels: rows and features for prediction must not notice."""
    moves = Moves("labels and rows")
    other = with_labels(subject, hide_labels)
    if other is None:
        return moves.line("", "the data has no group 'label'")
    state = subject.get_fitted_state()
    if state is not None and isinstance(other.handler, DataHandlerLP):
        other.handler.load_fitted_state(state)
    base, changed = subject.base.view(), other.view()
    stop = len(base.calendar)
    compare_masks(moves, base, changed, (base.rows, changed.rows), stop, method="labels")
    compare_masks(moves, base, changed, (base.history, changed.history), stop, method="labels")
    rows = slice(max(0, stop - ROWS_COMPARED), stop)
    for group, columns in base.groups.items():
        if group != LABEL and group in changed.groups:
            cells = base.history[rows].cpu() & changed.history[rows].cpu()
            compare_columns([(moves, cells)], columns, changed.groups[group], rows, method="labels")
    _compare_segments(moves, subject, other)
    line = moves.line("rows and features for prediction do not depend on labels")
    if line.verdict == LEAK:
        detail = f"rows or features for prediction depend on labels; e.g. {moves.example}"
        return Line(line.name, LEAK, detail)
    return line


def _compare_segments(moves: Moves, subject: Subject, other: DatasetH) -> None:
    """Compare which samples the segments have for prediction."""
    for name in subject.base.segments:
        try:
            indices = [d.samples(name, data_key=DK_I).index for d in (subject.base, other)]
        except DataError:
            continue  # a segment without samples
        moves.record(len(indices[0]))
        difference = indices[0].symmetric_difference(indices[1])
        example = f"{format_count(len(difference), 'sample')} of {name}"
        moves.add(len(difference), "samples", 0, example, "labels")


def label_tails_line(subject: Subject) -> Line:
    """Compare how many labels are extreme in the train segment and in each later one.

    If labels of a later segment lack the tails, rows were dropped because of their label.
    """
    name, labels = "label tails", load_labels(subject.base)
    if labels is None or not labels.names or TRAIN not in subject.base.segments:
        return Line(name, UNKNOWN, "needs labels and a segment 'train'")
    view = subject.base.view()
    values = labels.column(labels.names[0]).cpu()
    if values.shape != view.rows.shape:
        return Line(name, UNKNOWN, "labels and features have different dates")
    rows = view.rows.cpu() & values.isfinite()
    distances = (values - day_median(values, rows)).abs()
    z = (distances / day_median(distances, rows) / MAD_SCALE).where(rows, torch.tensor(torch.nan))
    train = z[subject.segment_rows(TRAIN)]
    texts, leaks = [], []
    for segment in subject.base.segments:
        if segment != TRAIN:
            fault = _missing_tail(train, z[subject.segment_rows(segment)])
            leaks += [f"{segment} has {fault}"] if fault else []
            texts.append(segment)
    if leaks:
        return Line(name, LEAK, f"{'; '.join(leaks)}: were rows dropped because of their label?")
    return Line(name, OK, f"extreme labels in {', '.join(texts)} as in train" if texts else "-")


def _missing_tail(train: Tensor, other: Tensor) -> str | None:
    """Describe a tail of the train segment's labels that another segment lacks; None if none."""
    for tail in TAILS:
        share = int((train > tail).sum()) / max(1, int((train > INNER * tail).sum()))
        expected, observed = share * int((other > INNER * tail).sum()), int((other > tail).sum())
        if expected >= MIN_EXTREMES and observed < TAIL_RATIO * expected:
            return f"{observed} labels beyond {tail:g} deviations, expected {expected:.0f} by train"
    return None


# -- signals ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cross:
    """Features of samples `[S, F]` float64, and the row and column `[S]` of each."""

    x: Tensor
    date: Tensor
    instrument: Tensor


def feature_matrix(samples: Samples, rows: Tensor) -> Cross:
    """Return the features of some samples: of a window the last step, missing ones as zero."""
    parts = []
    for part in torch.split(rows, ROWS_AT_ONCE):
        x = samples.batch(part).x
        is_window = x.shape[1] * x.shape[2] == len(samples.feature_names)
        parts.append(x.transpose(1, 2).flatten(1) if is_window else x[:, -1])
    x = torch.cat(parts).double().nan_to_num(0.0, 0.0, 0.0).clamp(-1e6, 1e6)
    return Cross(x, samples.date[rows], samples.instrument[rows])


def thin_rows(samples: Samples, num_days: int, max_rows: int) -> Tensor:
    """Return the samples of evenly spaced whole days: at most `num_days`, about `max_rows`."""
    per_day = max(1, len(samples) // max(1, samples.num_days))
    count = min(num_days, samples.num_days, max(2, max_rows // per_day))
    days = torch.unique(samples.date)
    chosen = days[torch.unique(torch.linspace(0, len(days) - 1, count).round().long())]
    return torch.nonzero(torch.isin(samples.date, chosen))[:, 0]


def fit_ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return center, scale and coefficients of a ridge regression on standardized features."""
    center, scale = x.mean(0), x.std(0)
    scale = torch.where(scale > 1e-9, scale, 1.0)
    z = (x - center) / scale
    gram = z.t() @ z / len(z) + RIDGE * torch.eye(z.shape[1], dtype=z.dtype)
    return center, scale, torch.linalg.solve(gram, z.t() @ (y - y.mean()) / len(z))


def day_rank_ic(scores: Tensor, labels: Tensor, date: Tensor) -> np.ndarray:
    """Compute the Rank IC of each day with three samples or more, `[days]`; `[S]` each."""
    frame = pd.DataFrame({"s": scores.numpy(), "y": labels.numpy(), "d": date.numpy()}).dropna()
    groups = frame.groupby("d")
    ranks = groups[["s", "y"]].rank()
    ranks["d"] = frame["d"]
    sizes = ranks.groupby("d")["s"].transform("size")
    ranks = ranks[sizes >= 3]
    centered = ranks[["s", "y"]] - ranks.groupby("d")[["s", "y"]].transform("mean")
    products = pd.DataFrame(
        {"sy": centered["s"] * centered["y"], "ss": centered["s"] ** 2, "yy": centered["y"] ** 2}
    )
    sums = products.groupby(ranks["d"]).sum().to_numpy()
    with np.errstate(invalid="ignore"):  # a day of equal scores has no IC
        ic = sums[:, 0] / np.sqrt(sums[:, 1] * sums[:, 2])
    finite: np.ndarray = ic[np.isfinite(ic)]
    return finite


def linear_ic(dataset: DatasetH, segment: str) -> np.ndarray | None:
    """Fit a ridge regression on "train" and return its daily Rank IC with a segment's raw labels.

    None if either has no samples or no labels.
    """
    try:
        train = dataset.samples(TRAIN, data_key=DK_L)
        test = dataset.samples(segment, data_key=DK_I)
    except DataError:
        return None
    if train.target is None or test.raw_label is None:
        return None
    rows = thin_rows(train, train.num_days, MAX_LINEAR_ROWS)
    target = train.target[rows, 0].double()
    has_label = target.isfinite()
    if int(has_label.sum()) < 10:
        return None
    cross = feature_matrix(train, rows[has_label])
    center, scale, weights = fit_ridge(cross.x, target[has_label])
    rows = thin_rows(test, test.num_days, MAX_LINEAR_ROWS)
    cross = feature_matrix(test, rows)
    scores = ((cross.x - center) / scale) @ weights
    ic = day_rank_ic(scores, test.raw_label[rows, 0], cross.date)
    return ic if len(ic) > 2 else None


def permutation_line(subject: Subject) -> Line:
    """Permute the labels of every day and learn from them: nothing can be left to find.

    A linear model that still ranks the permuted labels of the last segment has seen them.
    """
    name = "permuted labels"
    segments = {n: subject.segment_rows(n) for n in subject.base.segments if n != TRAIN}
    if TRAIN not in subject.base.segments or not segments:
        return Line(name, UNKNOWN, "needs a segment 'train' and another one")
    segment = max(segments, key=lambda n: segments[n].stop)
    true_ic = linear_ic(subject.base, segment)
    other = with_labels(subject, permute_by_day)
    permuted_ic = None if other is None else linear_ic(other, segment)
    if true_ic is None or permuted_ic is None:
        return Line(name, UNKNOWN, "train or test has no labels")
    mean = float(permuted_ic.mean())
    t = mean / max(float(permuted_ic.std(ddof=1)) / len(permuted_ic) ** 0.5, 1e-12)
    text = f"Rank IC of a linear model on {segment}: {mean:.3f} (t {t:.1f}) with permuted labels"
    text += f", {true_ic.mean():.3f} with the true ones"
    if abs(t) > LUCK_T and abs(mean) > LUCK_IC:
        return Line(name, LEAK, f"{text}: the features have seen the labels of their own day")
    if abs(true_ic.mean()) > HIGH_IC:
        return Line(name, LEAK, f"{text}: too high to be true")
    return Line(name, OK, text)


def label_columns_line(subject: Subject, reach: int | None) -> Line:
    """Compare every feature with the labels of its own and of neighbouring days.

    `reach`: the days that the label looks ahead. A column that ranks instruments like a label
    whose return begins after the column's own day contains it.
    """
    name, labels = "labels among features", load_labels(subject.base)
    if labels is None or not labels.names:
        return Line(name, UNKNOWN, "the data has no group 'label'")
    samples = subject.base.samples(slice(None, None), data_key=DK_I, purge=False)
    if samples.raw_label is None:
        return Line(name, UNKNOWN, "the samples have no raw labels")
    cross = feature_matrix(samples, thin_rows(samples, MAX_SCAN_DAYS, 5 * MAX_LINEAR_ROWS))
    values = samples.raw_label.new_full(
        (len(samples.calendar), len(samples.instruments)), torch.nan
    )
    values[samples.date, samples.instrument] = samples.raw_label[:, 0]
    shifts = _unknown_shifts(values, reach)
    best = max(
        (_best_column(samples, cross, values, shift) for shift in shifts), key=lambda b: b[0]
    )
    ic, column, shift = best
    text = f"largest Rank IC of a column with an unknown label: {ic:.2f} ({column}"
    text += f", label of {abs(shift)} days {'later' if shift > 0 else 'before'})" if shift else ")"
    note = "" if reach is not None else "; earlier labels are not compared without horizon=..."
    if ic > HIGH_IC:
        return Line(name, LEAK, f"{text}: no honest feature knows the future so well")
    return Line(name, OK, f"{text}{note}")


def _unknown_shifts(values: Tensor, reach: int | None) -> range:
    """Return the shifts k for which nothing of the label of day t + k is known on day t."""
    if reach is None or reach < 2:
        return range(4)
    rows = ~values[:-1].isnan() & ~values[1:].isnan()
    first = day_rank_norm(values[:-1], rows).where(rows, torch.tensor(0.0))
    second = day_rank_norm(values[1:], rows).where(rows, torch.tensor(0.0))
    similarity = float((first * second).sum() / first.square().sum().clamp(min=1e-12))
    # The span of overlapping labels is unknown, so part of an earlier one may be known.
    return range(4) if similarity > OVERLAP else range(1 - reach, 4)


def _best_column(
    samples: Samples, cross: Cross, values: Tensor, shift: int
) -> tuple[float, str, int]:
    """Return the largest absolute mean Rank IC of a column with the labels `shift` days later."""
    days, place = torch.unique(cross.date, return_inverse=True)
    target = days + shift
    is_inside = (target >= 0) & (target < len(values))
    shape = (len(days), values.shape[1])
    y = values[target.clamp(0, len(values) - 1)].masked_fill(~is_inside[:, None], torch.nan)
    has_sample = torch.zeros(shape, dtype=torch.bool)
    has_sample[place, cross.instrument] = True
    rows = has_sample & ~y.isnan()
    y_rank = _day_ranks(y, rows)
    best = (0.0, samples.feature_names[0], shift)
    for k, name in enumerate(samples.feature_names[: cross.x.shape[1]]):
        x = torch.zeros(shape)
        x[place, cross.instrument] = cross.x[:, k].float()
        x_rank = _day_ranks(x, rows)
        norm = (x_rank.square().sum(1) * y_rank.square().sum(1)).sqrt()
        ic = (x_rank * y_rank).sum(1)[norm > 0] / norm[norm > 0]
        if len(ic) and abs(float(ic.mean())) > best[0]:
            best = (abs(float(ic.mean())), name, shift)
    return best


def _day_ranks(values: Tensor, rows: Tensor) -> Tensor:
    """Return centered ranks by day, zero outside `rows`."""
    ranks = day_rank_norm(values.where(rows, torch.tensor(torch.nan)), rows)
    ranks = ranks.where(rows, torch.tensor(0.0))
    return (ranks - ranks.sum(1, keepdim=True) / rows.sum(1, keepdim=True).clamp(min=1)).where(
        rows, torch.tensor(0.0)
    )
