"""Tests of Ctrl-C, SIGTERM and resume with real processes."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest
from training_runs import metric_points, wait_for_epoch

from qtorch.model.loop.module import ScoreModule

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_thread")]

EPOCHS = 4
LONG = ("train", "debug=tiny", f"trainer.max_epochs={EPOCHS}", "callbacks=no_stop")
JOB = (*LONG, "model.network.dropout=0.2", "model.network.hidden_size=16")


@pytest.fixture
def interrupt(folder, runs, monkeypatch):
    """Return `interrupt(child, signal_number)`: send a signal after an epoch and return the run.

    All trainings that are started after this fixture wait in their second epoch for the signal.
    """
    signal_sent = folder / "signal-sent"
    start_epoch = ScoreModule.on_train_epoch_start

    def start_epoch_after_signal(module: ScoreModule) -> None:
        while module.current_epoch == 1 and not signal_sent.exists():
            time.sleep(0.02)
        start_epoch(module)

    monkeypatch.setattr(ScoreModule, "on_train_epoch_start", start_epoch_after_signal)

    def send_signal(child, signal_number: int):
        run = wait_for_epoch(runs, child)
        child.send_signal(signal_number)
        signal_sent.touch()
        return run

    return send_signal


def test_run_can_be_resumed_after_ctrl_c(start, interrupt, runs, qtorch_cli, folder):
    child = start(*JOB)
    run = interrupt(child, signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert f"qtorch train resume={run.id}" in err
    (killed_run,) = runs()
    assert killed_run.status == "KILLED"
    assert set(killed_run.metric_history("valid/loss")) < set(range(EPOCHS))

    rejected_result = qtorch_cli("train", f"resume={run.id}", "seed=1")
    assert "would be ignored" in rejected_result.error()
    result = qtorch_cli("train", f"run={run.id}", "resume=true")
    assert result.code == 0, result.err
    (resumed_run,) = runs()
    assert resumed_run.status == "FINISHED"
    assert set(resumed_run.metric_history("valid/loss")) == set(range(EPOCHS))

    assert qtorch_cli(*JOB).code == 0
    uninterrupted_run = next(r for r in runs() if r.id != run.id)
    database = folder / "mlruns" / "mlflow.db"
    assert metric_points(database, run.id) == metric_points(database, uninterrupted_run.id)
    result = qtorch_cli("train", f"resume={run.id}")
    assert "FINISHED" in result.error()


def test_second_resume_of_a_run_is_refused(start, interrupt, runs, qtorch_cli, folder):
    child = start(*JOB)
    run = interrupt(child, signal.SIGINT)
    child.communicate(timeout=120)
    (folder / "signal-sent").unlink()
    child = start("train", f"resume={run.id}")
    end = time.monotonic() + 120
    while [r.status for r in runs()] != ["RUNNING"]:
        assert time.monotonic() < end
        time.sleep(0.1)
    result = qtorch_cli("train", f"resume={run.id}")
    assert (result.code, f"run {run.id} is in use: process {child.pid}" in result.error()) == (1, 1)
    (held_run,) = runs()
    assert (held_run.status, held_run.list_tags().get("error")) == ("RUNNING", None)
    (folder / "signal-sent").touch()
    child.communicate(timeout=120)
    assert child.returncode == 0
    (finished_run,) = runs()
    assert set(finished_run.metric_history("valid/loss")) == set(range(EPOCHS))


SLOW = """
import time
from pathlib import Path

from torch import nn


class Slow(nn.Module):
    def __init__(self, d_feat):
        super().__init__()
        self.layer = nn.Linear(d_feat, 1)

    def forward(self, x):
        Path("stepping").touch()
        time.sleep(120)
        Path("stepped").touch()
        return self.layer(x[:, -1])
"""


def test_second_ctrl_c_exits_immediately(start, runs, folder):
    """During a step of two minutes, only the first Ctrl-C waits for the end of the step."""
    (folder / "slow.py").write_text(SLOW)
    job = (*LONG, "model=lightning", "+model.network._target_=slow.Slow")
    child = start(*job)
    end = time.monotonic() + 240
    while not (folder / "stepping").exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(1)  # the first Ctrl-C does not end the process
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "stopping after this step; press Ctrl-C again to stop immediately" in err
    assert not (folder / "stepped").exists()
    assert [r.status for r in runs()] == ["KILLED"]


def test_restarted_scheduler_job_resumes_its_run(start, interrupt, runs, qtorch_cli, monkeypatch):
    child = start(*JOB, QTORCH_JOB="ns/job-7")
    run = interrupt(child, signal.SIGTERM)
    _, err = child.communicate(timeout=120)
    assert child.returncode not in (None, 0)
    assert f"resume={run.id}" in err
    assert runs()[0].status == "KILLED"

    monkeypatch.setenv("QTORCH_JOB", "ns/job-7")
    assert qtorch_cli(*JOB).code == 0
    (resumed_run,) = runs()
    assert (resumed_run.id, resumed_run.status) == (run.id, "FINISHED")
    assert resumed_run.load_object("fit_report")["resumed_from"] is not None
    assert set(resumed_run.metric_history("valid/loss")) == set(range(EPOCHS))
    assert qtorch_cli(*JOB, "trainer.max_epochs=1").code == 0  # another task of the same job
    assert len(runs()) == 2
    monkeypatch.setenv("QTORCH_JOB", "job 7")
    assert "letters, digits" in qtorch_cli(*JOB).error()
