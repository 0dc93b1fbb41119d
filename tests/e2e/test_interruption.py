"""Ctrl-C, kill -9 and what comes after them, on real processes."""

from __future__ import annotations

import signal
import time

import pytest

pytestmark = pytest.mark.slow

EPOCHS = 12  # enough that the last one is far when the first one is seen
JOB = (
    "train",
    "debug=tiny",
    f"trainer.max_epochs={EPOCHS}",
    "callbacks=no_stop",
    "model.network.dropout=0.2",
)


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


def history(run) -> dict:
    return {k: run.logged(k) for k in sorted(run.list_metrics())}


def test_ctrl_c_leaves_a_killed_run_that_can_be_resumed(start, runs, qtorch_cli):
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
    assert history(resumed) == history(other)
    told = qtorch_cli("train", f"resume={run.id}")
    assert "FINISHED" in told.error()


def test_a_second_ctrl_c_ends_at_once(start, runs):
    # One endless step: the first Ctrl-C waits for its end, the second does not.
    child = start(
        *JOB, "model.network.hidden_size=1500", "model.inner_steps=64", "trainer.max_epochs=400"
    )
    end = time.monotonic() + 240
    while not runs() or not runs()[0].list_artifacts():
        assert time.monotonic() < end
        time.sleep(0.5)
    time.sleep(6)
    child.send_signal(signal.SIGINT)
    time.sleep(1)
    begin = time.monotonic()
    while child.poll() is None and time.monotonic() - begin < 60:
        child.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert child.returncode not in (None, 0)
    assert time.monotonic() - begin < 30
    assert "FINISHED" not in [r.status for r in runs()]


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
