"""Tests of collectors on the runs of a store."""

from __future__ import annotations

import pandas as pd
import pytest

from qtorch import R
from qtorch.core.errors import ConfigError, LoadObjectError, TrackingError
from qtorch.study import AverageEnsemble, Collector, MergeCollector, RecorderCollector, RollingGroup


def scores(start: str, value: float) -> pd.DataFrame:
    index = pd.MultiIndex.from_product(
        [pd.bdate_range(start, periods=2), ["A", "B"]], names=["datetime", "instrument"]
    )
    return pd.DataFrame({"score": [value, -value, 2 * value, value]}, index=index)


@pytest.fixture
def runs(store):
    """Runs of two models with two windows each, a failed run, and a run without scores."""
    for model in ("gru", "lstm"):
        for k, start in enumerate(("2020-01-06", "2020-01-08")):
            with R.start(experiment_name="windows", recorder_name=model):
                R.set_tags(window=k, model=model)
                R.save_objects(**{"pred.pkl": scores(start, k + 1.0), "note": {"window": k}})
    with R.start(experiment_name="windows", recorder_name="empty"):
        R.set_tags(window=9, model="empty")
    failing = R.start(experiment_name="windows", recorder_name="failed")
    with pytest.raises(ValueError, match="intended failure"), failing:
        R.save_objects(**{"pred.pkl": scores("2020-01-06", 9.0)})
        raise ValueError("intended failure")
    return R.get_exp(experiment_name="windows")


def window_key(recorder):
    tags = recorder.list_tags()
    return tags["model"], int(tags["window"])


@pytest.mark.slow
def test_finished_runs_are_grouped_and_averaged(runs, caplog):
    collector = RecorderCollector("windows", [RollingGroup()], rec_key_func=window_key)
    results = collector()
    assert list(results) == ["pred"]
    assert list(results["pred"]) == [("gru",), ("lstm",)]
    assert results["pred"][("gru",)]["score"].tolist() == [1, -1, 2, 1, 2, -2, 4, 2]
    assert "is skipped" in caplog.text
    averaging_collector = RecorderCollector(
        runs, [RollingGroup(), AverageEnsemble()], rec_key_func=window_key
    )
    assert len(averaging_collector()["pred"]) == 8
    assert collector.get_exp_name() == "windows"


@pytest.mark.slow
def test_collector_filters_by_key_status_and_function(runs):
    raw_collector = RecorderCollector(
        "windows", status=None, artifacts_key=RecorderCollector.ART_KEY_RAW
    )
    assert len(raw_collector.collect()["__raw"]) == 6
    failed_collector = RecorderCollector("windows", status="FAILED")
    assert len(failed_collector.collect()["pred"]) == 1
    paths = {"pred": "pred.pkl", "note": "note"}
    gru_collector = RecorderCollector(
        "windows",
        rec_key_func=window_key,
        rec_filter_func=lambda r: r.name == "gru",
        artifacts_path=paths,
    )
    assert gru_collector.collect()["note"] == {("gru", 0): {"window": 0}, ("gru", 1): {"window": 1}}
    assert list(gru_collector.collect("note")) == ["note"]
    assert list(gru_collector.collect(rec_filter_func=lambda r: r.name == "lstm")["note"]) == [
        ("lstm", 0),
        ("lstm", 1),
    ]
    from_callable = RecorderCollector(lambda: runs.list_recorders("list"), rec_key_func=window_key)
    assert len(from_callable.collect()["pred"]) == 4


@pytest.mark.slow
def test_missing_artifact_is_skipped_or_raises(runs, caplog):
    collector = RecorderCollector("windows", rec_key_func=window_key)
    assert ("empty", 9) not in collector.collect()["pred"]
    assert "is skipped" in caplog.text
    with pytest.raises(LoadObjectError):
        collector.collect(only_exist=False)


def test_newer_of_two_runs_with_same_key_is_used(runs, caplog):
    collector = RecorderCollector(
        "windows", rec_key_func=lambda r: "same", rec_filter_func=lambda r: r.name == "gru"
    )
    assert collector.collect()["pred"]["same"]["score"].iloc[0] == 2
    assert "two runs have the key" in caplog.text


def test_collectors_are_merged_by_key(runs):
    def model_collector(model):
        return RecorderCollector(
            "windows",
            [RollingGroup()],
            rec_key_func=window_key,
            rec_filter_func=lambda r: r.name == model,
        )

    results = MergeCollector({"a": model_collector("gru"), "b": model_collector("lstm")})()
    assert list(results) == [("a", "pred"), ("b", "pred")]
    results_by_name = MergeCollector(
        {"a": model_collector("gru")}, [len], merge_func=lambda a, b: f"{a}.{b}"
    )
    assert results_by_name() == {"a.pred": 1}


def test_a_key_may_have_the_segments_of_a_stored_task(runs):
    collector = RecorderCollector(
        "windows",
        rec_key_func=lambda r: ["gru", ["2020-01-06", r.list_tags()["window"]]],
        rec_filter_func=lambda r: r.list_tags()["model"] == "gru",
    )
    assert set(collector()["pred"]) == {
        ("gru", ("2020-01-06", "0")),
        ("gru", ("2020-01-06", "1")),
    }


def test_call_arguments_are_passed_to_processes():
    class Two(Collector):
        def collect(self):
            return {"a": 1, "b": 2}

    assert Two([lambda x, by: x * by, lambda x, by: x + by])(by=3) == {"a": 6, "b": 9}
    assert Collector.process_collect({"a": 1}, lambda x: x + 1) == {"a": 2}
    with pytest.raises(ConfigError, match="must be callable"):
        Two([5])


def test_invalid_arguments_raise_clear_errors(runs):
    with pytest.raises(ConfigError, match="Did you mean 'pred'"):
        RecorderCollector("windows", artifacts_key="prd")
    with pytest.raises(ConfigError, match="its name, an Experiment, or a callable"):
        RecorderCollector(5)
    with pytest.raises(TrackingError, match="windows"):
        RecorderCollector("window")
    with pytest.raises(ConfigError, match="from a callable"):
        RecorderCollector(list).get_exp_name()
