"""Tests of the collected results of a command's jobs."""

from __future__ import annotations

import json

import pytest

from qtorch.cli.jobs.results import FAILED, FINISHED, RESULT_FILE, CommandResults
from qtorch.study.sweep import JobResult


@pytest.fixture
def results() -> CommandResults:
    return CommandResults()


def test_results_of_an_earlier_command_with_the_same_folder_do_not_count(results, tmp_path):
    for number in (0, 1):
        CommandResults().store(JobResult(number, [], FINISHED), tmp_path / str(number))
    results.watch_folder(tmp_path)
    assert results.all() == []
    CommandResults().store(JobResult(1, ["seed=1"], FAILED), tmp_path / "1")  # in another process
    assert [(r.number, r.status) for r in results.all()] == [(1, FAILED)]
    assert (tmp_path / "1" / RESULT_FILE).stat().st_mode & 0o777 == 0o600
    results.discard(0)
    assert (tmp_path / "0" / RESULT_FILE).exists()
    results.discard(1)
    assert not (tmp_path / "1" / RESULT_FILE).exists()


def test_result_without_fields_of_later_versions_is_read(results, tmp_path):
    stored = {"number": 2, "overrides": ["seed=1"], "status": FINISHED, "seconds": 1.5}
    (tmp_path / RESULT_FILE).write_text(json.dumps(stored))
    assert results.load(tmp_path) == JobResult(2, ["seed=1"], FINISHED, 1.5)
    (tmp_path / RESULT_FILE).write_text("no result")
    assert results.load(tmp_path) is None
