"""What makes jobs the same, groups of seeds, the best."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qtorch.core.errors import ConfigError
from qtorch.study.sweep import SweepJob
from qtorch.study.sweep_groups import (
    best_group,
    best_job,
    best_metric,
    common_overrides,
    mode_of,
    seed_groups,
)
from qtorch.study.sweep_job import FIT_KEY_TAG, SETTING_TAG, TASK_TAG, identified

TASK = {
    "model": {"_target_": "qtorch.model.LightningModel", "network": {"_target_": "qtorch.nn.GRU"}},
    "dataset": {"_target_": "qtorch.data.TSDatasetH", "handler": {"source": {"path": "a"}}},
    "record": [{"class": "SignalRecord"}],
    "seed": 0,
}


def job(number, setting, seed, ic, status="FINISHED"):
    overrides = ["debug=tiny", f"model={setting}", f"seed={seed}"]
    metrics = {} if ic is None else {"test.Rank IC": ic, "valid/loss": 1 - ic}
    return SweepJob(number, overrides, status, f"run{number}", metrics, 1.0, setting)


JOBS = [
    job(0, "lstm", 0, 0.01),
    job(1, "lstm", 1, 0.05),
    job(2, "gru", 0, 0.03),
    job(3, "gru", 1, 0.04),
    job(4, "gru", 2, None, "FAILED"),
]


def test_jobs_are_grouped_by_all_but_the_seed():
    groups = seed_groups(JOBS)
    assert [(g.name, len(g.jobs)) for g in groups] == [("model=lstm", 2), ("model=gru", 2)]
    mean, deviation, count = groups[0].spread("test.Rank IC")
    assert (mean, deviation, count) == (pytest.approx(0.03), pytest.approx(0.04 / math.sqrt(2)), 2)
    mean, deviation, count = seed_groups(JOBS[:1])[0].spread("test.Rank IC")
    assert (mean, count) == (0.01, 1)
    assert math.isnan(deviation)
    assert groups[0].spread("nothing")[2] == 0


def test_what_all_have_in_common_is_not_said_in_every_row():
    assert common_overrides(JOBS) == {"debug=tiny"}
    assert common_overrides(JOBS[:1], "debug=tiny model=lstm seed=0,1") == {
        "debug=tiny",
        "model=lstm",
    }
    assert common_overrides([]) == set()


def test_the_best_job_and_the_best_setting_may_differ():
    metric = best_metric(JOBS)
    assert metric == "test.Rank IC"
    chosen = [replace(j, metrics={**j.metrics, "valid.Rank IC": 0.0}) for j in JOBS]
    assert best_metric(chosen) == "valid.Rank IC"  # a test that chooses is none
    best = best_job(JOBS, metric, mode_of(metric))
    assert best is not None
    assert best.number == 1
    group = best_group(seed_groups(JOBS), metric)
    assert group is not None
    assert group.name == "model=gru"
    loss = best_job(JOBS, "valid/loss", mode_of("valid/loss"))
    assert loss is not None
    assert loss.number == 1
    assert best_job(JOBS[-1:], metric) is None


def test_wrong_metrics_and_modes_are_named():
    with pytest.raises(ConfigError, match=r"Did you mean 'test.Rank IC'"):
        best_metric(JOBS, "test.Rank_IC")
    with pytest.raises(ConfigError, match="mode"):
        mode_of("IC", "maximal")
    assert mode_of("valid/loss", "max") == "max"
    assert mode_of("1day.excess_return_with_cost.max_drawdown") == "max"  # a negative number


def tags(**changes):
    return identified({**TASK, **changes})[1]


def test_a_seed_changes_the_task_and_not_the_setting():
    first, other = tags(), tags(seed=1)
    assert first[TASK_TAG] != other[TASK_TAG]
    assert first[SETTING_TAG] == other[SETTING_TAG]
    assert first[FIT_KEY_TAG] != other[FIT_KEY_TAG]


def test_a_record_changes_the_task_and_not_the_training():
    first, other = tags(), tags(record=[])
    assert first[TASK_TAG] != other[TASK_TAG]
    assert first[FIT_KEY_TAG] == other[FIT_KEY_TAG]


def test_a_task_without_a_seed_gets_one_of_its_own():
    complete, told = identified({**TASK, "seed": None})
    assert complete["seed"] == identified({**TASK, "seed": None})[0]["seed"]
    assert complete["seed"] != identified({**TASK, "seed": None, "record": []})[0]["seed"]
    assert told == identified(complete)[1]


def test_a_relative_path_means_the_same_job_in_its_folder_alone(tmp_path, monkeypatch):
    source = {"_target_": "qtorch.data.QlibSource", "provider_uri": "bars"}
    handler = {"_target_": "qtorch.data.Alpha158", "source": source}
    task = {**TASK, "dataset": {"_target_": "qtorch.data.DatasetH", "handler": handler}}
    monkeypatch.chdir(tmp_path)
    here = identified(task)[1]
    assert here == identified(task)[1]
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert identified(task)[1][TASK_TAG] != here[TASK_TAG]
    assert identified(task)[1][FIT_KEY_TAG] == here[FIT_KEY_TAG]
