"""Tests of task identity, seed groups, and the best job and group of a sweep."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qtorch.core.errors import ConfigError
from qtorch.study.sweep import (
    JobResult,
    best_group,
    best_job,
    choose_metric,
    common_overrides,
    resolve_mode,
    seed_groups,
)
from qtorch.study.sweep_job import FIT_KEY_TAG, SETTING_TAG, TASK_TAG, identify_task

TASK = {
    "model": {"_target_": "qtorch.model.LightningModel", "network": {"_target_": "qtorch.nn.GRU"}},
    "dataset": {"_target_": "qtorch.data.TSDatasetH", "handler": {"source": {"path": "a"}}},
    "record": [{"class": "SignalRecord"}],
    "seed": 0,
}


def make_job(number, setting, seed, ic, status="FINISHED"):
    overrides = ["debug=tiny", f"model={setting}", f"seed={seed}"]
    metrics = {} if ic is None else {"test.Rank IC": ic, "valid/loss": 1 - ic}
    return JobResult(
        number, overrides, status, 1.0, f"run{number}", metrics=metrics, setting=setting
    )


JOBS = [
    make_job(0, "lstm", 0, 0.01),
    make_job(1, "lstm", 1, 0.05),
    make_job(2, "gru", 0, 0.03),
    make_job(3, "gru", 1, 0.04),
    make_job(4, "gru", 2, None, "FAILED"),
]


def test_jobs_are_grouped_by_setting():
    groups = seed_groups(JOBS)
    assert [(g.name, len(g.jobs)) for g in groups] == [("model=lstm", 2), ("model=gru", 2)]
    mean, std, count = groups[0].metric_statistics("test.Rank IC")
    assert (mean, std, count) == (pytest.approx(0.03), pytest.approx(0.04 / math.sqrt(2)), 2)
    mean, std, count = seed_groups(JOBS[:1])[0].metric_statistics("test.Rank IC")
    assert (mean, count) == (0.01, 1)
    assert math.isnan(std)
    assert groups[0].metric_statistics("unknown")[2] == 0


def test_common_overrides_of_jobs():
    assert common_overrides(JOBS) == {"debug=tiny"}
    assert common_overrides(JOBS[:1], "debug=tiny model=lstm seed=0,1") == {
        "debug=tiny",
        "model=lstm",
    }
    assert common_overrides([]) == set()
    # The jobs of the second model have not started.
    command = "debug=tiny model=lstm,gru seed=0,1"
    assert common_overrides(JOBS[:2], command) == {"debug=tiny"}
    assert [g.name for g in seed_groups(JOBS[:2], command)] == ["model=lstm"]
    label = 'handler.label="Ref($close, -2)"'
    jobs = [replace(job, overrides=[label, *job.overrides]) for job in JOBS[:2]]
    assert common_overrides(jobs, f"{label} {command}") == {label, "debug=tiny"}


def test_best_job_and_best_setting_can_differ():
    metric = choose_metric(JOBS)
    assert metric == "test.Rank IC"
    jobs_with_valid = [replace(j, metrics={**j.metrics, "valid.Rank IC": 0.0}) for j in JOBS]
    assert choose_metric(jobs_with_valid) == "valid.Rank IC"  # a test segment must not select
    best = best_job(JOBS, metric, resolve_mode(metric))
    assert best is not None
    assert best.number == 1
    group = best_group(seed_groups(JOBS), metric)
    assert group is not None
    assert group.name == "model=gru"
    loss = best_job(JOBS, "valid/loss", resolve_mode("valid/loss"))
    assert loss is not None
    assert loss.number == 1
    assert best_job(JOBS[-1:], metric) is None


def test_unknown_metric_or_mode_raises():
    with pytest.raises(ConfigError, match=r"Did you mean 'test.Rank IC'"):
        choose_metric(JOBS, "test.Rank_IC")
    with pytest.raises(ConfigError, match="mode"):
        resolve_mode("IC", "maximal")
    assert resolve_mode("valid/loss", "max") == "max"
    assert resolve_mode("1day.excess_return_with_cost.max_drawdown") == "max"  # a negative number


def compute_tags(**changes):
    return identify_task({**TASK, **changes})[1]


def test_seed_changes_task_but_not_setting():
    first, with_other_seed = compute_tags(), compute_tags(seed=1)
    assert first[TASK_TAG] != with_other_seed[TASK_TAG]
    assert first[SETTING_TAG] == with_other_seed[SETTING_TAG]
    assert first[FIT_KEY_TAG] != with_other_seed[FIT_KEY_TAG]


def test_record_changes_task_but_not_training():
    first, without_records = compute_tags(), compute_tags(record=[])
    assert first[TASK_TAG] != without_records[TASK_TAG]
    assert first[FIT_KEY_TAG] == without_records[FIT_KEY_TAG]


def test_task_without_seed_gets_deterministic_seed():
    complete, task_tags = identify_task({**TASK, "seed": None})
    assert complete["seed"] == identify_task({**TASK, "seed": None})[0]["seed"]
    assert complete["seed"] != identify_task({**TASK, "seed": None, "record": []})[0]["seed"]
    assert task_tags == identify_task(complete)[1]


def test_relative_path_identifies_task_only_within_its_folder(tmp_path, monkeypatch):
    source = {"_target_": "qtorch.data.QlibSource", "provider_uri": "bars"}
    handler = {"_target_": "qtorch.data.Alpha158", "source": source}
    task = {**TASK, "dataset": {"_target_": "qtorch.data.DatasetH", "handler": handler}}
    monkeypatch.chdir(tmp_path)
    first_tags = identify_task(task)[1]
    assert first_tags == identify_task(task)[1]
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert identify_task(task)[1][TASK_TAG] != first_tags[TASK_TAG]
    assert identify_task(task)[1][FIT_KEY_TAG] == first_tags[FIT_KEY_TAG]
