"""Jobs that a launcher has lost: failed jobs, unless they had come to their end before."""

from __future__ import annotations

import json

import pytest
from hydra.conf import HydraConf
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf

from qtorch.cli.lost import note_lost_job
from qtorch.cli.sweep import FAILED, FINISHED, KILLED, RESULT_FILE, JobResult, forget_jobs

WORDS = ["debug=tiny", "hydra.launcher.num_cpus=2", "seed=1"]


@pytest.fixture
def lose(tmp_path):
    """`lose(status)`: what the job's folder tells of it; it had left a result of that status."""

    def lost(before=None):
        if before is not None:
            (tmp_path / "3").mkdir()
            JobResult(3, ["seed=1"], before, 5.0, run_id="abc").store(tmp_path / "3")
        config = OmegaConf.create({"hydra": HydraConf})
        config.hydra.job.num = 3
        config.hydra.sweep.dir, config.hydra.sweep.subdir = str(tmp_path), "${hydra.job.num}"
        returned = note_lost_job(config, 3, WORDS, "the node is gone")
        assert returned.status == JobStatus.COMPLETED
        assert returned.return_value is None
        return JobResult(**json.loads((tmp_path / "3" / RESULT_FILE).read_text()))

    yield lost
    forget_jobs()


def test_a_job_that_left_nothing_has_failed(lose, capsys):
    told = lose()
    assert (told.number, told.status, told.error) == (3, FAILED, "the node is gone")
    assert told.overrides == ["debug=tiny", "seed=1"]
    assert "job 3 failed: the node is gone" in capsys.readouterr().err


def test_a_job_that_had_come_to_its_end_stays_so(lose):
    assert lose(FINISHED).run_id == "abc"


def test_a_job_that_was_told_to_stop_and_not_tried_again_has_failed(lose):
    told = lose(KILLED)
    assert (told.status, told.error, told.seconds) == (FAILED, "the node is gone", 5.0)
