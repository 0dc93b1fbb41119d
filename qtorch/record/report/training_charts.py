"""Charts of a training: learning curves by epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qtorch.record.report.chart_style import (
    SERIES,
    add_legend,
    label_axis,
    new_figure,
    style_figure,
)
from qtorch.record.report.results import TRAINING_PREFIXES, Histories

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def learning_curves(histories: Histories) -> dict[str, dict[str, Mapping[int, float]]]:
    """Group the epoch metrics by panel: "loss", "correlation" for IC and Rank IC, or their name.

    Includes metrics of `train/` and `valid/` with at least two epochs.
    """
    panels: dict[str, dict[str, Mapping[int, float]]] = {}
    for key, history in sorted(histories.items()):
        if not key.startswith(TRAINING_PREFIXES) or len(history) < 2:
            continue
        name = key.rpartition("/")[2]
        panel = "correlation" if name.endswith("ic") else "loss" if "loss" in name else name
        panels.setdefault(panel, {})[key] = history
    return panels


def learning_chart(
    panels: Mapping[str, Mapping[str, Mapping[int, float]]], *, narrow: bool = False
) -> Figure:
    """Draw one panel per kind of metric, by epoch."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(2.7, narrow=narrow, columns=max(len(panels), 1))
    for axis, (panel, curves) in zip(axes, panels.items(), strict=True):
        for k, (key, history) in enumerate(curves.items()):
            epochs = sorted(history)
            axis.plot(
                epochs,
                [history[e] for e in epochs],
                color=SERIES[k % len(SERIES)],
                linewidth=1.8,
                marker="o" if len(epochs) <= 20 else None,
                markersize=3.5,
                label=key,
            )
        label_axis(axis, panel.capitalize(), panel, "epoch, from 0")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        add_legend(axis, narrow=narrow)
    return style_figure(figure)
