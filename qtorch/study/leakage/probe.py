"""Probe a dataset and a model for leaks of the future: one verdict for each question."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from qtorch.core.errors import ConfigError, unknown_name_message
from qtorch.core.serial import State
from qtorch.data.dataset.dataset import DatasetH
from qtorch.data.source.changed import METHODS
from qtorch.process.heartbeat import beat
from qtorch.study.leakage.content import (
    leading_fill_line,
    load_columns,
    normalisation_line,
    pairing_line,
)
from qtorch.study.leakage.future import FutureCheck, label_line
from qtorch.study.leakage.labels import (
    label_columns_line,
    label_rows_line,
    label_tails_line,
    permutation_line,
)
from qtorch.study.leakage.membership import concepts_line, extra_dates_line, survivors_line
from qtorch.study.leakage.report import Line, ProbeReport, accept_lines
from qtorch.study.leakage.segments import embargo_line, fit_window_line, purge_line
from qtorch.study.leakage.subject import Subject, load_labels

log = logging.getLogger(__name__)


def probe(
    dataset: DatasetH,
    model: Any = None,
    *,
    dates: Sequence[Any] | None = None,
    methods: Sequence[str] = METHODS,
    accept: Sequence[str] = (),
    fit: bool = False,
    seed: int = 0,
) -> ProbeReport:
    """Change the data after some dates and report what moves before them, and other signs of leaks.

    `dataset`: a DatasetH or TSDatasetH, which stays as it is; its processors are fitted again on
    each copy. `model`: a fitted model, whose scores are compared too; with `fit` it is fitted on
    the copy first. `dates`: the data is changed after each of them (default: one in the first and
    one in the last segment after "train"). `methods`: "scale", "shuffle" and "delete", see
    `FutureChange`. `accept`: names of lines whose leak is known and accepted.

    Raises ConfigError for other datasets, unknown methods and dates outside the data.
    """
    for method in methods:
        if method not in METHODS:
            raise ConfigError(unknown_name_message("method to change data", str(method), METHODS))
    begin = time.perf_counter()
    subject = Subject(dataset, dates=dates, seed=seed)
    log.info("probe: data changes after %s", ", ".join(f"{d:%Y-%m-%d}" for d in subject.dates))
    state = _prepare_state(subject, model, fit)
    check = FutureCheck(subject, model, state)
    lines = check.run(methods)
    lines += _other_lines(subject, check)
    known_names = {line.name for line in lines}
    for name in accept:
        if name not in known_names:
            raise ConfigError(unknown_name_message("line of a probe", str(name), known_names))
    facts = _facts(subject, model)
    facts["seconds"] = f"{time.perf_counter() - begin:.1f}"
    return ProbeReport(accept_lines(lines, accept), subject.dates, tuple(methods), facts)


def _prepare_state(subject: Subject, model: Any, fit: bool) -> State | None:
    """Return the fitted processors that the model's scores need; fit the model if asked to."""
    if model is None:
        return None
    if fit:
        beat("probe", check="fit")
        model.fit(subject.base)
        return subject.get_fitted_state()
    handler = subject.dataset.handler
    if not getattr(handler, "get_fitted_state", None):
        return None
    if not getattr(handler, "is_fitted", False):
        subject.dataset.view()
    state: State = handler.get_fitted_state()  # type: ignore[attr-defined]
    return state


def _other_lines(subject: Subject, future: FutureCheck) -> list[Line]:
    """Return the lines that need no changed future."""
    labels, measured_reach = load_labels(subject.base), future.label_reach
    declared = subject.base.horizon
    if declared is None:
        declared = subject.handler.horizon()
    reach = measured_reach or declared
    # The first label's own reach; that of one of several labels is unknown unless it is measured.
    names = () if labels is None else labels.names
    measured_first = future.label_reaches.get(names[0] if names else "", 0)
    first_reach = measured_first or (declared if len(names) == 1 else None)
    columns = load_columns(subject)
    checks: tuple[Callable[[], Line], ...] = (
        lambda: label_line(measured_reach, labels is not None, declared),
        lambda: fit_window_line(subject),
        lambda: purge_line(subject, reach),
        lambda: embargo_line(subject, reach),
        lambda: label_rows_line(subject),
        lambda: label_tails_line(subject),
        lambda: label_columns_line(subject, first_reach),
        lambda: permutation_line(subject),
        lambda: pairing_line(subject),
        lambda: normalisation_line(subject, columns),
        lambda: leading_fill_line(columns),
        lambda: survivors_line(subject),
        lambda: concepts_line(subject),
        lambda: extra_dates_line(subject),
    )
    lines = []
    for check in checks:
        lines.append(check())
        beat("probe", check=lines[-1].name)
    return lines


def _facts(subject: Subject, model: Any) -> dict[str, str]:
    calendar = subject.calendar
    view = subject.base.view()
    segments = (f"{n} {a}..{b}" for n, (a, b) in subject.base.segments.items())
    return {
        "data": f"{calendar[0]:%Y-%m-%d}..{calendar[-1]:%Y-%m-%d}, "
        f"{len(view.instruments)} instruments",
        "segments": ", ".join(segments),
        "model": "none" if model is None else type(model).__name__,
    }
