"""Nothing that is logged gets lost: a store that is away, a process that is killed."""

from __future__ import annotations

import json
import logging
import os
import signal
import time

import pandas as pd
import pytest

from qtorch.core.errors import TrackingError
from qtorch.tracking import R, outbox
from qtorch.tracking.mlflow_recorder import MLflowRecorder
from qtorch.tracking.mlflow_store import MLflowStore, store_at


def history(recorder, key) -> list[tuple[int, float]]:
    points = recorder.client.get_metric_history(recorder.id, key)
    return sorted((p.step, p.value) for p in points)


@pytest.fixture
def away(monkeypatch):
    """A switch: while it is on, the store does not answer."""

    class Switch:
        on = False

    def check(self):
        if Switch.on:
            raise TrackingError("the tracking server x does not answer.")

    monkeypatch.setattr(MLflowStore, "check_answers", check)
    monkeypatch.setattr("qtorch.tracking.sender.INTERVAL", 0.01)
    return Switch


def test_a_store_that_is_away_for_a_while_gets_everything(uri, away, outbox_folder, caplog):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        R.log_metrics(step=0, loss=0.0)
        away.on = True
        for step in range(1, 20):
            R.log_metrics(step=step, loss=float(step))
        assert not recorder.flush()
        assert "is kept in" in caplog.text
        away.on = False
        assert recorder.flush()
        assert "answers again" in caplog.text
    assert history(recorder, "loss") == [(s, float(s)) for s in range(20)]
    assert list(outbox_folder.iterdir()) == []


@pytest.mark.slow
def test_a_store_that_stays_away_leaves_a_file_that_send_delivers(uri, away, outbox_folder, caplog):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        recorder.flush()
        away.on = True
        R.log_metrics(step=0, loss=0.5)
        R.log_params(lr=0.1)
        R.set_tags(kind="x")
    assert recorder.status == "FINISHED"
    (file,) = outbox_folder.glob("*.jsonl")
    (error,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert str(file) in error.message
    assert "qtorch tracking send" in error.message
    (failed,) = outbox.send()
    assert "does not answer" in failed.error
    away.on = False
    assert store_at(uri).run(recorder.id).status == "RUNNING"
    (report,) = outbox.send()
    assert (report.run_id, report.sent, report.error) == (recorder.id, 4, None)
    assert outbox.send() == []
    assert history(recorder, "loss") == [(0, 0.5)]
    assert recorder.list_params()["lr"] == "0.1"
    assert recorder.list_tags()["kind"] == "x"
    row = store_at(uri).run(recorder.id)
    assert row.status == "FINISHED"
    assert row.end_time is not None
    assert list(outbox_folder.glob("*")) == []


@pytest.mark.slow
def test_a_late_status_does_not_end_a_later_attempt(uri, away, outbox_folder):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        recorder.flush()
        away.on = True
        R.log_metrics(step=0, loss=0.5)
    away.on = False
    (file,) = outbox_folder.glob("*.jsonl")
    late = file.read_text()
    with R.start(recorder_id=recorder.id, resume=True):
        assert history(recorder, "loss") == [(0, 0.5)]  # the resume delivered it
        assert not file.exists()
        file.write_text(late)  # as if it had lain on another machine
        (report,) = outbox.send()
        assert report.already_there == 1
        assert store_at(uri).run(recorder.id).status == "RUNNING"
    assert history(recorder, "loss") == [(0, 0.5)]


@pytest.mark.slow
def test_kill_9_while_logging_then_resume_leaves_each_step_once(uri, tmp_path, fork, monkeypatch):
    R.get_exp(experiment_name="e")
    monkeypatch.setattr("qtorch.tracking.sender.INTERVAL", 0.05)

    def job():
        with R.start(experiment_name="e"):
            for step in range(100_000):
                R.log_metrics(step=step, loss=step / 10)
                if step == 500:
                    (tmp_path / "ready").touch()
                time.sleep(0.0002)

    pid = fork(job)
    while not (tmp_path / "ready").exists():
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    (dead,) = R.list_recorders(experiment_name="e").values()
    (file,) = outbox.waiting(dead.id)
    assert file.stat().st_size > 0
    with R.start(recorder_id=dead.id, resume=True):
        resumed = R.get_recorder()
        logged = resumed.logged("loss")
        assert len(logged) > 500  # nothing that `log_metrics` returned from is gone
        for step in range(400, 700):
            R.log_metrics(step=step, loss=step / 10)
    stored = history(resumed, "loss")
    count = max(len(logged), 700)
    assert stored == [(step, step / 10) for step in range(count)]
    assert outbox.waiting() == []


@pytest.mark.slow
def test_the_file_of_a_living_process_is_left_to_it(uri, away):
    with R.start(experiment_name="e"):
        R.get_recorder().flush()
        away.on = True
        R.log_metrics(step=0, loss=0.5)
        R.get_recorder().flush()
        assert len(outbox.waiting()) == 1
        assert outbox.send() == []
        away.on = False
    assert outbox.waiting() == []


def test_a_second_ctrl_c_while_the_run_ends_loses_nothing(uri, away, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    recorder = R.start_exp(experiment_name="e").active_recorder
    recorder.flush()
    away.on = True
    R.log_metrics(step=0, loss=0.5)
    with monkeypatch.context() as patch:
        patch.setattr("qtorch.tracking.sender.time.sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            R.end_exp("KILLED")
    away.on = False
    assert outbox.send()[0].error is None
    assert store_at(uri).run(recorder.id).status == "KILLED"
    assert history(recorder, "loss") == [(0, 0.5)]


@pytest.mark.slow
def test_a_cut_or_damaged_line_does_not_hold_up_the_rest(uri, away, outbox_folder, caplog):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        recorder.flush()
        away.on = True
        for step in range(3):
            R.log_metrics(step=step, loss=float(step))
    (file,) = outbox_folder.glob("*.jsonl")
    lines = file.read_text().splitlines()
    lines[2] = "{ damaged"
    file.write_text("\n".join(lines) + '\n{"metric": "lo')
    away.on = False
    assert outbox.send()[0].error is None
    assert history(recorder, "loss") == [(0, 0.0), (2, 2.0)]
    assert "is damaged" in caplog.text
    assert "is cut" in caplog.text


def test_what_the_store_refuses_for_good_is_said_and_kept(uri, outbox_folder, caplog):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        recorder.flush()
        recorder.client.log_param(recorder.id, "lr", "0.5")  # somebody else was quicker
        R.log_params(lr=0.1, depth=2)
        R.log_metrics(step=0, loss=0.5)
    assert recorder.list_params()["lr"] == "0.5"
    assert recorder.list_params()["depth"] == "2"
    assert history(recorder, "loss") == [(0, 0.5)]
    (kept,) = outbox_folder.glob("*.refused")
    assert json.loads(kept.read_text())["param"] == "lr"
    assert "the store refuses" in caplog.text


def test_an_outbox_that_cannot_be_written_is_said_and_logging_goes_on(
    uri, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QTORCH_OUTBOX", str(tmp_path / "file" / "outbox"))
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        R.log_metrics(step=0, loss=0.5)
    assert "takes no entries" in caplog.text
    assert history(recorder, "loss") == [(0, 0.5)]


def test_passwords_stay_out_of_the_outbox(monkeypatch, outbox_folder):
    journal = outbox.Journal("run", "postgresql://me:secret@host/db", 1)
    journal.append([{"tag": "a", "value": "b"}])
    journal.close()
    text = next(outbox_folder.iterdir()).read_text()
    assert "secret" not in text
    assert "postgresql://me:***@host/db" in text


def test_a_forked_child_sends_its_own(uri, fork):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        R.log_metrics(step=0, parent=1.0)

        def child():
            R.log_metrics(step=0, child=1.0)
            assert R.get_recorder().flush()

        assert os.waitstatus_to_exitcode(os.waitpid(fork(child), 0)[1]) == 0
    assert history(recorder, "parent") == history(recorder, "child") == [(0, 1.0)]


def test_logging_costs_microseconds(uri):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        begin = time.perf_counter()
        for step in range(500):
            recorder.log_batch({"a": 1.0, "b": 2.0}, step)
        each = (time.perf_counter() - begin) / 500
    assert each < 2e-3  # 60 us on a quiet machine; a request to sqlite is 3 ms
    assert len(history(recorder, "a")) == 500


@pytest.fixture
def far(uri, monkeypatch):
    """Artifacts go through MLflow's repositories."""
    monkeypatch.setattr("qtorch.tracking.run_files.local_folder", lambda _: None)
    monkeypatch.setattr("qtorch.tracking.run_files.PAUSES", (0.01,))


def test_artifacts_of_a_far_store(far, tmp_path):
    (tmp_path / "folder" / "in").mkdir(parents=True)
    (tmp_path / "folder" / "in" / "a.txt").write_text("a")
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        R.save_objects(**{"pred.pkl": pd.Series([1.0]), "sig/ic.pkl": pd.Series([2.0])})
        R.save_objects(**{"pred.pkl": {"now": "plain"}})
        R.log_artifact(tmp_path / "folder")
        R.save_objects(local_path=tmp_path / "folder", artifact_path="flat")
        (recorder.checkpoint_dir() / "last.ckpt").touch()
    again = R.get_recorder(recorder_id=recorder.id)
    assert again.load_object("pred.pkl") == {"now": "plain"}
    assert again.load_object("sig/ic.pkl").tolist() == [2.0]
    listed = [n for n in again.list_artifacts() if not n.startswith("code_")]
    assert listed == ["flat", "folder", "pred.pkl", "sig"]
    with open(again.download_artifact("folder/in/a.txt", str(tmp_path))) as file:
        assert file.read() == "a"
    assert (again.checkpoint_dir() / "last.ckpt").exists()
    assert "runs" in str(again.checkpoint_dir())
    with pytest.raises(TrackingError, match=r"Did you mean 'pred\.pkl'"):
        again.load_object("pre.pkl")


def test_an_artifact_that_a_far_store_does_not_take_is_kept_and_sent(
    far, away, outbox_folder, caplog
):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        recorder.flush()
        away.on = True
        R.save_objects(**{"params.pkl": {"w": 1}})
        assert R.load_object("params.pkl") == {"w": 1}  # the records need it now
    assert "It is kept as" in caplog.text
    away.on = False
    (report,) = outbox.send()
    assert report.error is None
    again = R.get_recorder(recorder_id=recorder.id)
    assert isinstance(again, MLflowRecorder)
    assert again.load_object("params.pkl") == {"w": 1}
    assert list(outbox_folder.glob("*")) == []
