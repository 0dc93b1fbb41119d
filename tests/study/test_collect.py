"""Collecting from the runs of a store."""

from __future__ import annotations

import pandas as pd
import pytest

from qtorch import R
from qtorch.core.errors import ConfigError, LoadObjectError, TrackingError
from qtorch.study import (
    AverageEnsemble,
    Collector,
    MergeCollector,
    RecorderCollector,
    RollingGroup,
)


def scores(start: str, value: float) -> pd.DataFrame:
    index = pd.MultiIndex.from_product(
        [pd.bdate_range(start, periods=2), ["A", "B"]], names=["datetime", "instrument"]
    )
    return pd.DataFrame({"score": [value, -value, 2 * value, value]}, index=index)


@pytest.fixture
def runs(store):
    """Two models of two windows each, a failed run, and one without scores."""
    for model in ("gru", "lstm"):
        for k, start in enumerate(("2020-01-06", "2020-01-08")):
            with R.start(experiment_name="windows", recorder_name=model):
                R.set_tags(window=k, model=model)
                R.save_objects(**{"pred.pkl": scores(start, k + 1.0), "note": {"window": k}})
    with R.start(experiment_name="windows", recorder_name="empty"):
        R.set_tags(window=9, model="empty")
    failing = R.start(experiment_name="windows", recorder_name="failed")
    with pytest.raises(ValueError, match="by intent"), failing:
        R.save_objects(**{"pred.pkl": scores("2020-01-06", 9.0)})
        raise ValueError("by intent")
    return R.get_exp(experiment_name="windows")


def by_window(recorder):
    tags = recorder.list_tags()
    return tags["model"], int(tags["window"])


@pytest.mark.slow
def test_finished_runs_are_collected_grouped_and_averaged(runs, caplog):
    collector = RecorderCollector("windows", [RollingGroup()], rec_key_func=by_window)
    collected = collector()
    assert list(collected) == ["pred"]
    assert list(collected["pred"]) == [("gru",), ("lstm",)]
    assert collected["pred"][("gru",)]["score"].tolist() == [1, -1, 2, 1, 2, -2, 4, 2]
    assert "is left out" in caplog.text
    both = RecorderCollector(runs, [RollingGroup(), AverageEnsemble()], rec_key_func=by_window)
    assert len(both()["pred"]) == 8
    assert collector.get_exp_name() == "windows"


@pytest.mark.slow
def test_filters_keys_statuses_and_raw(runs):
    every = RecorderCollector("windows", status=None, artifacts_key=RecorderCollector.ART_KEY_RAW)
    assert len(every.collect()["__raw"]) == 6
    failed = RecorderCollector("windows", status="FAILED")
    assert len(failed.collect()["pred"]) == 1
    paths = {"pred": "pred.pkl", "note": "note"}
    some = RecorderCollector(
        "windows",
        rec_key_func=by_window,
        rec_filter_func=lambda r: r.name == "gru",
        artifacts_path=paths,
    )
    assert some.collect()["note"] == {("gru", 0): {"window": 0}, ("gru", 1): {"window": 1}}
    assert list(some.collect("note")) == ["note"]
    assert list(some.collect(rec_filter_func=lambda r: r.name == "lstm")["note"]) == [
        ("lstm", 0),
        ("lstm", 1),
    ]
    listed = RecorderCollector(lambda: runs.list_recorders("list"), rec_key_func=by_window)
    assert len(listed.collect()["pred"]) == 4


@pytest.mark.slow
def test_a_missing_artifact_is_left_out_or_raised(runs, caplog):
    collector = RecorderCollector("windows", rec_key_func=by_window)
    assert ("empty", 9) not in collector.collect()["pred"]
    assert "is left out" in caplog.text
    with pytest.raises(LoadObjectError):
        collector.collect(only_exist=False)


def test_of_two_runs_with_one_key_the_newer_counts(runs, caplog):
    collector = RecorderCollector(
        "windows", rec_key_func=lambda r: "one", rec_filter_func=lambda r: r.name == "gru"
    )
    assert collector.collect()["pred"]["one"]["score"].iloc[0] == 2
    assert "two runs have the key" in caplog.text


def test_collectors_are_merged_by_key(runs):
    def of(model):
        return RecorderCollector(
            "windows",
            [RollingGroup()],
            rec_key_func=by_window,
            rec_filter_func=lambda r: r.name == model,
        )

    merged = MergeCollector({"a": of("gru"), "b": of("lstm")})()
    assert list(merged) == [("a", "pred"), ("b", "pred")]
    named = MergeCollector({"a": of("gru")}, [len], merge_func=lambda a, b: f"{a}.{b}")
    assert named() == {"a.pred": 1}


def test_processes_get_what_the_call_is_given():
    class Two(Collector):
        def collect(self):
            return {"a": 1, "b": 2}

    assert Two([lambda x, by: x * by, lambda x, by: x + by])(by=3) == {"a": 6, "b": 9}
    assert Collector.process_collect({"a": 1}, lambda x: x + 1) == {"a": 2}
    with pytest.raises(ConfigError, match="callable"):
        Two([5])


def test_misuse_is_named(runs):
    with pytest.raises(ConfigError, match="Did you mean 'pred'"):
        RecorderCollector("windows", artifacts_key="prd")
    with pytest.raises(ConfigError, match="its name, an Experiment, or a callable"):
        RecorderCollector(5)
    with pytest.raises(TrackingError, match="windows"):
        RecorderCollector("window")
    with pytest.raises(ConfigError, match="from a callable"):
        RecorderCollector(list).get_exp_name()
