"""Tests of run comparisons: grouping, means over seeds, significance tests, and the page."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from qtorch import R
from qtorch.core.errors import ConfigError
from qtorch.metrics import deflated_sharpe
from qtorch.study import compare_runs, write_comparison
from qtorch.study.comparison import assess_runs, differing_params
from qtorch.study.comparison_page import _chart_name, _metric_columns
from qtorch.study.sweep import JOB_TAG, seed_groups, sweep_jobs

DAYS = pd.bdate_range("2020-01-01", periods=120, name="datetime")


@pytest.fixture
def make_run(store, account_walk):
    """`make_run(model, seed, mean_ic, **params)`: a finished run with the results of a training."""

    def make(model: str, seed: int, mean_ic: float, portfolio: bool = True, **params):
        rng = np.random.default_rng([seed, int(mean_ic * 1000)])
        with R.start(experiment_name="compared"):
            recorder = R.get_recorder()
            recorder.log_params(**{"model.network._target_": f"qtorch.nn.{model}", **params})
            recorder.log_params(seed=seed)
            ic = pd.Series(rng.normal(mean_ic, 0.05, len(DAYS)), DAYS)
            recorder.save_objects(
                artifact_path="sig_analysis",
                **{"ic.pkl": ic, "ric.pkl": ic * 0.9, "long_short_r.pkl": ic * 0.1},
            )
            recorder.log_batch({"IC": ic.mean(), "Rank IC": 0.9 * ic.mean()}, step=0)
            if portfolio:
                report, _ = account_walk(num_days=120, seed=seed + 10 * len(params))
                report["return"] += mean_ic / 50
                recorder.save_objects(
                    artifact_path="portfolio_analysis", **{"report_normal_1day.pkl": report}
                )
                name = "1day.excess_return_with_cost.annualized_return"
                excess = report["return"] - report["cost"] - report["bench"]
                recorder.log_batch({name: excess.mean() * 238}, step=0)
        return recorder

    return make


@pytest.fixture
def six_runs(make_run):
    """Runs of two models with three seeds each; one model is better than the other."""
    gru_runs = [make_run("GRU", s, 0.05, hidden_size=8) for s in range(3)]
    return gru_runs + [make_run("MLP", s, 0.02, layers=[4], depth=1) for s in range(3)]


@pytest.mark.slow
def test_runs_are_grouped_by_setting(six_runs):
    comparison = compare_runs(six_runs)
    assert [g.name for g in comparison.groups] == ["GRU", "MLP"]
    assert [[r.seed for r in g.runs] for g in comparison.groups] == [["0", "1", "2"]] * 2
    values = [r.list_metrics()["IC"] for r in six_runs[:3]]
    mean, std = comparison.groups[0].mean_and_std("IC")
    assert (mean, std) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert math.isnan(comparison.groups[0].mean_and_std("none")[0])
    assert set(differing_params(comparison.groups)) == {
        "model.network._target_", "hidden_size", "layers", "depth"
    }  # fmt: skip


def test_group_names_show_differing_params(make_run):
    runs = [make_run("GRU", 0, 0.02, **{"model.hidden_size": h, "lr": 0.1}) for h in (8, 16)]
    assert [g.name for g in compare_runs(runs).groups] == ["hidden_size=8", "hidden_size=16"]
    runs = [make_run("GRU", 0, 0.02, **p) for p in ({"a": 1}, {"b": 1})]
    assert [g.name for g in compare_runs(runs).groups] == ["GRU (1)", "GRU (2)"]


def records(open_cost: float, *, portfolio: bool = True) -> list[dict[str, object]]:
    """The records of a task, whose backtest has the cost."""
    backtest = {"benchmark": "scored", "exchange_kwargs": {"open_cost": open_cost}}
    portfolio_record = {"_target_": "qtorch.record.PortAnaRecord", "config": {"backtest": backtest}}
    return [{"_target_": "qtorch.record.SignalRecord"}, *[portfolio_record] * portfolio]


def test_runs_that_differ_in_a_record_are_named_by_its_setting(make_run):
    runs = [make_run("GRU", 0, 0.02, record=records(cost)) for cost in (0.0005, 0.003)]
    groups = compare_runs(runs).groups
    assert [g.name for g in groups] == ["open_cost=0.0005", "open_cost=0.003"]
    name = "record.PortAnaRecord.config.backtest.exchange_kwargs.open_cost"
    assert differing_params(groups) == {name: ["0.0005", "0.003"]}


def test_jobs_of_a_sweep_have_the_names_of_its_table(make_run):
    runs = [make_run("GRU", 0, 0.02, record=records(cost)) for cost in (0.0005, 0.003)]
    overrides = [["record=full", f"portfolio.open_cost={c}", "seed=0"] for c in (0.0005, 0.003)]
    for number, (run, words) in enumerate(zip(runs, overrides, strict=True)):
        run.set_tags(**{f"{JOB_TAG}a": json.dumps({"number": number, "overrides": words})})
    names = [g.name for g in compare_runs(runs).groups]
    assert names == ["portfolio.open_cost=0.0005", "portfolio.open_cost=0.003"]
    assert names == [g.name for g in seed_groups(sweep_jobs("a"))]
    assert _chart_name("model.network.hidden_size=8 lr=0.1") == "hidden_size=8 lr=0.1"


def test_runs_with_the_same_returns_are_no_choice(make_run):
    runs = [make_run("GRU", 0, 0.05, lr=lr) for lr in (0.1, 0.2)]
    comparison = compare_runs(runs)
    assert comparison.selection is None
    assert "All 2 runs with returns have the same ones" in comparison.notes[0]
    assert all(s.expected_best > 0 for s in comparison.sharpe.values())
    selection = assess_runs(runs)
    assert selection is not None
    assert (selection.test, selection.notes) == (None, comparison.notes)
    comparison = compare_runs([*runs, make_run("MLP", 1, 0.05)])
    assert comparison.selection is not None
    assert comparison.selection.superiority.num_strategies == 2
    assert "1 of the 3 runs have the same returns as another run" in comparison.notes[0]


def test_returns_without_a_common_bar_are_not_assessed(make_run):
    runs = [make_run("GRU", seed, 0.05, portfolio=False) for seed in (0, 1)]
    returns = runs[0].load_object("sig_analysis/long_short_r.pkl")
    later = returns.set_axis(returns.index + pd.Timedelta(days=1000))
    runs[0].save_objects(artifact_path="sig_analysis", **{"long_short_r.pkl": later})
    selection = assess_runs(runs)
    assert selection is not None
    assert selection.test is None
    assert "no bar in common" in selection.notes[0]


@pytest.mark.slow
def test_groups_are_compared_by_daily_means(six_runs):
    tests_by_series = {t.series: t for t in compare_runs(six_runs).tests}
    assert set(tests_by_series) == {"ic", "rank_ic", "returns"}
    means = [
        np.mean([r.load_object("sig_analysis/ic.pkl") for r in part], axis=0)
        for part in (six_runs[:3], six_runs[3:])
    ]
    gap = means[0] - means[1]
    test = tests_by_series["ic"].test
    assert (tests_by_series["ic"].first, tests_by_series["ic"].second, test.count) == (
        "GRU",
        "MLP",
        120,
    )
    assert test.mean == pytest.approx(gap.mean())
    assert test.statistic == pytest.approx(stats.ttest_1samp(gap, 0).statistic, rel=0.5)
    assert tests_by_series["ic"].adjusted_p_value == test.p_value < 0.01


@pytest.mark.slow
def test_sharpe_is_deflated_by_number_of_tries(six_runs):
    comparison = compare_runs(six_runs)
    report = six_runs[0].load_object("portfolio_analysis/report_normal_1day.pkl")
    returns = report["return"] - report["cost"] - report["bench"]
    sharpes = [s.sharpe for s in comparison.sharpe.values()]
    assert comparison.tries == 6
    assert comparison.sharpe[six_runs[0].id] == deflated_sharpe(returns, 6, sharpes)
    with_more_tries = compare_runs(six_runs, tries=500)
    assert (
        with_more_tries.sharpe[six_runs[0].id].probability
        < comparison.sharpe[six_runs[0].id].probability
    )


@pytest.mark.slow
def test_the_best_run_is_assessed_and_the_tries_are_those_of_the_sweep(six_runs, tmp_path):
    comparison = compare_runs(six_runs[:3])
    assert comparison.tries == 3
    assert comparison.tries_description == "the compared runs"
    for k, run in enumerate(six_runs):
        run.set_tags(**{f"{JOB_TAG}sweep1": f'{{"number": {k}, "overrides": []}}'})
    comparison = compare_runs(six_runs[:3])  # three jobs of the sweep are not shown
    assert comparison.tries == 6
    assert "sweeps" in comparison.tries_description
    best = max(comparison.sharpe, key=lambda run: comparison.sharpe[run].sharpe)
    selection = comparison.selection
    assert selection is not None
    assert selection.best == best
    assert selection.sharpe == comparison.sharpe[best]
    assert selection.superiority.num_strategies == 3
    text = write_comparison(six_runs[:3], tmp_path).read_text()
    assert "Probability of overfitting" in text
    assert "all jobs of the runs&#39; sweeps" in text


@pytest.mark.usefixtures("no_pictures")
def test_long_short_return_is_used_without_portfolios(make_run, tmp_path):
    runs = [make_run("GRU", 0, 0.05), make_run("GRU", 1, 0.05, portfolio=False)]
    comparison = compare_runs(runs)
    assert "before costs" in comparison.returns_description
    assert "1 of the 2 runs have no portfolio" in comparison.notes[0]
    text = write_comparison(runs, tmp_path).read_text(encoding="utf-8")
    assert text.index("1 of the 2 runs have no portfolio") < text.index("<h2>Groups")
    pd.testing.assert_series_equal(
        comparison.runs[0].returns, runs[0].load_object("sig_analysis/long_short_r.pkl")
    )


@pytest.mark.slow
def test_invalid_comparisons_raise(six_runs):
    with pytest.raises(ConfigError, match="two different runs"):
        compare_runs([six_runs[0], six_runs[0]])
    with pytest.raises(ConfigError, match=r"tries=2, but 6 runs"):
        compare_runs(six_runs, tries=2)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_pictures")
def test_page_shows_metrics_of_each_run(six_runs, tmp_path, elements):
    page = write_comparison(six_runs, tmp_path / "out", tries=40)
    text = page.read_text(encoding="utf-8")
    assert page.name == "comparison.html"
    assert {p.stem for p in page.parent.glob("*.png")} == {
        "by_run", "cumulative_rank_ic", "cumulative_returns"
    }  # fmt: skip
    assert re.search(r'Number of tries: <strong><span[^>]*data-value="40.0"', text)
    numbers = {
        (e["data-of"], e["data-metric"]): float(e["data-value"])
        for e in elements(text)
        if "data-of" in e
    }
    comparison = compare_runs(six_runs, tries=40)
    for run in six_runs:
        for metric, value in run.list_metrics().items():
            assert numbers[run.id, metric] == value
        result = comparison.sharpe[run.id]
        assert numbers[run.id, "deflated_sharpe"] == result.probability
    for group in comparison.groups:
        mean, std = group.mean_and_std("IC")
        assert (numbers[group.name, "IC"], numbers[group.name, "IC.std"]) == (mean, std)
    for test in comparison.tests:
        assert numbers["GRU − MLP", f"{test.series}.p_value"] == test.test.p_value


@pytest.mark.usefixtures("no_pictures")
def test_runs_without_results_still_make_a_page(store, tmp_path):
    recorders = []
    for seed in (0, 1):
        with R.start(experiment_name="bare"):
            recorders.append(R.get_recorder())
            recorders[-1].log_params(seed=seed)
    text = write_comparison(recorders, tmp_path).read_text(encoding="utf-8")
    assert "Add PortAnaRecord" in text
    assert "nothing to test them against" in text


def test_columns_have_the_frequency_of_the_runs_that_have_a_portfolio():
    excess_return = "week.excess_return_with_cost.annualized_return"
    runs = [
        SimpleNamespace(freq="1day", metrics={"IC": 0.1}),
        SimpleNamespace(freq="week", metrics={"IC": 0.1, excess_return: 0.2}),
    ]
    signal, portfolio = _metric_columns(SimpleNamespace(runs=runs))
    assert signal == {"IC": "IC"}
    assert portfolio == {excess_return: "Annual excess return"}
