"""The MLflow store: concurrent processes, a real server, MLflow's own settings."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
from local_servers import MlflowServer

from qtorch import init
from qtorch.task.pool import default_url
from qtorch.tracking import R, locations
from qtorch.tracking import delivery as outbox
from qtorch.tracking.locations import claims_folder
from qtorch.tracking.mlflow_store import open_store


def run_race(fork, jobs: int, uri: str, runs: int = 1) -> list[int]:
    """Start runs from several processes at the same moment in one experiment of one new store."""
    start_time = time.time() + 0.3

    def job():
        time.sleep(max(0.0, start_time - time.time()))
        for _ in range(runs):
            with R.start(experiment_name="shared", uri=uri):
                R.log_metrics(step=0, loss=1.0)
                R.save_objects(task={"a": 1})

    pids = [fork(job) for _ in range(jobs)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def check_race(uri: str, count: int) -> None:
    with R.uri_context(uri):
        runs = R.list_recorders(experiment_name="shared")
        assert len(runs) == count
        assert {r.status for r in runs.values()} == {"FINISHED"}
        assert all(r.list_metrics() == {"loss": 1.0} for r in runs.values())
        assert set(R.list_experiments()) == {"Default", "shared"}


@pytest.mark.slow
def test_eight_processes_race_to_create_a_store(tmp_path, fork):
    open_store(f"sqlite:///{tmp_path}/other.db")  # creates the template
    uri = f"sqlite:///{tmp_path}/fresh folder/mlflow.db"
    assert run_race(fork, 8, uri) == [0] * 8
    check_race(uri, 8)


@pytest.mark.slow
def test_eight_processes_race_without_a_template_file(tmp_path, fork, monkeypatch):
    monkeypatch.setenv("QTORCH_CACHE", str(tmp_path / "cache"))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert run_race(fork, 8, uri, runs=5) == [0] * 8
    check_race(uri, 40)
    assert len(list((tmp_path / "cache").glob("mlflow-*.db"))) == 1


def test_damaged_template_is_recreated(tmp_path, template_cache, monkeypatch):
    open_store(f"sqlite:///{tmp_path}/a.db")
    (template,) = template_cache.glob("mlflow-*.db")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / template.name).write_bytes(template.read_bytes()[:50_000])
    monkeypatch.setenv("QTORCH_CACHE", str(cache))
    migrated_paths = []

    def migrate(path):
        migrated_paths.append(path)
        path.write_bytes(template.read_bytes())

    monkeypatch.setattr("qtorch.tracking.mlflow_store._migrate", migrate)
    open_store(f"sqlite:///{tmp_path}/b.db").experiments()
    assert len(migrated_paths) == 1
    assert (cache / template.name).stat().st_size == template.stat().st_size


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".mlflow.db.init-999").write_text("half a file")
    (tmp_path / "mlflow.db").touch()
    assert [e.name for e in open_store("sqlite:///mlflow.db").experiments()] == ["Default"]
    assert not (tmp_path / ".mlflow.db.init-999").exists()
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        ((location,),) = connection.execute("SELECT artifact_location FROM experiments").fetchall()
    assert location == str(tmp_path / "artifacts" / "Default")


@pytest.mark.slow
def test_mlflow_system_metrics_are_logged(uri, monkeypatch):
    pytest.importorskip("psutil")
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    with R.start(experiment_name="e"):
        time.sleep(3)
        recorder = R.get_recorder()
    assert "system/cpu_utilization_percentage" in recorder.list_metrics()


SCRIPT = """
from qtorch.tracking import R
R.log_metrics(m=1.0)
{last_line}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last_line", "expected_status"),
    [("", "FINISHED"), ("1 / 0", "FAILED"), ("raise KeyboardInterrupt", "KILLED")],
)
def test_open_run_ends_with_its_program(uri, last_line, expected_status):
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    subprocess.run(
        [sys.executable, "-c", SCRIPT.format(last_line=last_line)], env=environment, check=False
    )
    (recorder,) = R.list_recorders(experiment_name="Experiment").values()
    assert recorder.status == expected_status
    assert recorder.list_metrics() == {"m": 1.0}


@pytest.fixture
def server(tmp_path):
    open_store(f"sqlite:///{tmp_path}/server.db")  # a copy is faster than the server's migrations
    server = MlflowServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.mark.slow
def test_server_outage_during_a_run(server, monkeypatch, outbox_folder):
    monkeypatch.setenv("QTORCH_TRACKING_PATIENCE", "20")
    with R.start(experiment_name="a/b ü", uri=server.uri):
        recorder = R.get_recorder()
        R.log_params(lr=0.1)
        R.save_objects(**{"pred.pkl": pd.Series([1.0])})
        for step in range(100):
            R.log_metrics(step=step, loss=float(step), bad=float("nan"))
        assert recorder.flush()
        server.stop()
        for step in range(100, 200):
            R.log_metrics(step=step, loss=float(step))
        assert not recorder.flush()
        server.start()
    points = recorder.client.get_metric_history(recorder.id, "loss")
    assert sorted((p.step, p.value) for p in points) == [(s, float(s)) for s in range(200)]
    with R.uri_context(server.uri):
        loaded_run = R.get_recorder(recorder_id=recorder.id)
        assert loaded_run.status == "FINISHED"
        assert loaded_run.load_object("pred.pkl").tolist() == [1.0]
        assert "pred.pkl" in loaded_run.list_artifacts()
        assert loaded_run.get_artifact_uri().startswith("mlflow-artifacts:")
        assert len(loaded_run.metric_history("bad")) == 100
        with R.start(recorder_id=recorder.id, resume=True):
            R.log_metrics(step=199, loss=199.0, inf=float("inf"))
            R.log_metrics(step=200, loss=200.0)
        assert len(loaded_run.client.get_metric_history(loaded_run.id, "loss")) == 201
        assert loaded_run.list_metrics()["inf"] == float("inf")
    assert list(outbox_folder.glob("*")) == []


@pytest.mark.slow
def test_dead_server_leaves_entries_in_the_outbox(server, outbox_folder, caplog):
    with R.start(experiment_name="e", uri=server.uri):
        recorder = R.get_recorder()
        recorder.flush()
        server.stop()
        R.log_metrics(step=0, loss=0.5)
        R.save_objects(task={"a": 1})
    assert "qtorch tracking send" in caplog.text
    server.start()
    (report,) = outbox.send_outbox()
    assert report.error is None
    with R.uri_context(server.uri):
        loaded_run = R.get_recorder(recorder_id=recorder.id)
        assert loaded_run.status == "FINISHED"
        assert loaded_run.list_metrics() == {"loss": 0.5}
        assert loaded_run.load_object("task") == {"a": 1}
    assert list(outbox_folder.glob("*")) == []


def test_claims_folder_lies_beside_local_store(tmp_path, monkeypatch):
    assert claims_folder(f"sqlite:///{tmp_path}/mlruns/m.db") == tmp_path / "mlruns" / "claims"
    monkeypatch.setenv("QTORCH_CACHE", str(tmp_path / "cache"))
    server_folder = claims_folder("http://localhost:5000")
    assert server_folder.parent == tmp_path / "cache" / "claims"
    assert server_folder != claims_folder("http://localhost:5001")


def save_run(value) -> str:
    with R.start(experiment_name="e"):
        R.save_objects(x=value)
        return str(R.get_recorder().id)


@pytest.mark.parametrize("is_copy", [False, True])
def test_runs_stay_readable_when_their_folder_moves(tmp_path, monkeypatch, is_copy):
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    run_id = save_run({"a": 1})
    monkeypatch.chdir(tmp_path)
    if is_copy:
        shutil.copytree("old", "new")
    else:
        os.rename("old", "new")
    monkeypatch.chdir(tmp_path / "new")
    recorder = R.get_recorder(recorder_id=run_id)
    assert recorder.load_object("x") == {"a": 1}
    assert Path(recorder.get_local_dir()).is_relative_to(tmp_path / "new")
    new_recorder = R.get_recorder(recorder_id=save_run({"a": 2}))  # in the experiment that moved
    assert Path(new_recorder.get_local_dir()).is_relative_to(tmp_path / "new")
    assert new_recorder.load_object("x") == {"a": 2}
    assert (tmp_path / "old").exists() == is_copy
    if is_copy:
        monkeypatch.chdir(tmp_path / "old")
        assert len(R.list_recorders(experiment_name="e")) == 1


def test_artifacts_in_a_place_that_the_user_has_chosen_stay_there(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for root in ("elsewhere", "elsewhere/artifacts/e/run"):
        folder = tmp_path / root
        folder.mkdir(parents=True)
        assert locations.find_artifacts(uri, str(folder)) == str(folder)
    chosen = tmp_path / "elsewhere" / "artifacts" / "e" / "run" / "artifacts"
    chosen.mkdir()
    assert locations.find_artifacts(uri, str(chosen)) == str(chosen)
    remote = "s3://bucket/artifacts/e/run/artifacts"
    assert locations.find_artifacts(uri, remote) == remote
    assert locations.find_artifacts("http://server", str(chosen)) == str(chosen)


def test_stores_stay_the_same_when_the_process_changes_its_folder(tmp_path, monkeypatch):
    init(seed=1)
    before = (R.get_uri(), default_url())
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert (R.get_uri(), default_url()) == before
    assert locations.resolve_uri("sqlite:///runs.db") == f"sqlite:///{tmp_path}/runs.db"
