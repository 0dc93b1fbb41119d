"""The report record: its numbers are metrics of the run, and its page is self-contained."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qtorch.core.errors import ConfigError, RecordError
from qtorch.metrics import calc_ic, risk_analysis
from qtorch.record import ReportRecord, SigAnaRecord, SignalRecord
from qtorch.record.report.results import run_description

pytestmark = pytest.mark.usefixtures("quick_pictures")
PICTURES = {
    "cumulative_return", "excess_return", "drawdown", "turnover", "concentration", "rolling_ic",
    "monthly_ic",
    "ic_decay", "quantile_returns", "quantile_spread", "score_autocorrelation", "learning_curves",
}  # fmt: skip


@pytest.fixture
def full_run(model, dataset, recorder, account_walk):
    """A run with everything that the report shows."""
    recorder.log_params(**{"model.network._target_": "mine.<Net>", "seed": 3})
    for epoch in range(4):
        values = {"train/loss": 1 / (epoch + 1), "valid/loss": 1.1, "valid/ic": 0.01 * epoch}
        recorder.log_batch(values, step=epoch)
    recorder.log_batch({"lr": 0.001}, step=0)
    SignalRecord(model, dataset, recorder).generate()
    SigAnaRecord(recorder, ana_long_short=True).generate()
    report, positions = account_walk(num_days=40)
    names = {"report_normal_1day.pkl": report, "positions_normal_1day.pkl": positions}
    recorder.save_objects(artifact_path="portfolio_analysis", **names)
    excess = risk_analysis(report["return"] - report["cost"] - report["bench"])["risk"]
    recorder.log_batch({f"1day.excess_return_with_cost.{k}": v for k, v in excess.items()}, step=0)
    return recorder


def read_page(recorder) -> str:
    return Path(recorder.download_artifact("report/report.html")).read_text(encoding="utf-8")


def metric_values(elements) -> dict[str, set[float]]:
    """Return every value of each metric in the elements."""
    values: dict[str, set[float]] = {}
    for element in elements:
        if "data-metric" in element:
            values.setdefault(element["data-metric"], set()).add(float(element["data-value"]))
    return values


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_all_numbers_on_the_page_are_metrics_of_the_run(full_run, elements):
    ReportRecord(full_run).generate()
    metrics = full_run.list_metrics()
    assert metric_values(elements(read_page(full_run))) == {k: {v} for k, v in metrics.items()}
    assert {k.split(".")[1] for k in metrics if k.startswith("report.")} >= {
        "annualized_return", "max_drawdown", "turnover", "cash_share", "ic_at_horizon",
        "quantile_spread", "score_autocorrelation", "probabilistic_sharpe",
    }  # fmt: skip


@pytest.mark.usefixtures("no_pictures")
def test_page_of_a_training_of_one_epoch_says_so(recorder, tmp_path):
    recorder.log_batch({"train/loss": 1.0, "valid/loss": 1.1}, step=0)
    page = ReportRecord(recorder).write(tmp_path).read_text(encoding="utf-8")
    assert "The training has one epoch, so there is no curve" in page


def test_run_description_names_the_benchmark(recorder, account_walk):
    report, _ = account_walk(num_days=5)
    recorder.save_objects(artifact_path="portfolio_analysis", **{"report_normal_1day.pkl": report})
    assert "Benchmark" not in run_description(recorder)  # a run that no task describes
    backtest = {"backtest": {"benchmark": "SPY"}}
    record = {"_target_": "qtorch.record.PortAnaRecord", "config": backtest}
    recorder.save_objects(task={"record": [record]})
    assert run_description(recorder)["Benchmark"] == "SPY"


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_numbers_match_the_artifacts(full_run, account_walk):
    numbers = ReportRecord(full_run, horizons=(1, 2), lags=(1,), num_quantiles=4).generate()
    report, positions = account_walk(num_days=40)
    net = report["return"] - report["cost"]
    start = report["account"].iloc[0] / (1 + net.iloc[0])
    score, label = (full_run.load_object(f"{n}.pkl").iloc[:, 0] for n in ("pred", "label"))
    best_returns = [
        label.loc[d][s.droplevel(0).rank() > 19].mean() for d, s in score.groupby(level="datetime")
    ]
    weights = positions["weight"].unstack(fill_value=0.0).to_numpy()
    expected_numbers = {
        "total_return": report["account"].iloc[-1] / start - 1,
        "annualized_return": net.mean() * 252,
        "annualized_return_without_cost": report["return"].mean() * 252,
        "sharpe_ratio": net.mean() / net.std(ddof=1) * np.sqrt(252),
        "max_drawdown": (net.cumsum() - net.cumsum().cummax()).min(),
        "benchmark_annualized_return": report["bench"].mean() * 252,
        "cash_share": 1 - weights.sum(axis=1).mean(),
        "num_positions": (weights > 0).sum(axis=1).mean(),
        "largest_weight": weights.max(axis=1).mean(),
        "ic_at_horizon.1": full_run.list_metrics()["IC"],
        "quantile_return.4": np.mean(best_returns),
    }
    assert {k: numbers[f"report.{k}"] for k in expected_numbers} == pytest.approx(
        expected_numbers, rel=1e-6
    )
    assert "report.ic_at_horizon.3" not in numbers
    table = score.unstack()
    previous_scores = table.shift(1).stack().rename_axis(score.index.names)
    assert numbers["report.score_autocorrelation.1"] == pytest.approx(
        calc_ic(score, previous_scores)[1].mean()
    )


@pytest.mark.slow
def test_page_is_self_contained(full_run, elements):
    ReportRecord(full_run).generate()
    page = read_page(full_run)
    assert not re.search(r"""(src|href|srcset)=["'](?!data:)|@import|url\(|<script""", page)
    figures = [e["id"] for e in elements(page) if e["tag"] == "figure"]
    assert set(figures) == PICTURES
    assert len(figures) == len(PICTURES)
    images = [e for e in elements(page) if e["tag"] in ("img", "source")]
    assert len(images) == 2 * len(PICTURES)
    assert all(e["alt"] for e in images if e["tag"] == "img")
    artifacts = set(full_run.list_artifacts("report"))
    assert artifacts == {f"report/{n}.png" for n in PICTURES} | {"report/report.html"}
    assert "&lt;Net&gt;" in page
    assert "<Net>" not in page
    assert str(full_run.id) in page


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_second_report_logs_changed_numbers_only(full_run, elements):
    ReportRecord(full_run).generate()
    first_values = full_run.metric_history("report.turnover")
    ReportRecord(full_run).generate()
    assert full_run.metric_history("report.turnover") == first_values
    report = full_run.load_object("portfolio_analysis/report_normal_1day.pkl")
    report["turnover"] *= 2
    full_run.save_objects(artifact_path="portfolio_analysis", **{"report_normal_1day.pkl": report})
    ReportRecord(full_run).generate()
    (page_value,) = metric_values(elements(read_page(full_run)))["report.turnover"]
    assert page_value == full_run.list_metrics()["report.turnover"] == 2 * first_values[0]


@pytest.mark.slow
def test_missing_artifacts_name_the_record_to_add(recorder, model, dataset):
    ReportRecord(recorder).generate()
    page = read_page(recorder)
    for record in ("PortAnaRecord", "SigAnaRecord", "SignalRecord"):
        assert f"Add {record} to the task" in page
    assert "with <code>-m</code> and <code>record=full</code>" in page
    assert "no metrics of a training by epoch" in page
    assert "<figure" not in page
    SignalRecord(model, dataset, recorder).generate()
    ReportRecord(recorder).generate()
    page = read_page(recorder)
    assert "Add SignalRecord" not in page
    assert 'id="ic_decay"' in page


@pytest.mark.slow
def test_no_benchmark_and_no_positions(full_run, account_walk, elements):
    report, _ = account_walk(num_days=40, bench=False)
    folder = Path(full_run.download_artifact("portfolio_analysis"))
    for file in folder.glob("positions*"):
        file.unlink()
    full_run.save_objects(artifact_path="portfolio_analysis", **{"report_normal_1day.pkl": report})
    numbers = ReportRecord(full_run, mode="product").generate()
    page = read_page(full_run)
    assert "has no benchmark" in page
    assert "no positions_normal" in page
    assert "report.benchmark_annualized_return" not in numbers
    net = report["return"] - report["cost"]
    account_value = (1 + net).cumprod()
    max_drawdown = (account_value / account_value.cummax() - 1).min()
    assert numbers["report.max_drawdown"] == pytest.approx(max_drawdown)


@pytest.mark.usefixtures("no_pictures")
def test_returns_at_the_top_of_the_page_are_all_of_one_mode(recorder, account_walk, tmp_path):
    report, _ = account_walk(num_days=40)
    recorder.save_objects(artifact_path="portfolio_analysis", **{"report_normal_1day.pkl": report})
    recorder.log_batch({"1day.excess_return_with_cost.annualized_return": 0.123}, step=0)
    page = ReportRecord(recorder, mode="product").write(tmp_path).read_text(encoding="utf-8")
    cards = page.partition('<dl class="cards">')[2].partition("</dl>")[0]
    values = {
        m: float(v) for m, v in re.findall(r'data-metric="([^"]+)" data-value="([^"]+)"', cards)
    }
    excess = report["return"] - report["cost"] - report["bench"]
    expected = risk_analysis(excess, 252, mode="product")["risk"]["annualized_return"]
    assert values["report.excess_annualized_return"] == pytest.approx(expected)
    assert not [name for name in values if name.startswith("1day.")]
    assert cards.count(", compounded") == 3
    assert not [name for name in recorder.list_metrics() if name.startswith("report.")]


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_several_tries_log_the_deflated_sharpe_ratio(full_run):
    probabilistic_sharpe = ReportRecord(full_run).generate()["report.probabilistic_sharpe"]
    numbers = ReportRecord(full_run, tries=50).generate()
    assert numbers["report.deflated_sharpe"] < probabilistic_sharpe
    assert "report.probabilistic_sharpe" not in numbers


def test_one_day_of_two_instruments(recorder):
    """Most numbers are undefined, which is not an error."""
    index = pd.MultiIndex.from_product(
        [pd.to_datetime(["2020-01-01"]), ["A", "B"]], names=["datetime", "instrument"]
    )
    for name in ("pred", "label"):
        frame = pd.DataFrame({"score": [1.0, 2.0]}, index)
        recorder.save_objects(**{f"{name}.pkl": frame})
    numbers = ReportRecord(recorder).generate()
    expected_numbers = {"report.ic_at_horizon.1": 1.0, "report.rank_ic_at_horizon.1": 1.0}
    assert numbers == pytest.approx(expected_numbers)
    assert "No day has 5 instruments" in read_page(recorder)


@pytest.mark.parametrize("num_days", [1, 2])
def test_portfolio_of_one_or_two_days(recorder, account_walk, num_days):
    report, positions = account_walk(num_days=num_days)
    names = {"report_normal_1day.pkl": report, "positions_normal_1day.pkl": positions.iloc[:0]}
    recorder.save_objects(artifact_path="portfolio_analysis", **names)
    numbers = ReportRecord(recorder).generate()
    assert numbers["report.num_positions"] == numbers["report.largest_weight"] == 0
    assert "report.effective_positions" not in numbers
    assert ("report.sharpe_ratio" in numbers) == (num_days == 2)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_invalid_arguments_raise(full_run):
    with pytest.raises(ConfigError, match=r"mode.*'product'"):
        ReportRecord(full_run, mode="products")
    with pytest.raises(ConfigError, match="tries=0"):
        ReportRecord(full_run, tries=0)
    with pytest.raises(RecordError, match="label_col=1"):
        ReportRecord(full_run, label_col=1).generate()
