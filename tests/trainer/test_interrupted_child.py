"""A trainer whose task runs in a child and is interrupted."""

from __future__ import annotations

import pytest

from qtorch.process.heartbeat import RUN
from qtorch.tracking.manager import R
from qtorch.trainer import subprocess_tasks
from qtorch.trainer.failure import collect_started_runs
from qtorch.trainer.run import task_train


class InterruptedServer:
    """A fork server whose child starts a run; then this process is interrupted."""

    def __init__(self, run: dict[str, str]) -> None:
        self.run = run

    def call(self, function, request, on_message):
        on_message({RUN: self.run})
        raise KeyboardInterrupt


def test_run_of_an_interrupted_child_is_reported(store, monkeypatch):
    with R.start(experiment_name="experiment"):
        recorder = R.get_recorder()
    run = {"recorder_id": recorder.id, "experiment_id": recorder.experiment_id}
    monkeypatch.setattr(subprocess_tasks, "fork_server", lambda *_: InterruptedServer(run))
    with collect_started_runs() as runs, pytest.raises(KeyboardInterrupt):
        subprocess_tasks.train_in_child(task_train, {}, "experiment")
    assert [r.id for r in runs] == [recorder.id]
