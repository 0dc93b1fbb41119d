"""Tests of lost jobs: they become failed jobs unless they left a result."""

from __future__ import annotations

import json

import pytest
from hydra.conf import HydraConf
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf

from qtorch.cli.jobs.job import record_lost_job
from qtorch.cli.jobs.results import FAILED, FINISHED, KILLED, RESULT_FILE, JobResult, clear_results

WORDS = ["debug=tiny", "hydra.launcher.num_cpus=2", "seed=1"]


@pytest.fixture
def lose_job(tmp_path):
    """Return `lose_job(status)`: the recorded result of a lost job.

    If a status is given, the job had stored a result with it before.
    """

    def record(earlier_status=None):
        if earlier_status is not None:
            (tmp_path / "3").mkdir()
            JobResult(3, ["seed=1"], earlier_status, 5.0, run_id="abc").store(tmp_path / "3")
        config = OmegaConf.create({"hydra": HydraConf})
        config.hydra.job.num = 3
        config.hydra.sweep.dir, config.hydra.sweep.subdir = str(tmp_path), "${hydra.job.num}"
        job_return = record_lost_job(config, 3, WORDS, "the node is gone")
        assert job_return.status == JobStatus.COMPLETED
        assert job_return.return_value is None
        return JobResult(**json.loads((tmp_path / "3" / RESULT_FILE).read_text()))

    yield record
    clear_results()


def test_lost_job_without_result_has_failed(lose_job, capsys):
    result = lose_job()
    assert (result.number, result.status, result.error) == (3, FAILED, "the node is gone")
    assert result.overrides == ["debug=tiny", "seed=1"]
    assert "job 3 failed: the node is gone" in capsys.readouterr().err


def test_lost_job_keeps_a_finished_result(lose_job):
    assert lose_job(FINISHED).run_id == "abc"


def test_stopped_job_that_is_not_retried_has_failed(lose_job):
    result = lose_job(KILLED)
    assert (result.status, result.error, result.seconds) == (FAILED, "the node is gone", 5.0)
