"""Inputs of the notebook graphs, for Qlib and for qtorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

NUM_DAYS, NUM_INSTRUMENTS, NUM_HELD = 45, 15, 4


def inputs() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Scores with labels by (instrument, datetime), a report, and positions by (datetime, ...).

    Some scores, labels and rows are missing. Each day one instrument is sold and another bought.
    """
    random = np.random.default_rng(0)
    dates = pd.bdate_range("2019-11-18", periods=NUM_DAYS, name="datetime")
    names = [f"S{k:02d}" for k in range(NUM_INSTRUMENTS)]
    index = pd.MultiIndex.from_product([names, dates], names=["instrument", "datetime"])
    pairs = pd.DataFrame(
        {
            "score": random.standard_normal(len(index)),
            "label": 0.02 * random.standard_normal(len(index)),
        },
        index=index,
    )
    for name in pairs:
        pairs.loc[random.random(len(index)) < 0.04, name] = np.nan
    pairs = pairs[random.random(len(index)) > 0.03]
    report = pd.DataFrame(
        {
            "return": 0.01 * random.standard_normal(NUM_DAYS),
            "cost": 0.001 * random.random(NUM_DAYS),
            "bench": 0.01 * random.standard_normal(NUM_DAYS),
            "turnover": random.random(NUM_DAYS),
        },
        index=dates,
    )
    rows = {}
    portfolio = names[:NUM_HELD]
    for k, date in enumerate(dates):
        if k % 3:  # every third day nothing is traded
            candidates = [name for name in names if name not in portfolio]
            portfolio = [*portfolio[1:], str(random.choice(candidates))]
        for name in portfolio:
            rows[date, name] = (100 * random.random() + 1, 10 * random.random() + 5)
    positions = pd.DataFrame(
        list(rows.values()),
        index=pd.MultiIndex.from_tuples(list(rows), names=["datetime", "instrument"]),
        columns=["amount", "price"],
    )
    return pairs, report, positions.assign(count=1, weight=0.1)


def draw_all(
    model: Any, position: Any, positions: Any, risk_analysis: Callable[[pd.Series], pd.DataFrame]
) -> dict[str, list[Any]]:
    """Draw every graph with the functions of two modules; `positions` are in their form."""
    pairs, report, _ = inputs()
    names = ["group_return", "pred_ic", "pred_autocorr", "pred_turnover"]
    labels = pairs[["label"]]
    excess = report["return"] - report["bench"]
    analysis = pd.concat(
        {
            "excess_return_without_cost": risk_analysis(excess),
            "excess_return_with_cost": risk_analysis(excess - report["cost"]),
        }
    )
    show = {"show_notebook": False}
    return {
        "model_performance_graph": model.model_performance_graph(
            pairs, N=3, lag=2, graph_names=names, **show
        ),
        "reverse": model.model_performance_graph(
            pairs.copy(), reverse=True, graph_names=["group_return"], **show
        ),
        "score_ic_graph": position.score_ic_graph(pairs, **show),
        "report_graph": position.report_graph(report, **show),
        "risk_analysis_graph": position.risk_analysis_graph(analysis, report, **show),
        "cumulative_return_graph": position.cumulative_return_graph(
            positions, report, labels.copy(), **show
        ),
        "rank_label_graph": position.rank_label_graph(
            positions, labels.copy(), start_date=report.index[3], **show
        ),
    }


def figure_data(figure: Any) -> dict[str, Any]:
    """Return the traces of a figure and the shapes of its layout as plain data."""
    traces = []
    for trace in figure.data:
        content = {"type": trace.type, "name": trace.name}
        content |= {axis: plain(trace[axis]) for axis in ("x", "y", "z") if axis in trace}
        if trace.type == "histogram" and trace.xbins.size is not None:
            content["bins"] = plain([trace.xbins.start, trace.xbins.end, trace.xbins.size])
        traces.append(content)
    shapes = [plain([shape.x0, shape.x1]) for shape in figure.layout.shapes]
    breaks = figure.layout.xaxis.rangebreaks or ()
    return {
        "title": figure.layout.title.text,
        "traces": traces,
        "shapes": shapes,
        "breaks": [{"values": plain(b["values"]), "dvalue": b.dvalue} for b in breaks],
    }


def plain(values: Any) -> Any:
    """Return values of a trace as JSON: numbers with 12 digits (NaN: null), dates as text."""
    if values is None:
        return None
    if isinstance(values, list | tuple | np.ndarray | pd.Index | pd.Series):
        return [plain(value) for value in values]
    if isinstance(values, pd.Timestamp | np.datetime64) or hasattr(values, "isoformat"):
        return str(pd.Timestamp(values).date())
    if isinstance(values, int | float | np.number):
        return None if np.isnan(values) else float(f"{values:.12g}")
    return str(values)
