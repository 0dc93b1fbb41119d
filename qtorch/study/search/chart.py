"""Chart of a hyperparameter search: its trials in order, and the metric by parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qtorch.record.report.chart_style import (
    INK,
    RANK_COLOUR,
    SERIES,
    SOFT,
    add_legend,
    label_axis,
    new_figure,
    style_figure,
)
from qtorch.study.search.trial import TrialRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PARAMETERS = 4
COMPLETE_COLOUR, PRUNED_COLOUR, BEST_COLOUR = SERIES[0], SOFT, RANK_COLOUR
MAX_TITLE_LENGTH = 34


def search_chart(
    rows: Sequence[TrialRow],
    metric: str,
    *,
    maximize: bool,
    importances: Mapping[str, float] | None = None,
    narrow: bool = False,
) -> Figure:
    """Draw the trials in order with the best value so far, and the metric against parameters.

    There is one panel per parameter, for at most four parameters, the most important first. Pruned
    trials are shown with their last reported value.
    """
    scored_rows = [r for r in rows if r.value is not None and np.isfinite(r.value)]
    names = list(dict.fromkeys([*(importances or {}), *(n for r in scored_rows for n in r.params)]))
    names = names[:MAX_PARAMETERS]
    columns = 1 if len(names) == 0 else 2
    panels = 1 + len(names)
    figure, axes = new_figure(2.9, narrow=narrow, rows=-(-panels // columns), columns=columns)
    _draw_history(axes[0], scored_rows, metric, maximize)
    add_legend(axes[0], narrow=narrow)
    for axis, name in zip(axes[1:], names, strict=False):
        share = (importances or {}).get(name)
        _draw_by_parameter(axis, scored_rows, name, metric, share)
    for axis in axes[panels:]:
        axis.set_axis_off()
    return style_figure(figure)


def _draw_history(axis: Any, rows: Sequence[TrialRow], metric: str, maximize: bool) -> None:
    complete = [r for r in rows if r.state == "COMPLETE"]
    pruned_rows = [r for r in rows if r.state == "PRUNED"]
    if pruned_rows:
        axis.scatter(
            [r.number for r in pruned_rows],
            [r.value for r in pruned_rows],
            s=22,
            marker="x",
            color=PRUNED_COLOUR,
            linewidths=1.2,
            label="pruned",
        )
    axis.scatter(
        [r.number for r in complete],
        [r.value for r in complete],
        s=22,
        color=COMPLETE_COLOUR,
        label="complete",
    )
    if complete:
        values = np.array([r.value for r in complete], dtype=float)
        best = np.maximum.accumulate(values) if maximize else np.minimum.accumulate(values)
        axis.step(
            [r.number for r in complete],
            best,
            where="post",
            color=BEST_COLOUR,
            linewidth=1.6,
            label="best so far",
        )
    axis.xaxis.get_major_locator().set_params(integer=True)
    label_axis(axis, "Trials in order", metric, "trial")


def _draw_by_parameter(
    axis: Any, rows: Sequence[TrialRow], name: str, metric: str, share: float | None
) -> None:
    rows_with_param = [r for r in rows if name in r.params]
    is_categorical = any(isinstance(r.params[name], str) for r in rows_with_param)
    if is_categorical:
        categories = sorted({str(r.params[name]) for r in rows_with_param}, key=_numeric_sort_key)
        positions = {category: k for k, category in enumerate(categories)}
        axis.set_xticks(range(len(categories)), [k[:12] for k in categories])
        axis.set_xlim(-0.6, len(categories) - 0.4)
    for state, colour, marker in (
        ("PRUNED", PRUNED_COLOUR, "x"),
        ("COMPLETE", COMPLETE_COLOUR, "o"),
    ):
        state_rows = [r for r in rows_with_param if r.state == state]
        x = [
            positions[str(r.params[name])] if is_categorical else r.params[name] for r in state_rows
        ]
        axis.scatter(
            x, [r.value for r in state_rows], s=22, color=colour, marker=marker, linewidths=1.2
        )
    numbers = [r.params[name] for r in rows_with_param if not is_categorical]
    if numbers and min(numbers) > 0 and max(numbers) / min(numbers) >= 20:
        axis.set_xscale("log")
    title = name if len(name) <= MAX_TITLE_LENGTH else "…" + name[1 - MAX_TITLE_LENGTH :]
    label_axis(axis, title if share is None else f"{title} ({share:.0%})", metric)
    axis.title.set_color(INK)


def _numeric_sort_key(text: str) -> tuple[int, float, str]:
    try:
        return (0, float(text), text)
    except ValueError:
        return (1, 0.0, text)
