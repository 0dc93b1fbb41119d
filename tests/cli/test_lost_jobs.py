"""Tests of lost jobs: they become failed jobs unless they left a result."""

from __future__ import annotations

import json

import pytest
from hydra.conf import HydraConf
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf

from qtorch.cli.jobs.job import record_lost_job
from qtorch.cli.jobs.results import FAILED, FINISHED, KILLED, RESULT_FILE, command_results
from qtorch.study.sweep import JobResult

WORDS = ["debug=tiny", "hydra.launcher.num_cpus=2", "seed=1"]


@pytest.fixture
def lose_job(tmp_path):
    """Return `lose_job(status)`: the recorded result of a lost job.

    If a status is given, the job had stored a result with it before; if `is_stale`, the job of an
    earlier command with the same folder had.
    """

    def record(earlier_status=None, is_stale=False):
        if earlier_status is not None:
            result = JobResult(3, ["seed=1"], earlier_status, 5.0, run_id="abc")
            command_results.store(result, tmp_path / "3")
        if is_stale:
            command_results.watch_folder(tmp_path)
        config = OmegaConf.create({"hydra": HydraConf})
        config.hydra.job.num = 3
        config.hydra.sweep.dir, config.hydra.sweep.subdir = str(tmp_path), "${hydra.job.num}"
        job_return = record_lost_job(config, 3, WORDS, "the node is gone")
        assert job_return.status == JobStatus.COMPLETED
        assert job_return.return_value is None
        return JobResult(**json.loads((tmp_path / "3" / RESULT_FILE).read_text()))

    yield record
    command_results.clear()


def test_lost_job_without_result_has_failed(lose_job, capsys):
    result = lose_job()
    assert (result.number, result.status, result.error) == (3, FAILED, "the node is gone")
    assert result.overrides == ["debug=tiny", "seed=1"]
    assert "job 3 failed: the node is gone" in capsys.readouterr().err


def test_lost_job_keeps_a_finished_result(lose_job):
    assert lose_job(FINISHED).run_id == "abc"


def test_result_of_an_earlier_command_is_not_that_of_the_lost_job(lose_job):
    assert lose_job(FINISHED, is_stale=True).status == FAILED


def test_stopped_job_that_is_not_retried_has_failed(lose_job):
    result = lose_job(KILLED)
    assert (result.status, result.error, result.seconds) == (FAILED, "the node is gone", 5.0)
