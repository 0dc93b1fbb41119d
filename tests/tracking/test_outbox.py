"""No logged entry is lost when the store is unreachable or the process is killed."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from qtorch.core.errors import TrackingError
from qtorch.tracking import R
from qtorch.tracking import delivery as outbox
from qtorch.tracking.mlflow_store import MLflowStore, open_store


def history(recorder, key) -> list[tuple[int, float]]:
    points = recorder.client.get_metric_history(recorder.id, key)
    return sorted((p.step, p.value) for p in points)


@pytest.fixture
def outage(monkeypatch):
    """A switch: while `outage.active`, the store does not answer."""

    class Outage:
        active = False

    def check(self):
        if Outage.active:
            raise TrackingError("the tracking server x does not answer.")

    monkeypatch.setattr(MLflowStore, "check_answers", check)
    monkeypatch.setattr("qtorch.tracking.delivery.INTERVAL", 0.01)
    return Outage


def test_store_gets_all_entries_after_an_outage(uri, outage, outbox_folder, caplog):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        R.log_metrics(step=0, loss=0.0)
        outage.active = True
        for step in range(1, 20):
            R.log_metrics(step=step, loss=float(step))
        assert not recorder.flush()
        assert "Entries are saved to" in caplog.text
        outage.active = False
        assert recorder.flush()
        assert "is available again" in caplog.text
    assert history(recorder, "loss") == [(s, float(s)) for s in range(20)]
    assert list(outbox_folder.iterdir()) == []


@pytest.mark.slow
def test_send_delivers_the_file_of_an_unreachable_store(uri, outage, outbox_folder, caplog):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        recorder.flush()
        outage.active = True
        R.log_metrics(step=0, loss=0.5)
        R.log_params(lr=0.1)
        R.set_tags(kind="x")
    assert recorder.status == "RUNNING"  # until everything is sent
    (file,) = outbox_folder.glob("*.jsonl")
    (error,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert str(file) in error.message
    assert "qtorch tracking send" in error.message
    (failed_report,) = outbox.send_outbox()
    assert "does not answer" in failed_report.error
    outage.active = False
    assert open_store(uri).run(recorder.id).status == "RUNNING"
    (report,) = outbox.send_outbox()
    assert (report.run_id, report.num_sent, report.error) == (
        recorder.id,
        4,
        None,
    )
    assert outbox.send_outbox() == []
    assert history(recorder, "loss") == [(0, 0.5)]
    assert recorder.list_params()["lr"] == "0.1"
    assert recorder.list_tags()["kind"] == "x"
    row = open_store(uri).run(recorder.id)
    assert row.status == "FINISHED"
    assert row.end_time is not None
    assert list(outbox_folder.glob("*")) == []


@pytest.mark.slow
def test_late_status_does_not_end_a_later_attempt(uri, outage, outbox_folder):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        recorder.flush()
        outage.active = True
        R.log_metrics(step=0, loss=0.5)
    outage.active = False
    (file,) = outbox_folder.glob("*.jsonl")
    late = file.read_text()
    with R.start(recorder_id=recorder.id, resume=True):
        assert history(recorder, "loss") == [(0, 0.5)]  # the resumed run sent it
        assert not file.exists()
        file.write_text(late)  # as if the file had been on another machine
        (report,) = outbox.send_outbox()
        assert report.num_skipped == 2  # the metric and the status
        assert open_store(uri).run(recorder.id).status == "RUNNING"
    assert history(recorder, "loss") == [(0, 0.5)]


@pytest.mark.slow
def test_resume_after_sigkill_stores_each_step_once(uri, tmp_path, fork, monkeypatch):
    R.get_exp(experiment_name="e")
    monkeypatch.setattr("qtorch.tracking.delivery.INTERVAL", 0.05)

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
    (killed_run,) = R.list_recorders(experiment_name="e").values()
    (file,) = outbox.outbox_files(killed_run.id)
    assert file.stat().st_size > 0
    with R.start(recorder_id=killed_run.id, resume=True):
        resumed_run = R.get_recorder()
        logged_values = resumed_run.metric_history("loss")
        assert len(logged_values) > 500  # every value that was logged is there
        for step in range(400, 700):
            R.log_metrics(step=step, loss=step / 10)
    stored_points = history(resumed_run, "loss")
    count = max(len(logged_values), 700)
    assert stored_points == [(step, step / 10) for step in range(count)]
    assert outbox.outbox_files() == []


def test_folder_is_delivered_into_the_folder_that_the_upload_would_use(uri, tmp_path):
    local = tmp_path / "scratch"
    local.mkdir()
    (local / "page.html").write_text("page")
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
    journal = outbox.Journal(recorder.id, uri, 1)
    journal.save_file(local, "report")
    journal.close()
    (report,) = outbox.send_outbox()
    assert report.error is None
    assert recorder.list_artifacts("report") == ["report/page.html"]


@pytest.mark.slow
def test_send_skips_files_of_running_processes(uri, outage):
    with R.start(experiment_name="e"):
        R.get_recorder().flush()
        outage.active = True
        R.log_metrics(step=0, loss=0.5)
        R.get_recorder().flush()
        assert len(outbox.outbox_files()) == 1
        assert outbox.send_outbox() == []
        outage.active = False
    assert outbox.outbox_files() == []


def test_second_ctrl_c_while_the_run_ends_loses_nothing(uri, outage, monkeypatch):
    def raise_interrupt(*_):
        raise KeyboardInterrupt

    recorder = R.start_exp(experiment_name="e").active_recorder
    recorder.flush()
    outage.active = True
    R.log_metrics(step=0, loss=0.5)
    with monkeypatch.context() as patch:
        patch.setattr("qtorch.tracking.delivery.time.sleep", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            R.end_exp("KILLED")
    outage.active = False
    assert outbox.send_outbox()[0].error is None
    assert open_store(uri).run(recorder.id).status == "KILLED"
    assert history(recorder, "loss") == [(0, 0.5)]


@pytest.mark.slow
def test_incomplete_and_corrupted_lines_are_skipped(uri, outage, outbox_folder, caplog):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        recorder.flush()
        outage.active = True
        for step in range(3):
            R.log_metrics(step=step, loss=float(step))
    (file,) = outbox_folder.glob("*.jsonl")
    lines = file.read_text().splitlines()
    lines[2] = "{ corrupted"
    file.write_text("\n".join(lines) + '\n{"metric": "lo')
    outage.active = False
    assert outbox.send_outbox()[0].error is None
    assert history(recorder, "loss") == [(0, 0.0), (2, 2.0)]
    assert "is corrupted" in caplog.text
    assert "is incomplete" in caplog.text


def test_rejected_entries_are_reported_and_saved(uri, outbox_folder, caplog):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        recorder.flush()
        recorder.client.log_param(recorder.id, "lr", "0.5")  # another client logged it first
        R.log_params(lr=0.1, depth=2)
        R.log_metrics(step=0, loss=0.5)
    assert recorder.list_params()["lr"] == "0.5"
    assert recorder.list_params()["depth"] == "2"
    assert history(recorder, "loss") == [(0, 0.5)]
    (rejected_file,) = outbox_folder.glob("*.refused")
    assert json.loads(rejected_file.read_text())["param"] == "lr"
    assert "the store rejected" in caplog.text


def test_unwritable_outbox_is_reported_and_logging_continues(uri, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QTORCH_OUTBOX", str(tmp_path / "file" / "outbox"))
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        R.log_metrics(step=0, loss=0.5)
    assert "could not write entries" in caplog.text
    assert history(recorder, "loss") == [(0, 0.5)]


def test_outbox_is_private_and_contains_no_passwords(outbox_folder):
    journal = outbox.Journal("run", "postgresql://me:secret@host/db", 1)
    journal.append([{"tag": "a", "value": "b"}])
    journal.close()
    (path,) = outbox_folder.iterdir()
    assert [p.stat().st_mode & 0o777 for p in (outbox_folder, path)] == [0o700, 0o600]
    text = path.read_text()
    assert "secret" not in text
    assert "postgresql://me:***@host/db" in text


def test_forked_child_sends_its_own_entries(uri, fork):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        R.log_metrics(step=0, parent=1.0)

        def child():
            R.log_metrics(step=0, child=1.0)
            assert R.get_recorder().flush()

        assert os.waitstatus_to_exitcode(os.waitpid(fork(child), 0)[1]) == 0
    assert history(recorder, "parent") == history(recorder, "child") == [(0, 1.0)]


def test_run_is_not_finished_before_the_files_of_dead_children_are_sent(
    uri, outbox_folder, monkeypatch
):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        journal = outbox.Journal(recorder.id, uri, 1)
        journal.append([{"metric": "child", "value": 1.0, "time": 1, "step": 0}])
        journal.close()
    assert recorder.status == "FINISHED"
    assert history(recorder, "child") == [(0, 1.0)]
    monkeypatch.setenv("QTORCH_TRACKING_PATIENCE", "0.1")
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        damaged = outbox_folder / f"{recorder.id}.damaged.jsonl"
        damaged.write_text("{}\n")
    assert recorder.status == "RUNNING"
    errors = [delivery.error for delivery in outbox.send_outbox()]
    assert "must be sent first" in errors[-1]
    assert R.get_recorder(recorder_id=recorder.id).status == "RUNNING"
    damaged.unlink()
    assert [delivery.error for delivery in outbox.send_outbox()] == [None]
    assert R.get_recorder(recorder_id=recorder.id).status == "FINISHED"


def test_status_is_sent_after_the_values(uri, monkeypatch, outbox_folder):
    log_batch, statuses = MLflowStore.log_batch, []

    def note_status(self, run_id, *arguments, **options):
        statuses.append(self.run(run_id).status)
        log_batch(self, run_id, *arguments, **options)

    with R.start(experiment_name="e"):
        run_id = R.get_recorder().id
    monkeypatch.setattr(MLflowStore, "log_batch", note_status)
    store = open_store(uri)

    def make_entries(step):
        store.set_status(run_id, "RUNNING")
        metric = {"metric": "loss", "value": 1.0, "time": 1, "step": step}
        return [{"status": "FINISHED", "time": 2}, metric]

    sender = outbox.Sender(store, run_id, 1)
    sender.enqueue(make_entries(0))
    assert sender.close() is None
    assert not sender.journal.close()
    journal = outbox.Journal(run_id, uri, 1)
    journal.append(make_entries(1))
    journal.close()
    assert [delivery.error for delivery in outbox.send_outbox()] == [None]
    assert statuses == ["RUNNING", "RUNNING"]
    assert store.run(run_id).status == "FINISHED"


def test_logging_takes_microseconds(uri):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        begin_time = time.perf_counter()
        for step in range(500):
            recorder.log_batch({"a": 1.0, "b": 2.0}, step)
        seconds_per_call = (time.perf_counter() - begin_time) / 500
    assert seconds_per_call < 2e-3  # 60 us on an idle machine; a request to sqlite takes 3 ms
    assert len(history(recorder, "a")) == 500


@pytest.fixture
def remote_artifacts(uri, monkeypatch):
    """Send artifacts through MLflow's repositories, as for a remote store."""
    monkeypatch.setattr("qtorch.tracking.artifacts.local_folder", lambda _: None)
    monkeypatch.setattr("qtorch.tracking.artifacts.PAUSES", (0.01,))


def test_artifacts_of_a_remote_store(remote_artifacts, tmp_path):
    (tmp_path / "folder" / "in").mkdir(parents=True)
    (tmp_path / "folder" / "in" / "a.txt").write_text("a")
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        R.save_objects(**{"pred.pkl": pd.Series([1.0]), "sig/ic.pkl": pd.Series([2.0])})
        R.save_objects(**{"pred.pkl": {"now": "plain"}})
        R.log_artifact(tmp_path / "folder")
        R.save_objects(local_path=tmp_path / "folder", artifact_path="flat")
        (recorder.checkpoint_dir() / "last.ckpt").touch()
    loaded_run = R.get_recorder(recorder_id=recorder.id)
    assert loaded_run.load_object("pred.pkl") == {"now": "plain"}
    assert loaded_run.load_object("sig/ic.pkl").tolist() == [2.0]
    names = [n for n in loaded_run.list_artifacts() if not n.startswith(("code_", "run.log"))]
    assert names == ["flat", "folder", "pred.pkl", "sig"]
    with open(loaded_run.download_artifact("folder/in/a.txt", str(tmp_path))) as file:
        assert file.read() == "a"
    assert (loaded_run.checkpoint_dir() / "last.ckpt").exists()
    assert "runs" in str(loaded_run.checkpoint_dir())
    with pytest.raises(TrackingError, match=r"Did you mean 'pred\.pkl'"):
        loaded_run.load_object("pre.pkl")


def test_log_of_a_killed_process_in_a_remote_store(remote_artifacts, tmp_path, fork):
    """It stays on the machine of the process; the resumed run sends it."""
    R.get_exp(experiment_name="e")
    logger = logging.getLogger("qtorch.test")

    def work():
        R.start_exp(experiment_name="e")
        logger.warning("epoch 0")
        R.log_metrics(step=0, loss=1.0)
        assert R.get_recorder().flush()
        logger.warning("epoch 1")
        R.log_metrics(step=1, loss=0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(fork(work), 0)
    (killed_run,) = R.list_recorders(experiment_name="e").values()
    assert "run.log" not in killed_run.list_artifacts()
    with R.start(recorder_id=killed_run.id, resume=True):
        logger.warning("epoch 2")
    text = Path(killed_run.download_artifact("run.log", str(tmp_path))).read_text()
    warnings = [line.split(" W ")[1] for line in text.splitlines() if " W " in line]
    assert warnings == ["epoch 0", "epoch 1"]
    text = Path(killed_run.download_artifact("attempt_2_run.log")).read_text()
    assert "W epoch 2" in text
    assert list(Path(killed_run.get_local_dir()).glob("*.log")) == []  # all of them are sent


def test_artifact_is_saved_and_sent_after_an_outage(
    remote_artifacts, outage, outbox_folder, caplog
):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        recorder.flush()
        outage.active = True
        R.save_objects(**{"params.pkl": {"w": 1}})
        assert R.load_object("params.pkl") == {"w": 1}  # records load it in the same run
    assert "The artifact was saved to" in caplog.text
    outage.active = False
    (report,) = outbox.send_outbox()
    assert report.error is None
    loaded_run = R.get_recorder(recorder_id=recorder.id)
    assert loaded_run is not recorder
    assert loaded_run.load_object("params.pkl") == {"w": 1}
    assert list(outbox_folder.glob("*")) == []


def test_a_process_with_several_runs_collects_their_entries_longer(monkeypatch):
    monkeypatch.setattr(outbox, "INTERVAL", 1.0)
    stop = threading.Event()
    threads = [outbox.SenderThread(target=stop.wait, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    seconds = outbox._collecting_seconds()
    stop.set()
    for thread in threads:
        thread.join()
    assert 3.0 <= seconds <= outbox.MAX_INTERVAL
    assert outbox._collecting_seconds() < seconds
