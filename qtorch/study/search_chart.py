"""A search in a picture: its trials in order, what mattered, and the values by parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qtorch.record.chart_style import (
    INK,
    RANK_COLOUR,
    SERIES,
    SOFT,
    finish,
    legend,
    name_axis,
    new_figure,
)
from qtorch.tracking.trials.row import TrialRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PARAMETERS = 4
DONE, STOPPED, BEST = SERIES[0], SOFT, RANK_COLOUR
MOST_LETTERS = 34


def search_chart(
    rows: Sequence[TrialRow],
    metric: str,
    *,
    maximize: bool,
    importances: Mapping[str, float] | None = None,
    narrow: bool = False,
) -> Figure:
    """Panels: the trials in order with the best so far, and the value by parameter, for at most
    four of them, the most important first. Pruned trials stand with their last reported value."""
    judged = [r for r in rows if r.value is not None and np.isfinite(r.value)]
    names = list(dict.fromkeys([*(importances or {}), *(n for r in judged for n in r.params)]))
    names = names[:MOST_PARAMETERS]
    columns = 1 if len(names) == 0 else 2
    panels = 1 + len(names)
    figure, axes = new_figure(2.9, narrow=narrow, rows=-(-panels // columns), columns=columns)
    _history(axes[0], judged, metric, maximize)
    legend(axes[0], narrow=narrow)
    for axis, name in zip(axes[1:], names, strict=False):
        share = (importances or {}).get(name)
        _by_parameter(axis, judged, name, metric, share)
    for axis in axes[panels:]:
        axis.set_axis_off()
    return finish(figure)


def _history(axis: Any, rows: Sequence[TrialRow], metric: str, maximize: bool) -> None:
    done = [r for r in rows if r.state == "COMPLETE"]
    stopped = [r for r in rows if r.state == "PRUNED"]
    if stopped:
        axis.scatter(
            [r.number for r in stopped],
            [r.value for r in stopped],
            s=22,
            marker="x",
            color=STOPPED,
            linewidths=1.2,
            label="pruned",
        )
    axis.scatter([r.number for r in done], [r.value for r in done], s=22, color=DONE, label="done")
    if done:
        values = np.array([r.value for r in done], dtype=float)
        best = np.maximum.accumulate(values) if maximize else np.minimum.accumulate(values)
        axis.step(
            [r.number for r in done],
            best,
            where="post",
            color=BEST,
            linewidth=1.6,
            label="best so far",
        )
    axis.xaxis.get_major_locator().set_params(integer=True)
    name_axis(axis, "Trials in order", metric, "trial")


def _by_parameter(
    axis: Any, rows: Sequence[TrialRow], name: str, metric: str, share: float | None
) -> None:
    having = [r for r in rows if name in r.params]
    texts = any(isinstance(r.params[name], str) for r in having)
    if texts:
        kinds = sorted({str(r.params[name]) for r in having}, key=_by_number)
        place = {kind: k for k, kind in enumerate(kinds)}
        axis.set_xticks(range(len(kinds)), [k[:12] for k in kinds])
        axis.set_xlim(-0.6, len(kinds) - 0.4)
    for state, colour, marker in (("PRUNED", STOPPED, "x"), ("COMPLETE", DONE, "o")):
        chosen = [r for r in having if r.state == state]
        x = [place[str(r.params[name])] if texts else r.params[name] for r in chosen]
        axis.scatter(
            x, [r.value for r in chosen], s=22, color=colour, marker=marker, linewidths=1.2
        )
    numbers = [r.params[name] for r in having if not texts]
    if numbers and min(numbers) > 0 and max(numbers) / min(numbers) >= 20:
        axis.set_xscale("log")
    title = name if len(name) <= MOST_LETTERS else "…" + name[1 - MOST_LETTERS :]
    name_axis(axis, title if share is None else f"{title} ({share:.0%})", metric)
    axis.title.set_color(INK)


def _by_number(text: str) -> tuple[int, float, str]:
    try:
        return (0, float(text), text)
    except ValueError:
        return (1, 0.0, text)
