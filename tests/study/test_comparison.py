"""Several runs: who belongs together, means over seeds, tests, luck, and the page of it all."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from qtorch import R
from qtorch.core.errors import ConfigError
from qtorch.metrics import deflated_sharpe
from qtorch.study import compare_runs, write_comparison
from qtorch.study.comparison import differing

DAYS = pd.bdate_range("2020-01-01", periods=120, name="datetime")


@pytest.fixture
def make_run(store, account_walk):
    """`make_run(model, seed, good, **params)`: a finished run as a training leaves it."""

    def make(model: str, seed: int, good: float, portfolio: bool = True, **params):
        rng = np.random.default_rng([seed, int(good * 1000)])
        with R.start(experiment_name="compared"):
            recorder = R.get_recorder()
            recorder.log_params(**{"model.network._target_": f"qtorch.nn.{model}", **params})
            recorder.log_params(seed=seed)
            ic = pd.Series(rng.normal(good, 0.05, len(DAYS)), DAYS)
            recorder.save_objects(
                artifact_path="sig_analysis",
                **{"ic.pkl": ic, "ric.pkl": ic * 0.9, "long_short_r.pkl": ic * 0.1},
            )
            recorder.log_batch({"IC": ic.mean(), "Rank IC": 0.9 * ic.mean()}, step=0)
            if portfolio:
                report, _ = account_walk(num_days=120, seed=seed + 10 * len(params))
                report["return"] += good / 50
                recorder.save_objects(
                    artifact_path="portfolio_analysis", **{"report_normal_1day.pkl": report}
                )
                name = "1day.excess_return_with_cost.annualized_return"
                excess = report["return"] - report["cost"] - report["bench"]
                recorder.log_batch({name: excess.mean() * 238}, step=0)
        return recorder

    return make


@pytest.fixture
def six(make_run):
    """Two models, three seeds each, one better than the other."""
    made = [make_run("GRU", s, 0.05, hidden_size=8) for s in range(3)]
    return made + [make_run("MLP", s, 0.02, layers=[4], depth=1) for s in range(3)]


@pytest.mark.slow
def test_seeds_of_one_setting_are_a_group(six):
    found = compare_runs(six)
    assert [g.name for g in found.groups] == ["GRU", "MLP"]
    assert [[r.seed for r in g.runs] for g in found.groups] == [["0", "1", "2"]] * 2
    values = [r.list_metrics()["IC"] for r in six[:3]]
    mean, std = found.groups[0].mean_and_std("IC")
    assert (mean, std) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert math.isnan(found.groups[0].mean_and_std("none")[0])
    assert set(differing(found.groups)) == {
        "model.network._target_", "hidden_size", "layers", "depth"
    }  # fmt: skip


def test_names_say_what_differs(make_run):
    runs = [make_run("GRU", 0, 0.02, **{"model.hidden_size": h, "lr": 0.1}) for h in (8, 16)]
    assert [g.name for g in compare_runs(runs).groups] == ["hidden_size=8", "hidden_size=16"]
    runs = [make_run("GRU", 0, 0.02, **p) for p in ({"a": 1}, {"b": 1})]
    assert [g.name for g in compare_runs(runs).groups] == ["GRU (1)", "GRU (2)"]


@pytest.mark.slow
def test_groups_are_tested_by_the_mean_of_their_days(six):
    found = {t.series: t for t in compare_runs(six).tests}
    assert set(found) == {"ic", "rank_ic", "returns"}
    means = [
        np.mean([r.load_object("sig_analysis/ic.pkl") for r in part], axis=0)
        for part in (six[:3], six[3:])
    ]
    gap = means[0] - means[1]
    test = found["ic"].test
    assert (found["ic"].first, found["ic"].second, test.count) == ("GRU", "MLP", 120)
    assert test.mean == pytest.approx(gap.mean())
    assert test.statistic == pytest.approx(stats.ttest_1samp(gap, 0).statistic, rel=0.5)
    assert found["ic"].adjusted == test.p_value < 0.01


@pytest.mark.slow
def test_each_run_is_judged_as_the_best_of_the_tries(six):
    found = compare_runs(six)
    report = six[0].load_object("portfolio_analysis/report_normal_1day.pkl")
    returns = report["return"] - report["cost"] - report["bench"]
    known = [s.sharpe for s in found.sharpe.values()]
    assert found.tries == 6
    assert found.sharpe[six[0].id] == deflated_sharpe(returns, 6, known)
    more = compare_runs(six, tries=500)
    assert more.sharpe[six[0].id].probability < found.sharpe[six[0].id].probability


def test_without_portfolios_the_long_short_return_counts(make_run):
    runs = [make_run("GRU", 0, 0.05), make_run("GRU", 1, 0.05, portfolio=False)]
    found = compare_runs(runs)
    assert "before cost" in found.returns_of
    pd.testing.assert_series_equal(
        found.runs[0].returns, runs[0].load_object("sig_analysis/long_short_r.pkl")
    )


@pytest.mark.slow
def test_what_cannot_be_compared_is_refused(six):
    with pytest.raises(ConfigError, match="two different runs"):
        compare_runs([six[0], six[0]])
    with pytest.raises(ConfigError, match=r"tries=2, but 6 runs"):
        compare_runs(six, tries=2)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_pictures")
def test_the_page_shows_each_runs_own_metrics(six, tmp_path, elements):
    page = write_comparison(six, tmp_path / "out", tries=40)
    text = page.read_text(encoding="utf-8")
    assert page.name == "comparison.html"
    assert {p.stem for p in page.parent.glob("*.png")} == {
        "by_run", "cumulative_rank_ic", "cumulative_returns"
    }  # fmt: skip
    assert re.search(r'Number of tries: <strong><span[^>]*data-value="40.0"', text)
    found = {
        (e["data-of"], e["data-metric"]): float(e["data-value"])
        for e in elements(text)
        if "data-of" in e
    }
    compared = compare_runs(six, tries=40)
    for run in six:
        for metric, value in run.list_metrics().items():
            assert found[run.id, metric] == value
        sure = compared.sharpe[run.id]
        assert found[run.id, "deflated_sharpe"] == sure.probability
    for group in compared.groups:
        mean, std = group.mean_and_std("IC")
        assert (found[group.name, "IC"], found[group.name, "IC.std"]) == (mean, std)
    for test in compared.tests:
        assert found["GRU − MLP", f"{test.series}.p_value"] == test.test.p_value


@pytest.mark.usefixtures("no_pictures")
def test_runs_that_hold_little_still_make_a_page(store, tmp_path):
    recorders = []
    for seed in (0, 1):
        with R.start(experiment_name="bare"):
            recorders.append(R.get_recorder())
            recorders[-1].log_params(seed=seed)
    text = write_comparison(recorders, tmp_path).read_text(encoding="utf-8")
    assert "Add PortAnaRecord" in text
    assert "nothing to test them against" in text
