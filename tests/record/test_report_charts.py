"""Charts of the report: labelled axes, correct values, no overlapping text."""

from __future__ import annotations

from io import BytesIO
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from qtorch.metrics import calc_ic, concentration, ic_decay, quantile_returns, score_autocorrelation
from qtorch.record.report.chart_style import NARROW, SERIES, WIDE, new_figure
from qtorch.record.report.page import _png, format_number
from qtorch.record.report.portfolio_charts import (
    concentration_chart,
    drawdown_chart,
    excess_chart,
    return_chart,
    turnover_chart,
)
from qtorch.record.report.results import signal_tables
from qtorch.record.report.signal_charts import (
    autocorrelation_chart,
    decay_chart,
    ic_chart,
    monthly_chart,
    monthly_means,
    quantile_chart,
    rolling_ic_chart,
    spread_chart,
)
from qtorch.record.report.training_charts import learning_chart, learning_curves
from qtorch.study.comparison_page import curves_chart, dots_chart

DAYS = pd.bdate_range("2019-06-03", periods=320, name="datetime")
NAMES = [f"I{k}" for k in range(12)]


@pytest.fixture(scope="module")
def draw(account_walk):
    """`draw[name](narrow=...)` draws the chart with that name."""
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([DAYS, NAMES], names=["datetime", "instrument"])
    label = pd.Series(rng.normal(0, 0.02, len(index)), index)
    score = label.groupby(level=1).transform(lambda v: v.rolling(5, min_periods=1).mean())
    score = score + rng.normal(0, 0.02, len(index))
    ic = pd.Series(rng.normal(0.03, 0.1, len(DAYS)), DAYS)
    decade = pd.Series(rng.normal(0, 0.1, 3650), pd.date_range("2011-01-01", periods=3650))
    quantiles = quantile_returns(score, label)
    report, _ = account_walk(num_days=320)
    table, long_table = (
        concentration(positions["weight"]).assign(cash=days["cash"] / days["account"])
        for days, positions in (account_walk(num_days=n) for n in (320, 800))
    )
    curves = {f"{p}/{m}": dict(enumerate(rng.random(9))) for p in ("train", "valid")
              for m in ("loss", "rank_ic")}  # fmt: skip
    lags = {lag: score_autocorrelation(score, lag) for lag in (1, 5)}
    groups = {
        f"GRU, hidden_size={k}, lr=0.00{k}": pd.DataFrame(rng.normal(0, 0.01, (320, 3)), DAYS)
        for k in range(9)
    }
    dots = {m: {g: rng.normal(0.02, 0.01, 3) for g in groups} for m in ("IC", "Return, a year")}
    charts = {
        "rolling_ic": lambda **o: rolling_ic_chart(ic, ic * 0.9, **o),
        "monthly_ic": lambda **o: monthly_chart(ic, **o),
        "many_years": lambda **o: monthly_chart(decade, **o),
        "ic_decay": lambda **o: decay_chart(ic_decay(score, label, (1, 2, 5)), **o),
        "quantiles": lambda **o: quantile_chart(quantiles, **o),
        "spread": lambda **o: spread_chart(quantiles[5] - quantiles[1], **o),
        "autocorrelation": lambda **o: autocorrelation_chart(lags, **o),
        "return": lambda **o: return_chart(report, **o),
        "compounded": lambda **o: return_chart(report.assign(bench=np.nan), "product", **o),
        "excess": lambda **o: excess_chart(report, **o),
        "drawdown": lambda **o: drawdown_chart(report, **o),
        "turnover": lambda **o: turnover_chart(report, **o),
        "concentration": lambda **o: concentration_chart(table, **o),
        "long_concentration": lambda **o: concentration_chart(long_table, **o),
        "learning": lambda **o: learning_chart(learning_curves(curves), **o),
        "groups": lambda **o: curves_chart(groups, "Cumulative return", "%", percent=True, **o),
        "dots": lambda **o: dots_chart(dots, percent=["Return, a year"], **o),
    }
    return charts


CHARTS = (
    "rolling_ic", "monthly_ic", "ic_decay", "quantiles", "spread", "autocorrelation", "return",
    "compounded", "excess", "drawdown", "turnover", "concentration", "long_concentration",
    "learning", "groups", "dots", "many_years",
)  # fmt: skip


@pytest.mark.parametrize("name", CHARTS)
def test_all_axes_are_labelled_in_both_formats(draw, name):
    for narrow, width in ((False, WIDE), (True, NARROW)):
        figure = draw[name](narrow=narrow)
        assert figure.get_size_inches()[0] == width
        for axis in figure.axes:
            if axis.get_label() == "<colorbar>":
                assert axis.get_ylabel()
                continue
            assert axis.get_title(loc="left")
            assert axis.get_xlabel()
            assert axis.get_ylabel() or name == "dots"


def test_lags_and_horizons_are_said_in_the_bars_of_the_scores():
    times = pd.date_range("2024-01-02 09:30", periods=6, freq="30min")
    times = times.append(times + pd.Timedelta(days=1))
    index = pd.MultiIndex.from_product([times, NAMES], names=["datetime", "instrument"])
    score = pd.Series(np.random.default_rng(0).normal(size=len(index)), index)
    tables = signal_tables(score, score, (1, 2), (1,), 2)
    assert tables.bars == "bars of 30min"
    figure = decay_chart(tables.decay, bars=tables.bars)
    assert figure.axes[0].get_xlabel() == "horizon, bars of 30min"
    assert autocorrelation_chart(tables.autocorrelation).axes[0].get_xlabel() == (
        "lag, bars of 30min"
    )
    ic = calc_ic(score, score)[0]
    assert ic_chart(ic, ic).axes[2].get_title(loc="left") == "Distribution over 12 bars of 30min"


def test_all_charts_are_tested(draw):
    assert set(draw) == set(CHARTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHARTS)
def test_no_text_overlaps_or_is_cut_off(draw, name):
    for narrow in (False, True):
        figure = draw[name](narrow=narrow)
        figure.draw_without_rendering()
        figure_box = figure.get_window_extent()
        texts = []
        for axis in figure.axes:
            legend = axis.get_legend()
            axis_texts = [axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label]
            labels = [*axis.get_xticklabels(), *axis.get_yticklabels()]
            visible_texts = [t for t in [*axis_texts, *labels] if t.get_text() and t.get_visible()]
            texts_inside = [t for t in visible_texts if not _is_outside(t, axis)]
            texts += [(t.get_text(), t.get_window_extent()) for t in texts_inside]
            if legend is not None:
                texts.append(("legend", legend.get_window_extent()))
        for text, box in texts:
            assert box.x0 >= figure_box.x0 - 1, (narrow, text)
            assert box.x1 <= figure_box.x1 + 1, (narrow, text)
        for (first, a), (second, b) in combinations(texts, 2):
            overlap_width = min(a.x1, b.x1) - max(a.x0, b.x0)
            overlap_height = min(a.y1, b.y1) - max(a.y0, b.y0)
            assert overlap_width <= 1 or overlap_height <= 1, (narrow, first, second)


def _is_outside(text, axis) -> bool:
    """Whether a tick label is outside the axis limits, so that it is not drawn."""
    box, axis_box = text.get_window_extent(), axis.get_window_extent()
    middle_x, middle_y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    is_within_width = middle_x > axis_box.x0 - 2 and middle_x < axis_box.x1 + 2
    is_within_height = middle_y > axis_box.y0 - 2 and middle_y < axis_box.y1 + 2
    return not (is_within_width or is_within_height)


@pytest.mark.slow
def test_png_preserves_the_colours():
    figure, axes = new_figure(1.0, narrow=True)
    for k, colour in enumerate(SERIES):
        axes[0].fill_between([k, k + 0.02], 0, 1, color=colour, linewidth=0)
    with Image.open(BytesIO(_png(figure).data)) as image:
        png_colours = {tuple(c) for c in np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()}
    for colour in SERIES:
        expected_colour = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
        assert (
            min(
                max(abs(a - b) for a, b in zip(expected_colour, c, strict=True))
                for c in png_colours
            )
            <= 4
        )


def test_monthly_means_match_a_hand_worked_case():
    days = pd.to_datetime(["2019-12-30", "2020-01-02", "2020-01-03", "2020-03-02"])
    table = monthly_means(pd.Series([0.1, 0.2, 0.4, np.nan], days))
    assert table.index.tolist() == [2019, 2020]
    assert table.loc[2019, 12] == 0.1
    assert table.loc[2020, 1] == pytest.approx(0.3)
    assert int(table.notna().sum().sum()) == 2


def test_lines_are_the_returns(draw, account_walk):
    report, _ = account_walk(num_days=320)
    values = line_values(draw["return"](narrow=False))
    np.testing.assert_allclose(values["without cost"], report["return"].cumsum())
    np.testing.assert_allclose(values["with cost"], (report["return"] - report["cost"]).cumsum())
    np.testing.assert_allclose(values["benchmark"], report["bench"].cumsum())
    net_drawdown = line_values(draw["drawdown"](narrow=False))["portfolio, with cost"]
    total = (report["return"] - report["cost"]).cumsum()
    np.testing.assert_allclose(net_drawdown, total - total.cummax())


def line_values(figure) -> dict:
    """Return the values of the lines in the first axes by label."""
    return {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}


def test_learning_curves_contain_epoch_metrics_only():
    histories = {"train/loss": {0: 1.0, 1: 0.5}, "valid/ic": {0: 0.1}, "IC": {0: 1.0, 1: 2.0},
                 "valid/rank_ic": {0: 0.1, 1: 0.2}}  # fmt: skip
    panels = learning_curves(histories)
    assert {k: list(v) for k, v in panels.items()} == {
        "loss": ["train/loss"], "correlation": ["valid/rank_ic"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("IC", 0.03125, "0.0312"),
        ("Rank IC", -2.49e-5, "−0.000025"),
        ("report.max_drawdown", -0.0512, "−5.12%"),
        ("report.quantile_return.1", 0.00051, "0.051%"),
        ("1day.excess_return_with_cost.std", 0.0123, "1.23%"),
        ("1day.excess_return_with_cost.information_ratio", 1.5, "1.500"),
        ("report.probabilistic_sharpe", 0.954, "95.4%"),
        ("ic.p_value", 1e-9, "< 0.0001"),
        ("report.num_positions", 30.0, "30"),
        ("train/loss", 12345.6, "12,346"),
        ("IC", float("nan"), "–"),
        ("lr", 0.0, "0.0000"),
    ],
)
def test_format_number(metric, value, text):
    assert format_number(value, metric) == text
