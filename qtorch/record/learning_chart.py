"""How the training went, in pictures: the metrics of each epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qtorch.record.chart_style import SERIES, finish, legend, name_axis, new_figure
from qtorch.record.run_results import PARTS, Histories

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def learning_curves(histories: Histories) -> dict[str, dict[str, Mapping[int, float]]]:
    """The metrics of the epochs by panel: "loss", and "correlation" for the IC family.

    Those of `train/` and `valid/` that have two epochs at least.
    """
    panels: dict[str, dict[str, Mapping[int, float]]] = {}
    for key, history in sorted(histories.items()):
        if not key.startswith(PARTS) or len(history) < 2:
            continue
        last = key.rpartition("/")[2]
        panel = "correlation" if last.endswith("ic") else "loss" if "loss" in last else last
        panels.setdefault(panel, {})[key] = history
    return panels


def learning_chart(
    panels: Mapping[str, Mapping[str, Mapping[int, float]]], *, narrow: bool = False
) -> Figure:
    """One panel a kind of metric, by epoch."""
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
        name_axis(axis, panel.capitalize(), panel, "epoch, from 0")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        legend(axis, narrow=narrow)
    return finish(figure)
