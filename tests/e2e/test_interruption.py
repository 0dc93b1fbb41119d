"""Ctrl-C, kill -9 and what comes after them, on real processes."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import time
from contextlib import closing

import pytest

pytestmark = pytest.mark.slow

EPOCHS = 12  # enough that the last one is far when the first one is seen
LONG = ("train", "debug=tiny", f"trainer.max_epochs={EPOCHS}", "callbacks=no_stop")
JOB = (*LONG, "model.network.dropout=0.2", "model.network.hidden_size=16")


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-equal means: with one number of threads; the processes are started with one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def wait_for_epoch(runs, child, epoch: int = 0, patience: float = 240.0):
    """The run, once its metrics of an epoch are in the store."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        assert child.poll() is None, child.communicate()
        for run in runs():
            if epoch in run.logged("valid/loss"):
                return run
        time.sleep(0.1)
    raise AssertionError("the training did not get anywhere")


def history(run, folder) -> dict:
    """`{(key, step): value}` of MLflow's own table, in which each stands once."""
    (database,) = folder.glob("**/mlflow.db")
    with closing(sqlite3.connect(database)) as connection:
        query = "SELECT key, step, value FROM metrics WHERE run_uuid = ?"
        points = connection.execute(query, (run.id,)).fetchall()
    found = {(key, step): value for key, step, value in points}
    assert len(found) == len(points)
    return found


def test_ctrl_c_leaves_a_killed_run_that_can_be_resumed(start, runs, qtorch_cli, folder):
    child = start(*JOB)
    run = wait_for_epoch(runs, child)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert f"qtorch train resume={run.id}" in err
    (killed,) = runs()
    assert killed.status == "KILLED"
    assert set(killed.logged("valid/loss")) < set(range(EPOCHS))

    refused = qtorch_cli("train", f"resume={run.id}", "seed=1")
    assert "would not count" in refused.error()
    told = qtorch_cli("train", f"run={run.id}", "resume=true")
    assert told.code == 0, told.err
    (resumed,) = runs()
    assert resumed.status == "FINISHED"
    assert set(resumed.logged("valid/loss")) == set(range(EPOCHS))

    assert qtorch_cli(*JOB).code == 0
    other = next(r for r in runs() if r.id != run.id)
    assert history(resumed, folder) == history(other, folder)
    told = qtorch_cli("train", f"resume={run.id}")
    assert "FINISHED" in told.error()


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


def test_a_second_ctrl_c_ends_at_once(start, runs, folder):
    """In a step of two minutes: the first Ctrl-C waits for its end, the second does not."""
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
        child.wait(1)  # the first one alone ends nothing
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "stopping after this step; Ctrl-C once more ends at once" in err
    assert not (folder / "stepped").exists()
    assert [r.status for r in runs()] == ["KILLED"]


def test_a_job_that_its_scheduler_starts_again_goes_on_in_its_run(
    start, runs, qtorch_cli, monkeypatch
):
    child = start(*JOB, QTORCH_JOB="ns/job-7")
    run = wait_for_epoch(runs, child)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=120)
    assert child.returncode not in (None, 0)
    assert f"resume={run.id}" in err
    assert runs()[0].status == "KILLED"

    monkeypatch.setenv("QTORCH_JOB", "ns/job-7")
    assert qtorch_cli(*JOB).code == 0
    (resumed,) = runs()
    assert (resumed.id, resumed.status) == (run.id, "FINISHED")
    assert resumed.load_object("fit_report")["resumed_from"] is not None
    assert set(resumed.logged("valid/loss")) == set(range(EPOCHS))
    assert qtorch_cli(*JOB, "trainer.max_epochs=1").code == 0  # another task of the same job
    assert len(runs()) == 2
    monkeypatch.setenv("QTORCH_JOB", "job 7")
    assert "letters, digits" in qtorch_cli(*JOB).error()
