"""The notebook graphs against the data of real Qlib's figures (a golden file of them)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import qtorch
from qtorch.backtest import Positions
from qtorch.core.errors import ConfigError
from qtorch.metrics import risk_analysis
from qtorch.record.report import graph_tables, graphs

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "parity"))

import graph_cases  # noqa: E402

GOLDEN = json.loads((ROOT / "tests" / "golden" / "qlib_graphs.json").read_text())
TURNOVER = "model_performance_graph/6"  # lag=2: the first two dates have no scores before them


def round_values(value: Any) -> Any:
    """Values with nine digits, so that the order of a sum does not count."""
    if isinstance(value, dict):
        return {key: round_values(part) for key, part in value.items()}
    if isinstance(value, list):
        return [round_values(part) for part in value]
    return float(f"{value:.9g}") if isinstance(value, float) and abs(value) > 1e-12 else value


@pytest.fixture(scope="module")
def figures():
    pytest.importorskip("plotly", reason="the graphs need plotly")
    qtorch.init(region="cn")  # Qlib's annual figures have 238 days

    def analyse(returns: pd.Series) -> pd.DataFrame:
        return risk_analysis(returns, freq="day", as_qlib=True)

    drawn = graph_cases.draw_all(graphs, graphs, graph_cases.inputs()[2], analyse)
    return {
        f"{name}/{number}": round_values(graph_cases.figure_data(figure))
        for name, parts in drawn.items()
        for number, figure in enumerate(parts)
    }


@pytest.mark.parametrize("name", [name for name in GOLDEN if name != TURNOVER])
def test_a_figure_has_the_data_of_qlibs(figures, name):
    assert figures[name] == round_values(GOLDEN[name])


def test_no_figure_is_left_out_and_each_shows_something(figures):
    assert set(figures) == set(GOLDEN)
    assert all(figure["traces"] for figure in figures.values())


def test_turnover_is_qlibs_where_there_are_scores_before(figures):
    for trace, expected in zip(
        figures[TURNOVER]["traces"], GOLDEN[TURNOVER]["traces"], strict=True
    ):
        assert trace["y"][:2] == [None, None]
        assert trace["y"][2:] == round_values(expected["y"][2:])


def test_positions_may_be_a_mapping_of_dates():
    _, report, frame = graph_cases.inputs()
    value = (frame["amount"] * frame["price"]).groupby(level=0).sum()
    report = report.assign(cash=1.0, value=value, account=value + 1.0)
    mapping = Positions(frame, report)
    assert len(mapping) == len(report)
    pd.testing.assert_frame_equal(
        graph_tables.position_changes(mapping), graph_tables.position_changes(frame)
    )


def test_what_is_sold_bought_and_held_worked_by_hand():
    days = pd.to_datetime(["2020-01-02", "2020-01-03", "2020-01-06"])
    rows = {(days[0], "A"): 3.0, (days[0], "B"): 1.0, (days[1], "A"): 2.0, (days[2], "C"): 5.0}
    index = pd.MultiIndex.from_tuples(list(rows), names=["datetime", "instrument"])
    frame = pd.DataFrame({"amount": 1.0, "price": list(rows.values())}, index=index)
    changes = graph_tables.position_changes(frame)
    assert changes["status"].astype(int).to_dict() == {
        (days[0], "A"): 1,
        (days[0], "B"): 1,
        (days[1], "A"): 0,
        (days[1], "B"): -1,
        (days[2], "A"): -1,
        (days[2], "C"): 1,
    }
    assert changes.loc[(days[1], "B"), "weight"] == 0.25  # that of the day before
    labels = pd.DataFrame(
        {"label": [0.1, 0.2, 0.3, 0.3, 0.2, 0.1]},
        index=pd.MultiIndex.from_product([list("ABC"), days[:2]], names=["instrument", "datetime"]),
    )
    ranks = graph_tables.label_ranks(frame, labels)
    # Hold, Buy, Sell: the ranks of A and B are 3 and 1 of 3, then 2 and 1.
    assert ranks.loc[days[0]].tolist() == [0.0, pytest.approx(100 * 2 / 3), 0.0]
    assert ranks.loc[days[1]].tolist() == pytest.approx([100 * 2 / 3, 0.0, 100 / 3])


def test_positions_are_parsed_to_qlibs_table_worked_by_hand():
    days = pd.bdate_range("2020-01-01", periods=3)

    def holding(amount, price, count):
        return {"amount": amount, "price": price, "count_day": count, "weight": 0.1}

    positions = {
        days[0]: {"A": holding(2.0, 10.0, 1), "B": holding(1.0, 20.0, 1), "cash": 60.0},
        days[1]: {"A": holding(2.0, 11.0, 2), "cash": 80.0, "now_account_value": 102.0},
        days[2]: {"C": holding(5.0, 4.0, 1), "cash": 80.0},
    }
    table = graph_tables.parse_position(positions)
    assert table.index.names == ["instrument", "datetime"]
    assert list(table.columns) == ["amount", "cash", "count_day", "price", "status", "weight"]
    assert table["status"].to_dict() == {
        ("A", days[0]): 1,
        ("B", days[0]): 1,
        ("A", days[1]): 0,
        ("B", days[1]): -1,
        ("C", days[2]): 1,
        ("A", days[2]): -1,
    }
    assert table.loc[("A", days[0]), "weight"] == 0.5  # of the positions, without the cash
    assert table.loc[("A", days[1])].to_dict() == {
        "amount": 2.0,
        "cash": 80.0,
        "count_day": 2,
        "price": 11.0,
        "status": 0,
        "weight": 1.0,
    }
    # What was sold has the values of the bar before.
    assert table.loc[("B", days[1]), ["price", "weight", "cash"]].to_list() == [20.0, 0.5, 60.0]
    with pytest.raises(ConfigError, match="expected a mapping of dates"):
        graph_tables.parse_position(pd.DataFrame())


def test_errors_say_what_is_wrong(monkeypatch):
    pairs, report, _ = graph_cases.inputs()
    with pytest.raises(ConfigError, match="has no column score"):
        graphs.score_ic_graph(pairs[["label"]], show_notebook=False)
    with pytest.raises(ConfigError, match="Did you mean 'pred_ic'"):
        graphs.model_performance_graph(pairs, graph_names=["pred_ik"], show_notebook=False)
    with pytest.raises(ConfigError, match="positions are a int"):
        graph_tables.position_frame(3)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ConfigError, match="need plotly, the extra `plots`: pip install"):
        graphs.report_graph(report, show_notebook=False)


def test_figures_are_shown_unless_they_are_asked_for(monkeypatch):
    objects = pytest.importorskip("plotly.graph_objects", reason="the graphs need plotly")
    num_shown = []
    monkeypatch.setattr(objects.Figure, "show", lambda figure: num_shown.append(len(figure.data)))
    pairs, report, _ = graph_cases.inputs()
    assert graphs.model_performance_graph(pairs, N=3) is None
    assert graphs.report_graph(report) is None
    assert len(num_shown) == 7
    assert all(num_shown)
