"""Tests of the probe's report, its dates and its errors."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ConfigError
from qtorch.study import ProbeReport, probe
from qtorch.study.leakage.comparison import cells_differ
from qtorch.study.leakage.labels import day_rank_ic, permute_by_day
from qtorch.study.leakage.membership import none_leaves_probability
from qtorch.study.leakage.page import write_page
from qtorch.study.leakage.report import ACCEPTED, LEAK, OK, UNKNOWN, Line, accept_lines
from qtorch.study.leakage.subject import choose_rows

LINES = [
    Line("features", OK, "20 cells"),
    Line("concepts", LEAK, "without <dates>"),
    Line("extras", UNKNOWN, "none"),
]


@pytest.fixture
def report() -> ProbeReport:
    return ProbeReport(list(LINES), [pd.Timestamp("2020-03-02")], ("scale",), {"model": "none"})


def test_report_names_its_leaks(report):
    assert report.has_leak
    assert report.summary() == "1 of 3 lines leak: concepts, 1 not checked"
    assert json.loads(report.to_json())["lines"][1]["verdict"] == LEAK
    assert json.loads(report.to_json())["dates"] == ["2020-03-02T00:00:00"]
    assert "concepts" in str(report).splitlines()[1]
    with pytest.raises(KeyError):
        report.line("concept")


def test_an_accepted_leak_is_no_leak(report):
    lines = accept_lines(report.lines, ["concepts", "features"])
    assert [line.verdict for line in lines] == [OK, ACCEPTED, UNKNOWN]
    accepted = ProbeReport(lines)
    assert not accepted.has_leak
    assert accepted.summary() == "no leak found, 1 ok, 1 not checked, 1 accepted"


def test_page_shows_every_line_and_escapes_it(report, tmp_path):
    html = write_page(report, tmp_path / "probe.html").read_text()
    assert "<strong>LEAK</strong>" in html
    assert "without &lt;dates&gt;" in html


def test_default_dates_lie_after_the_train_segment():
    days = pd.bdate_range("2020-01-01", periods=100)
    spans = {"train": (0, 59), "valid": (60, 74), "test": (75, 99)}
    segments = {n: (days[a], days[b]) for n, (a, b) in spans.items()}
    assert choose_rows(days, segments) == [65, 87]
    assert choose_rows(days, {}) == [60, 85]
    assert choose_rows(days, {"train": segments["train"]}) == [60, 85]
    with pytest.raises(ConfigError, match="too few"):
        choose_rows(days[:8], {})


def test_other_datasets_and_methods_are_refused():
    with pytest.raises(ConfigError, match="DatasetH"):
        probe(pd.DataFrame())
    with pytest.raises(ConfigError, match="Did you mean 'shuffle'"):
        probe(pd.DataFrame(), methods=["shuffl"])


def test_cells_differ_beyond_float32_arithmetic():
    first = torch.tensor([1.0, 1.0, torch.nan, torch.nan, torch.inf, torch.inf, 1.0])
    second = torch.tensor([1.00001, 1.01, torch.nan, 1.0, torch.inf, 1.0, -torch.inf])
    differs = cells_differ(first, second, 1.0)
    assert differs.tolist() == [False, True, False, True, False, True, True]


def test_labels_are_permuted_within_days_and_only_where_there_are_rows():
    values = torch.arange(40.0).reshape(4, 10)
    values[1, 3] = torch.nan
    rows = torch.ones(4, 10, dtype=torch.bool)
    rows[2, :5] = False
    out = permute_by_day(values, rows)
    assert not torch.equal(out.nan_to_num(), values.nan_to_num())
    assert torch.equal(out[2, :5], values[2, :5])
    assert torch.equal(out.isnan(), values.isnan())
    assert torch.equal(out.nan_to_num().sort(1).values, values.nan_to_num().sort(1).values)


def test_day_rank_ic_is_spearman_by_day():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(2, 12)).astype("float32")
    labels[3] = np.nan
    date = torch.arange(12) // 6
    frame = pd.DataFrame({"s": scores, "y": labels, "d": date.numpy()}).dropna()
    expected = [part["s"].rank().corr(part["y"].rank()) for _, part in frame.groupby("d")]
    ic = day_rank_ic(torch.from_numpy(scores), torch.from_numpy(labels), date)
    np.testing.assert_allclose(ic, expected, rtol=1e-6)


def test_probability_that_no_member_leaves():
    """Of 5 instruments 2 leave: 3 of the 10 pairs hold none of them."""
    assert none_leaves_probability(5, 2, 2) == pytest.approx(0.3)
    assert none_leaves_probability(5, 2, 4) == 0.0
