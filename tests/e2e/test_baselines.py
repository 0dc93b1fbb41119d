"""Models that are no networks go the same way: one command, the same records, the same scores."""

from __future__ import annotations

import pandas as pd
import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [("model=lightgbm", "model.num_boost_round=20"),
     ("model=linear", "dataset=day")],
    ids=["lightgbm on windows", "linear on days"],
)  # fmt: skip
def test_a_baseline_is_trained_judged_and_scores_again(overrides, qtorch_cli, runs, folder):
    told = qtorch_cli("train", "data=synthetic_tiny", "log_level=WARNING", *overrides)
    assert told.code == 0, told.err
    assert "samples/s" in told.out
    (run,) = runs("qtorch")
    assert run.status == "FINISHED"
    metrics = run.list_metrics()
    assert metrics["test.IC"] == pytest.approx(metrics["IC"], abs=1e-12)
    assert metrics["Rank IC"] > 0.05  # of 0.2 that are planted
    assert qtorch_cli("predict", f"run={run.id}", "out=scores.parquet").code == 0
    scores = pd.read_parquet(folder / "scores.parquet")
    expected = run.load_object("pred.pkl")
    pd.testing.assert_frame_equal(scores.sort_index(), expected.sort_index())
