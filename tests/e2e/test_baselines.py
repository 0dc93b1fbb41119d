"""Tests that models without a network use the same commands and records."""

from __future__ import annotations

import pandas as pd
import pytest
from model_libraries import require_model_library


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [("model=lightgbm", "model.num_boost_round=20"),
     ("model=linear", "dataset=day"),
     ("model=xgboost", "model.num_boost_round=20", "dataset=day"),
     ("model=catboost", "model.num_boost_round=20", "dataset=day"),
     ("model=double_ensemble", "model.epochs=10", "dataset=day")],
    ids=["lightgbm on windows", "linear", "xgboost", "catboost", "double ensemble"],
)  # fmt: skip
def test_baseline_is_trained_evaluated_and_predicts(overrides, qtorch_cli, runs, folder):
    require_model_library(overrides[0].removeprefix("model="))
    result = qtorch_cli("train", "data=synthetic_tiny", "log_level=WARNING", *overrides)
    assert result.code == 0, result.err
    assert "samples/s" in result.out
    (run,) = runs("qtorch")
    assert run.status == "FINISHED"
    metrics = run.list_metrics()
    assert metrics["test.IC"] == pytest.approx(metrics["IC"], abs=1e-12)
    assert metrics["Rank IC"] > 0.05  # the planted signal is 0.2
    assert qtorch_cli("predict", f"run={run.id}", "out=scores.parquet").code == 0
    scores = pd.read_parquet(folder / "scores.parquet")
    prediction = run.load_object("pred.pkl")
    pd.testing.assert_frame_equal(scores.sort_index(), prediction.sort_index())
