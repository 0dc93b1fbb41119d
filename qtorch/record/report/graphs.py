"""The graphs of Qlib's notebooks as plotly figures: of scores and labels, reports and positions.

Each function takes Qlib's arguments. It shows its figures in a notebook, or returns them as a list
with `show_notebook=False`. Needs the extra `plots`. Corresponds to qlib/contrib/report; the tables
behind the figures are those of `qtorch.record.report.graph_tables`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from qtorch.core.errors import ConfigError, check_name, install_command
from qtorch.record.report import graph_tables as tables

Figure: TypeAlias = Any  # plotly.graph_objects.Figure
Breaks: TypeAlias = Sequence[dict[str, Any]] | None

LINES = {"mode": "lines+markers"}
FILLED = {**LINES, "fill": "tozeroy"}
CURVE_POINTS, NUM_BINS = 500, 20
SHADE, RED = "#d3d3d3", "red"
POINT_COLOUR, LINE_COLOUR = "#19d3f3", "#636efa"
AXIS = {"zeroline": True, "showline": True, "showticklabels": True}
CATEGORIES = {"type": "category", "tickangle": 45}
# The rows of the report's figure, from above: the columns and how they are drawn.
REPORT_ROWS: tuple[tuple[tuple[str, ...], dict[str, str]], ...] = (
    (("cum_bench", "cum_return_wo_cost", "cum_return_w_cost"), LINES),
    (("return_wo_mdd",), FILLED),
    (("return_w_cost_mdd",), FILLED),
    (("cum_ex_return_wo_cost", "cum_ex_return_w_cost"), LINES),
    (("turnover",), LINES),
    (("cum_ex_return_w_cost_mdd",), FILLED),
    (("cum_ex_return_wo_cost_mdd",), FILLED),
)
REPORT_HEIGHTS = (3, 1, 1, 3, 1, 1, 1)
RISK_COLUMNS = ("std", "annualized_return", "information_ratio", "max_drawdown")


def import_plotly() -> Any:
    """Import plotly's figures; ConfigError with the command that installs it."""
    try:
        import plotly.graph_objects  # an extra
        import plotly.subplots
    except ImportError as error:
        raise ConfigError(
            f"the notebook graphs need plotly, the extra `plots`: {install_command('plots')}."
        ) from error
    return plotly


# -- scores and labels -----------------------------------------------------------------------------


def model_performance_graph(
    pred_label: pd.DataFrame,
    lag: int = 1,
    N: int = 5,
    reverse: bool = False,
    rank: bool = False,
    graph_names: Sequence[str] = ("group_return", "pred_ic", "pred_autocorr"),
    show_notebook: bool = True,
    show_nature_day: bool = False,
    *,
    rangebreaks: Breaks = None,
    methods: Sequence[str] = tables.IC_METHODS,
) -> list[Figure] | None:
    """Graphs of how scores rank the labels.

    `pred_label`: frame by datetime and instrument with the columns `score` and `label`.
    `graph_names`: "group_return" (returns of `N` groups by score, and the distribution of the
    long-short return), "pred_ic" (the IC by date, by month, and its distribution), "pred_autocorr"
    (of the scores, `lag` rows apart), "pred_turnover" (of the best and the worst of `N` groups).
    `reverse` changes the sign of the scores in "group_return". `methods`: "IC", "Rank IC"; the
    distribution is that of the first. `rank` is ignored, as in Qlib. `show_nature_day` shows days
    without trading; `rangebreaks` are plotly's, by default the days without scores.
    Differences from Qlib: `reverse` does not change the caller's frame; the turnover of the first
    `lag` dates, which have no scores before them, is not drawn (Qlib compares with the instruments
    in their order).
    """
    graphs: dict[str, Callable[[], list[Figure]]] = {
        "group_return": lambda: _group_figures(pred_label, N, reverse, rangebreaks),
        "pred_ic": lambda: _ic_figures(pred_label, methods, show_nature_day, rangebreaks),
        "pred_autocorr": lambda: [
            _line_figure(
                tables.rank_autocorrelation(pred_label, lag).to_frame(),
                "Auto Correlation",
                rangebreaks,
                mode=None,
            )
        ],
        "pred_turnover": lambda: [
            _line_figure(
                tables.score_turnover(pred_label, N, lag),
                "Top-Bottom Turnover",
                rangebreaks,
                mode=None,
            )
        ],
    }
    for name in graph_names:
        check_name("graph", name, graphs)
    return _show([figure for name in graph_names for figure in graphs[name]()], show_notebook)


def score_ic_graph(
    pred_label: pd.DataFrame, show_notebook: bool = True, *, rangebreaks: Breaks = None
) -> list[Figure] | None:
    """Graph of the IC and Rank IC of each date; `pred_label` as in `model_performance_graph`."""
    table = tables.daily_ics(pred_label.dropna()).set_axis(["ic", "rank_ic"], axis=1)
    return _show([_line_figure(table, "Score IC", rangebreaks)], show_notebook)


def ic_figure(
    ic_df: pd.DataFrame, show_nature_day: bool = True, *, rangebreaks: Breaks = None
) -> Figure:
    """Bars of ICs by date, one colour a column; `show_nature_day` as above."""
    if show_nature_day:
        ic_df = ic_df.reindex(pd.date_range(ic_df.index.min(), ic_df.index.max()))
    objects = import_plotly().graph_objects
    bars = [objects.Bar(x=ic_df.index, y=ic_df[name], name=name) for name in ic_df]
    axis = {"tickangle": 45, "rangebreaks": _breaks(ic_df.index, rangebreaks)}
    return _new_figure(bars, title="Information Coefficient (IC)", xaxis=axis)


def _group_figures(
    pred_label: pd.DataFrame, num_groups: int, reverse: bool, rangebreaks: Breaks
) -> list[Figure]:
    returns = tables.group_returns(pred_label, num_groups, reverse=reverse)
    lines = _line_figure(returns.cumsum(), "Cumulative Return", rangebreaks, mode=None)
    names = ["long-short", "long-average"]
    spread = returns[names].dropna()
    bin_size = float(((returns[names].max() - returns[names].min()) / NUM_BINS).min())
    figure = _new_subplots(rows=1, cols=2, subplot_titles=names)
    for column, name in enumerate(names, 1):
        _add_distribution(figure, spread[name], name, bin_size, column)
    return [lines, figure]


def _ic_figures(
    pred_label: pd.DataFrame, methods: Sequence[str], show_nature_day: bool, rangebreaks: Breaks
) -> list[Figure]:
    objects = import_plotly().graph_objects
    ics = tables.daily_ics(pred_label, methods)
    ic = ics.iloc[:, 0]
    months = tables.monthly_ics(ic)
    heatmap = objects.Heatmap(
        x=months.columns, y=months.index, z=months.to_numpy().tolist(), xtype="array", ytype="array"
    )
    heatmap_figure = _new_figure(
        [heatmap], title="Monthly IC", xaxis={"dtick": 1}, yaxis={"tickformat": "04d", "dtick": 1}
    )
    titles = ["IC", "IC Normal Dist. Q-Q"]
    distribution = _new_subplots(rows=1, cols=2, subplot_titles=titles)
    _add_distribution(distribution, ic.dropna(), "", float((ic.max() - ic.min()) / NUM_BINS), 1)
    theory, sample = tables.normal_quantiles(ic)
    points = objects.Scatter(x=theory, y=sample, mode="markers", marker={"color": POINT_COLOUR})
    # As in Qlib the diagonal reaches over both axes, with the margins of statsmodels.
    ends = [_axis_limits(theory, 0.02), _axis_limits(sample, 0.05)]
    diagonal = [min(low for low, _ in ends), max(high for _, high in ends)]
    line = objects.Scatter(x=diagonal, y=diagonal, mode="lines", line={"color": LINE_COLOUR})
    for trace in (points, line):
        distribution.add_trace(trace, row=1, col=2)
    distribution.update_layout(
        showlegend=False,
        yaxis2={"title": "Observed Quantile"},
        xaxis2={"title": "Normal Distribution Quantile"},
    )
    return [ic_figure(ics, show_nature_day, rangebreaks=rangebreaks), heatmap_figure, distribution]


# -- reports ---------------------------------------------------------------------------------------


def report_graph(report_df: pd.DataFrame, show_notebook: bool = True) -> list[Figure] | None:
    """Graph of a backtest's report: cumulative returns, drawdowns, turnover.

    `report_df`: by date, with the columns return, cost, bench, turnover. The shaded spans are those
    of the largest drawdown, without and with the benchmark's return taken off.
    """
    table = tables.cumulative_report(report_df)
    spans = [
        tables.drawdown_span(table[f"cum_{name}return_wo_cost"], table[falls])
        for name, falls in (("", "return_wo_mdd"), ("ex_", "cum_ex_return_wo_cost_mdd"))
    ]
    start = pd.DataFrame(0.0, index=pd.Index(["T0"]), columns=table.columns)
    table = pd.concat([start, table])
    num_rows = len(REPORT_ROWS)
    figure = _new_subplots(
        rows=num_rows,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.01,
        row_heights=list(REPORT_HEIGHTS),
    )
    scatter = import_plotly().graph_objects.Scatter
    for row, (names, style) in enumerate(REPORT_ROWS, 1):
        for name in names:
            trace = scatter(x=table.index, y=table[name], name=name.replace("_", " "), **style)
            figure.add_trace(trace, row=row, col=1)
    for row in range(1, num_rows + 1):
        figure.layout[f"yaxis{row}"].update(AXIS)
        figure.layout[f"xaxis{row}"].update({**CATEGORIES, "showline": row == num_rows})
    bands = ((0.55, 1), (0, 0.55))
    shapes = [_shade_span(span, *band) for span, band in zip(spans, bands, strict=True)]
    figure.update_layout(height=1200, title=" ", shapes=shapes)
    return _show([figure], show_notebook)


def risk_analysis_graph(
    analysis_df: pd.DataFrame | None = None,
    report_normal_df: pd.DataFrame | None = None,
    report_long_short_df: pd.DataFrame | None = None,
    show_notebook: bool = True,
) -> list[Figure] | None:
    """Graphs of the risk analysis of a backtest, and of each of its months.

    `analysis_df`: `port_analysis_1day.pkl`, a frame by (excess return, figure) with the column
    `risk`. `report_normal_df`: the report; months with fewer than three bars are left out. Only
    what is given is drawn; `report_long_short_df` is not used, as in Qlib. Months have the annual
    figures of the session's region (in Qlib those of 238 days).
    """
    objects = import_plotly().graph_objects
    figures = []
    if analysis_df is not None:
        table = analysis_df["risk"].unstack()
        names = [name for name in RISK_COLUMNS if name in table]
        titles = [name.replace("_", " ") for name in names]
        figure = _new_subplots(rows=1, cols=len(names), subplot_titles=titles)
        for column, name in enumerate(names, 1):
            bar = objects.Bar(x=table.index, y=table[name], name=name.replace("_", " "))
            figure.add_trace(bar, row=1, col=column)
        figures.append(figure)
    if report_normal_df is not None:
        for name, months in tables.monthly_risk(report_normal_df).items():
            lines = [objects.Scatter(x=months.index, y=months[c], name=c, **LINES) for c in months]
            figures.append(_new_figure(lines, title=name, xaxis=CATEGORIES))
    return _show(figures, show_notebook)


# -- positions -------------------------------------------------------------------------------------


def cumulative_return_graph(
    position: Any,
    report_normal: pd.DataFrame,
    label_data: pd.DataFrame,
    show_notebook: bool = True,
    start_date: Any = None,
    end_date: Any = None,
) -> list[Figure] | None:
    """Graphs of what was bought, sold and held: its cumulative excess return, weight and values.

    `position`: the positions of a backtest by date (`positions_normal_1day.pkl`), or their frame.
    `report_normal`: its report (column bench). `label_data`: a frame
    of one column by datetime and instrument, the return from the date to the next. Below zero is a
    profit for what was sold. The red line is the mean of the histogram.
    """
    table = tables.trade_returns(position, report_normal, label_data, start_date, end_date)
    table.index = pd.DatetimeIndex(table.index).strftime("%Y-%m-%d")
    sides = ("buy", "sell", "buy_minus_sell", "hold")
    return _show([_trade_figure(table, side) for side in sides], show_notebook)


def rank_label_graph(
    position: Any,
    label_data: pd.DataFrame,
    start_date: Any = None,
    end_date: Any = None,
    show_notebook: bool = True,
) -> list[Figure] | None:
    """Graphs of the mean rank of the labels of what was held, bought and sold, in percent by date.

    1 is near the best label of the day. `position` and `label_data` as in
    `cumulative_return_graph`.
    """
    table = tables.label_ranks(position, label_data, start_date, end_date)
    table.index = pd.DatetimeIndex(table.index).strftime("%Y-%m-%d")
    scatter = import_plotly().graph_objects.Scatter
    figures = [
        _new_figure(
            [scatter(x=table.index, y=table[name], name=name, **LINES)],
            title=name,
            xaxis=CATEGORIES,
            yaxis={"title": "label-rank-ratio: %"},
        )
        for name in table
    ]
    return _show(figures, show_notebook)


def _trade_figure(table: pd.DataFrame, side: str) -> Figure:
    """The figure of one side: return above weight, and beside them the histogram of the values."""
    objects = import_plotly().graph_objects
    figure = _new_subplots(
        rows=2,
        cols=2,
        vertical_spacing=0.01,
        row_heights=[2, 1],
        column_widths=[3, 1],
        specs=[[{"rowspan": 1}, {"rowspan": 2}], [{"rowspan": 1}, None]],
    )
    values = table[f"{side}_value"]
    weight = f"{side.replace('minus', 'plus')}_weight"
    for name, row in ((f"cum_{side}", 1), (weight, 2)):
        trace = objects.Scatter(x=table.index, y=table[name], name=name.replace("_", " "), **LINES)
        figure.add_trace(trace, row=row, col=1)
    histogram = objects.Histogram(x=values, name=f"{side}_value".replace("_", " "))
    figure.add_trace(histogram, row=1, col=2)
    axis = {"showline": False, "zeroline": True, "tickangle": 45}
    mean = float(values.mean())
    line = {"color": RED, "width": 1}
    figure.update_layout(
        xaxis={**axis, "type": "category", "showticklabels": False},
        xaxis2=axis,
        xaxis3={**axis, "type": "category"},
        yaxis={**AXIS, "title": side},
        yaxis2=AXIS,
        yaxis3=AXIS,
        height=500,
        title=f"{side}(the red line in the histogram on the right represents the average)",
        shapes=[
            {"type": "line", "xref": "x2", "yref": "paper", "line": line}
            | {"x0": mean, "x1": mean, "y0": 0, "y1": 1}
        ],
    )
    return figure


# -- parts -----------------------------------------------------------------------------------------


def _show(figures: list[Figure], show_notebook: bool) -> list[Figure] | None:
    """Show figures in a notebook, or return them."""
    if not show_notebook:
        return figures
    for figure in figures:
        figure.show()
    return None


def _new_figure(traces: list[Any], **layout: Any) -> Figure:
    figure = import_plotly().graph_objects.Figure(data=traces, layout=layout)
    figure.update_layout(template=None)
    return figure


def _new_subplots(**options: Any) -> Figure:
    figure = import_plotly().subplots.make_subplots(**options)
    figure.update_layout(template=None)
    return figure


def _line_figure(
    table: pd.DataFrame, title: str, rangebreaks: Breaks, *, mode: str | None = LINES["mode"]
) -> Figure:
    """Lines by date, one a column."""
    scatter = import_plotly().graph_objects.Scatter
    lines = [scatter(x=table.index, y=table[name], name=str(name), mode=mode) for name in table]
    axis = {"tickangle": 45, "rangebreaks": _breaks(table.index, rangebreaks)}
    return _new_figure(lines, title=title, xaxis=axis)


def _add_distribution(
    figure: Figure, values: pd.Series, name: str, bin_size: float, column: int
) -> None:
    """Add a histogram of probability density and its kernel density to a subplot."""
    objects = import_plotly().graph_objects
    numbers = values.to_numpy(np.float64)
    low, high = float(numbers.min()), float(numbers.max())
    histogram = objects.Histogram(
        x=numbers,
        name=name,
        legendgroup=name,
        histnorm="probability density",
        autobinx=False,
        xbins={"start": low, "end": high, "size": bin_size},
        opacity=0.7,
    )
    figure.add_trace(histogram, row=1, col=column)
    if len(numbers) > 1 and high > low:
        points = low + np.arange(CURVE_POINTS) * (high - low) / CURVE_POINTS
        density = tables.gaussian_density(numbers, points)
        curve = objects.Scatter(
            x=points, y=density, name=name, legendgroup=name, showlegend=False, mode="lines"
        )
        figure.add_trace(curve, row=1, col=column)


def _axis_limits(values: np.ndarray, margin: float) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return low - margin * (high - low), high + margin * (high - low)


def _shade_span(span: tuple[Any, Any], low: float, high: float) -> dict[str, Any]:
    position = {"xref": "x", "yref": "paper", "x0": span[0], "x1": span[1], "y0": low, "y1": high}
    return {"type": "rect", "fillcolor": SHADE, "opacity": 0.3, "line": {"width": 0}, **position}


def _breaks(dates: pd.Index, rangebreaks: Breaks) -> list[dict[str, Any]]:
    """Return plotly's breaks of an axis of dates: the spans without data, by their length."""
    if rangebreaks is not None:
        return list(rangebreaks)
    stamps = pd.DatetimeIndex(dates).sort_values()
    if len(stamps) < 2:
        return []
    gaps = stamps[1:] - stamps[:-1]
    step = gaps.min()
    by_length: dict[pd.Timedelta, list[pd.Timestamp]] = {}
    for gap, stamp in zip(gaps, stamps[:-1], strict=True):
        if gap > step:
            by_length.setdefault(gap - step, []).append(stamp + step)
    return [
        {"values": starts, "dvalue": math.floor(length / pd.Timedelta(milliseconds=1))}
        for length, starts in by_length.items()
    ]
