"""Test of the report of a trained run and the comparison of two seeds."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.usefixtures("quick_pictures")
def test_report_and_comparison_of_two_seeds(train, qtorch_cli, runs, folder, elements):
    for seed in (0, 1):
        assert train(f"seed={seed}", "trainer.max_epochs=2").code == 0
    first, second = runs()
    assert qtorch_cli("report", f"runs=[{first.id}]").code == 0
    page = Path(first.download_artifact("report/report.html")).read_text(encoding="utf-8")
    page_metrics = {
        e["data-metric"]: float(e["data-value"]) for e in elements(page) if "data-metric" in e
    }
    assert page_metrics == first.list_metrics()
    assert "LSTM: signal and portfolio" in page
    assert "SyntheticSource" in page
    assert "Add PortAnaRecord" in page
    assert {e["id"] for e in elements(page) if e["tag"] == "figure"} >= {
        "rolling_ic", "ic_decay", "quantile_returns", "learning_curves"
    }  # fmt: skip

    assert qtorch_cli("report", f"runs=[{first.id},{second.id}]").code == 0
    text = (folder / "comparison" / "comparison.html").read_text(encoding="utf-8")
    assert "Comparison of 2 runs in 1 group<" in text
    comparison_metrics = {
        (e["data-of"], e["data-metric"]): float(e["data-value"])
        for e in elements(text)
        if "data-of" in e
    }
    for run in (first, second):
        assert comparison_metrics[run.id, "Rank IC"] == run.list_metrics()["Rank IC"]
