"""Jobs of a repeated sweep that are finished are not submitted again."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

from omegaconf import OmegaConf

from qtorch.cli.jobs import finished_jobs
from qtorch.core.errors import TrackingError


def test_a_job_that_cannot_be_checked_is_submitted_and_says_why(monkeypatch, caplog):
    def skip_second_job(job, number, *_):
        if number == 0:
            raise TrackingError("the store does not answer")
        return "job return"

    sweep = SimpleNamespace(recorder=SimpleNamespace(id="sweep"))
    monkeypatch.setattr(finished_jobs, "current_sweep", lambda: sweep)
    monkeypatch.setattr(finished_jobs, "has_finished_jobs", lambda _: True)
    monkeypatch.setattr(finished_jobs, "compose_job", lambda *_: OmegaConf.create())
    monkeypatch.setattr(finished_jobs, "use_hydra_config", nullcontext)
    monkeypatch.setattr(finished_jobs, "_skip_job", skip_second_job)
    config = OmegaConf.create({"runner": "local", "experiment_name": "e"})
    job_returns = finished_jobs.skip_finished_jobs(None, config, {0: ["a=1"], 1: ["a=2"]})
    assert job_returns == {1: "job return"}
    assert "job 0 is submitted" in caplog.text
    assert "the store does not answer" in caplog.text
