"""Tests of the `qtorch tracking` command."""

from __future__ import annotations

import pytest

import qtorch
from qtorch import R
from qtorch.cli.main import main
from qtorch.tracking import delivery as outbox


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """Use a tracking store and an outbox in the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QTORCH_OUTBOX", str(tmp_path / "outbox"))
    qtorch.init(tracking_uri=f"sqlite:///{tmp_path}/runs.db")


def test_nothing_to_deliver(capsys):
    assert main(["tracking", "send"]) == 0
    assert "nothing to deliver" in capsys.readouterr().out


def test_stored_data_is_delivered(capsys):
    with R.start(experiment_name="x"):
        recorder = R.get_recorder()
    journal = outbox.Journal(recorder.id, recorder.uri, 1)
    journal.append([{"metric": "late", "value": 0.5, "time": 1, "step": 0}])
    journal.close()
    assert main(["tracking", "send", f"run={recorder.id}"]) == 0
    assert f"run {recorder.id}: 1 sent" in capsys.readouterr().out
    assert recorder.list_metrics()["late"] == 0.5


def test_undeliverable_data_and_wrong_options_are_errors(capsys, monkeypatch):
    monkeypatch.setenv("QTORCH_TRACKING_TIMEOUT", "1")
    journal = outbox.Journal("abc", "http://127.0.0.1:9", 1)
    journal.append([{"metric": "late", "value": 0.5, "time": 1, "step": 0}])
    journal.close()
    assert main(["tracking", "send"]) == 1
    assert "127.0.0.1:9" in capsys.readouterr().err
    assert main(["tracking", "send", "rum=abc"]) == 1
    assert "Did you mean 'run'?" in capsys.readouterr().err
