"""R, experiments and recorders: Qlib's behaviour and the differences from it."""

from __future__ import annotations

import logging
import math
import os
import pickle
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
from local_servers import MlflowServer

from qtorch.core.errors import ArgumentError, LoadObjectError, TrackingError
from qtorch.core.runtime import init
from qtorch.core.session import set_defaults
from qtorch.tracking import R, Recorder
from qtorch.tracking.locations import resolve_uri
from qtorch.tracking.mlflow_store import open_store
from qtorch.tracking.provenance import qtorch_environment
from qtorch.tracking.recorder import current_recorder
from qtorch.tracking.store_types import AlreadyInStoreError, NotInStoreError


def history(recorder, key) -> list[tuple[int, float]]:
    """Return every stored point of a metric, read with MLflow's own client."""
    points = recorder.client.get_metric_history(recorder.id, key)
    return sorted((p.step, p.value) for p in points)


def read_status(recorder) -> str:
    return open_store(recorder.uri).run(recorder.id).status


def run_block(error: BaseException | None = None) -> Recorder:
    with suppress(type(error) if error else ()), R.start(experiment_name="e"):
        recorder = R.get_recorder()
        if error is not None:
            raise error
    return recorder


def read_log(recorder, name: str = "run.log") -> str:
    return Path(recorder.download_artifact(name)).read_text()


def test_log_of_a_run_is_an_artifact(uri, monkeypatch, capsys, caplog):
    """Without `init` it has warnings, which are still printed; with it also what happens."""
    logger, qtorch_logger = logging.getLogger("qtorch.test"), logging.getLogger("qtorch")
    monkeypatch.setattr(logging.root, "handlers", [])
    caplog.set_level(logging.WARNING)
    assert "run.log" not in run_block().list_artifacts()
    with R.start(experiment_name="e"):
        quiet_run = R.get_recorder()
        logger.info("news")
        logger.warning("see http://me:s3cret@h")
    assert "W see http://me:***@h" in read_log(quiet_run)
    assert "news" not in read_log(quiet_run)
    assert "see http" in capsys.readouterr().err

    init(log_level="ERROR")
    with R.start(experiment_name="e"):
        run = R.get_recorder()
        logger.info("news")
        logger.info("epoch 1", extra={"file_only": True})
    assert [line.split(" ", 2)[2] for line in read_log(run).splitlines()] == [
        f"I started run {run.id}",
        "I news",
        "I epoch 1",
        f"I run {run.id} ends: FINISHED",
    ]
    init(log_level="INFO")
    with R.start(recorder_id=run.id, resume=True):
        logger.info("more")
        logger.info("epoch 2", extra={"file_only": True})
    assert "I more" in read_log(run, "attempt_2_run.log")
    assert "I news" in read_log(run)
    output = capsys.readouterr().err
    assert "I more" in output
    assert "epoch" not in output
    assert len(qtorch_logger.handlers) == 1


@pytest.mark.parametrize(
    ("error", "expected_status"),
    [
        (None, "FINISHED"),
        (ValueError("x"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(1), "KILLED"),
    ],
)
def test_final_status_depends_on_the_exception(uri, error, expected_status):
    recorder = run_block(error)
    assert recorder.status == expected_status == read_status(recorder)
    assert recorder.end_time is not None
    assert current_recorder() is None


def test_ctrl_c_ends_the_run_as_killed(uri, tmp_path, fork):
    R.get_exp(experiment_name="e")

    def job():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with R.start(experiment_name="e"):
            (tmp_path / "ready").touch()
            time.sleep(30)

    pid = fork(job)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)
    os.waitpid(pid, 0)
    assert [r.status for r in R.list_recorders(experiment_name="e").values()] == ["KILLED"]


def test_qlib_workflow(uri):
    with R.start(experiment_name="test", recorder_name="first") as experiment:
        recorder = R.get_recorder()
        assert R.get_exp() == experiment == R.get_exp(experiment_name="test")
        assert experiment.active_recorder is recorder
        assert recorder.info["status"] == "RUNNING"
        assert current_recorder() is recorder
        R.log_params(lr=0.1, layers=[1, 2])
        R.log_metrics(loss=0.5, step=3)
        R.set_tags(kind="x")
        R.save_objects(**{"pred.pkl": pd.Series([1.0])}, artifact_path="sig")
        R.save_objects(task={"a": (1,)})
        assert recorder.list_params() == {**recorder.list_params(), "lr": "0.1", "layers": "[1, 2]"}
        assert recorder.list_metrics() == {"loss": 0.5}
        assert recorder.list_tags()["kind"] == "x"
        recorder.delete_tags("kind", "never there")
        assert "kind" not in recorder.list_tags()
        assert R.load_object("task") == {"a": (1,)}
    assert R.get_recorder(recorder_name="first", experiment_name="test").id == recorder.id
    loaded_run = R.get_recorder(recorder_id=recorder.id, experiment_name="test")
    assert loaded_run == recorder
    assert loaded_run.load_object("sig/pred.pkl").tolist() == [1.0]
    assert loaded_run.name == "first"
    assert loaded_run.start_time == recorder.start_time
    assert list(R.list_recorders(experiment_name="test")) == [recorder.id]
    assert set(R.list_experiments()) == {"Default", "test"}
    assert experiment.list_recorders("list", status="FAILED") == []


def test_nested_runs_and_isolated_threads(uri):
    with R.start(experiment_name="outer"):
        outer = R.get_recorder()
        with R.start(experiment_name="inner"):
            assert R.get_exp().name == "inner"
        assert R.get_recorder() is outer
    names, barrier = {}, threading.Barrier(3)

    def job(name):
        with R.start(experiment_name=name):
            barrier.wait()
            names[name] = R.get_exp().name
            R.log_metrics(m=1.0)
            barrier.wait()

    threads = [threading.Thread(target=job, args=(f"t{k}",)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == {f"t{k}": f"t{k}" for k in range(3)}


def test_worker_thread_sees_the_run_of_its_process(uri):
    seen_recorders = []
    with R.start(experiment_name="e"):
        thread = threading.Thread(target=lambda: seen_recorders.append(current_recorder()))
        thread.start()
        thread.join()
        assert seen_recorders == [R.get_recorder()]


def test_start_exp_and_end_exp(uri):
    experiment = R.start_exp(experiment_name="e")
    recorder = experiment.active_recorder
    R.end_exp("FAILED")
    assert read_status(recorder) == "FAILED"
    R.end_exp()  # no run is active: nothing happens


def test_logging_without_a_run_starts_one(uri, caplog):
    R.log_metrics(m=1.0)
    recorder = R.get_recorder()
    assert "no run is active" in caplog.text
    R.log_metrics(m=2.0)
    assert R.get_recorder() is recorder
    assert R.get_exp().name == "Experiment"
    R.end_exp()
    assert history(recorder, "m") == [(0, 1.0), (1, 2.0)]


def test_resume_sends_only_missing_values(uri, caplog):
    with R.start(experiment_name="e", recorder_name="r"):
        R.log_params(lr=0.1, depth=2)
        for step in range(5):
            R.log_metrics(step=step, loss=float(step))
        R.log_metrics(IC=0.1)
        recorder = R.get_recorder()
    with R.start(recorder_id=recorder.id, resume=True):
        resumed_run = R.get_recorder()
        assert resumed_run == recorder
        assert read_status(resumed_run) == "RUNNING"
        assert R.get_exp().name == "e"
        assert resumed_run.metric_history("loss") == {s: float(s) for s in range(5)}
        R.log_params(lr=0.1, depth=3, new=1)
        for step in range(3, 8):
            R.log_metrics(step=step, loss=float(step))
        R.log_metrics(step=0, loss=9.0)
        R.log_metrics(IC=0.1)
        assert resumed_run.metric_history("loss") == {s: float(s) for s in range(8)}
    assert history(recorder, "loss") == [(s, float(s)) for s in range(8)]
    assert history(recorder, "IC") == [(0, 0.1)]
    assert (
        "'loss' at step 0 already has the value 0.0; the new value 9.0 is not sent" in caplog.text
    )
    params, tags = resumed_run.list_params(), resumed_run.list_tags()
    assert (params["lr"], params["depth"], params["new"]) == ("0.1", "2", "1")
    assert tags["qtorch.changed_param.depth"] == "3"
    assert "param 'depth' already has the value '2'" in caplog.text
    assert resumed_run.status == "FINISHED"


def test_metric_without_step_gets_increasing_steps(uri):
    with R.start(experiment_name="e"):
        for value in (1.0, 1.0, 2.0):
            R.log_metrics(loss=value)
        R.log_metrics(IC=0.1)
        recorder = R.get_recorder()
    with R.start(recorder_id=recorder.id, resume=True):
        for value in (1.0, 1.0, 2.0, 3.0):  # the same program again, with one step more
            R.log_metrics(loss=value)
        R.log_metrics(IC=0.2)  # another model: a new value
    assert history(recorder, "loss") == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    assert history(recorder, "IC") == [(0, 0.1), (1, 0.2)]
    assert recorder.list_metrics() == {"loss": 3.0, "IC": 0.2}


def test_nan_and_infinity_are_stored_with_a_warning(uri, caplog):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        recorder.log_batch({"loss": math.inf, "ic": math.nan}, 2)
    with R.start(recorder_id=recorder.id, resume=True):
        recorder = R.get_recorder()
        recorder.log_batch({"loss": math.inf, "ic": math.nan}, 2)
        assert recorder.metric_history("loss") == {2: math.inf}
    assert len(history(recorder, "loss")) == len(history(recorder, "ic")) == 1
    assert recorder.list_metrics()["loss"] == math.inf
    assert math.isnan(recorder.list_metrics()["ic"])
    assert "'loss' is inf at step 2" in caplog.text
    with pytest.raises(ArgumentError, match="a metric must be one number"):
        recorder.log_metrics(loss="high")


def test_long_values_and_invalid_names_are_logged_with_a_warning(uri, caplog):
    with R.start(experiment_name="e"):
        R.log_params(**{"net": "x" * 7000, "loss(mse)/a": 1})
        R.set_tags(long="y" * 9000)
        R.log_metrics(**{"ic[0]": 1.0})
        recorder = R.get_recorder()
    assert recorder.list_params()["net"] == "x" * 6000
    assert recorder.list_params()["loss_mse_/a"] == "1"
    assert recorder.list_metrics() == {"ic_0_": 1.0}
    with open(recorder.download_artifact("long_values/net.txt")) as file:
        assert file.read() == "x" * 7000
    assert len(recorder.list_tags()["long"]) == 8000
    assert "'net' has 7000 characters" in caplog.text
    assert "'loss(mse)/a' is logged as 'loss_mse_/a'" in caplog.text
    with R.start(recorder_id=recorder.id, resume=True):
        R.log_params(net="x" * 7000)
    assert not [t for t in recorder.list_tags() if t.startswith("qtorch.changed")]


def test_search_records_returns_the_documented_table(uri):
    ids = []
    for k in range(3):
        with R.start(experiment_name="e"):
            R.log_metrics(ic=0.1 * k)
            if k:
                R.log_params(lr=k)
            ids.append(R.get_recorder().id)
    experiment = R.get_exp(experiment_name="e")
    table = R.search_records([experiment.id], order_by=["metrics.ic DESC"])
    assert list(table["run_id"]) == ids[::-1]
    assert list(table["params.lr"]) == ["2", "1", None]
    assert table["metrics.ic"].dtype == float
    assert str(table["start_time"].dt.tz) == "UTC"
    assert (table["tags.mlflow.runName"] == "mlflow_recorder").all()
    limited_table = experiment.search_records(filter_string="metrics.ic > 0.05", max_results=1)
    assert len(limited_table) == 1
    assert len(R.search_records(filter_string="params.lr = '9'")) == 0


@pytest.mark.parametrize("name", ["a/b", "Käse 实验", "100%", "../up", "x" * 200])
def test_unusual_names(uri, name, store_file):
    with R.start(experiment_name=name, recorder_name=name):
        R.save_objects(task={"a": 1})
        recorder = R.get_recorder()
    loaded_run = R.get_recorder(experiment_name=name, recorder_name=name)
    assert loaded_run.load_object("task") == {"a": 1}
    assert store_file.parent / "artifacts" in Path(recorder.get_local_dir()).parents


def test_errors_suggest_the_nearest_name(uri):
    with R.start(experiment_name="alpha", recorder_name="lstm"):
        recorder = R.get_recorder()
    with pytest.raises(NotInStoreError, match=r"'alpa'.*Did you mean 'alpha'"):
        R.get_exp(experiment_name="alpa", create=False)
    with pytest.raises(ValueError, match=r"'lstn'.*Did you mean 'lstm'"):
        R.get_recorder(recorder_name="lstn", experiment_name="alpha")
    with pytest.raises(NotInStoreError, match="not found"):
        R.get_recorder(recorder_id="0" * 32)
    with pytest.raises(NotInStoreError, match="no run is active"):
        R.get_recorder()
    with pytest.raises(NotInStoreError, match="is not in experiment 'Default'"):
        R.get_recorder(recorder_id=recorder.id, experiment_name="Default")
    with pytest.raises(ArgumentError, match="resume=True"), R.start(recorder_id=recorder.id):
        pass
    with pytest.raises(NotInStoreError), R.start(recorder_id="0" * 32, resume=True):
        pass
    with pytest.raises(ArgumentError, match="Did you mean 'FINISHED'"):
        recorder.end_run("FINISHD")
    with pytest.raises(AlreadyInStoreError):
        R.exp_manager.create_exp("alpha")
    with pytest.raises(TrackingError, match="has not been started"):
        R.get_exp(experiment_name="alpha").create_recorder("new").log_metrics(a=1)


def test_runs_of_the_default_experiment_that_does_not_exist(uri):
    run_block()
    message = "pass experiment_name, because 'Experiment' is only the default: .* Default, e"
    with pytest.raises(NotInStoreError, match=message):
        R.list_recorders()


def test_delete_run_and_experiment(uri):
    with R.start(experiment_name="e"):
        first = R.get_recorder().id
    R.delete_recorder(recorder_id=first)
    assert R.list_recorders(experiment_name="e") == {}
    with pytest.raises(TrackingError, match="deleted"), R.start(recorder_id=first, resume=True):
        pass
    R.delete_exp(experiment_name="e")
    assert "e" not in R.list_experiments()
    with pytest.raises(NotInStoreError, match=r"is deleted.*restore"):
        R.get_exp(experiment_name="e")


def test_artifacts_by_logical_name_and_file_name(uri, tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "ic.png").write_bytes(b"png")
    (tmp_path / "raw.json").write_text("{}")
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        R.save_objects(**{"pred.pkl": pd.Series([1.0]), "sig/ic.pkl": pd.Series([2.0])}, task={})
        R.log_artifact(tmp_path / "plots")
        R.save_objects(local_path=tmp_path / "plots", artifact_path="flat")
        R.log_artifact(tmp_path / "raw.json")
    names = [n for n in recorder.list_artifacts() if not n.startswith(("code_", "run.log"))]
    assert names == ["flat", "plots", "pred.pkl", "raw.json", "sig", "task"]
    assert recorder.list_artifacts("sig") == ["sig/ic.pkl"]
    assert recorder.list_artifacts("flat") == ["flat/ic.png"]
    assert recorder.list_artifacts("nowhere") == []
    assert recorder.download_artifact("pred.pkl").endswith("pred.pkl.parquet")
    copy = recorder.download_artifact("plots", str(tmp_path / "got"))
    assert os.listdir(copy) == ["ic.png"]
    with pytest.raises(LoadObjectError, match=r"'pred\.pk'.*Did you mean 'pred\.pkl'.*task"):
        recorder.load_object("pred.pk")
    with pytest.raises(LoadObjectError, match="is a folder"):
        recorder.load_object("sig")
    for bad in ("../x", "/etc/passwd", ""):
        with pytest.raises(ArgumentError):
            recorder.load_object(bad)
        with pytest.raises(ArgumentError):
            recorder.save_objects(**{bad: 1})
    with pytest.raises(ArgumentError, match="no file or folder"):
        recorder.log_artifact("not there")


def test_saving_in_another_format_replaces_the_object(uri):
    with R.start(experiment_name="e"):
        R.save_objects(thing=pd.Series([1.0]))
        R.save_objects(thing={"now": "plain"})
        assert R.load_object("thing") == {"now": "plain"}
        R.save_objects(thing=pd.Series([3.0]))
        assert R.load_object("thing").tolist() == [3.0]
        assert R.get_recorder().list_artifacts().count("thing") == 1


def test_full_disk_fails_the_run(uri, monkeypatch):
    def raise_disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(TrackingError, match=r"'pred.pkl' could not be written.*No space left"),
        R.start(experiment_name="e"),
    ):
        recorder = R.get_recorder()
        monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", raise_disk_full)
        R.save_objects(**{"pred.pkl": pd.Series([1.0])})
    assert read_status(recorder) == "FAILED"
    assert "pred.pkl" not in recorder.list_artifacts()


def test_run_folders_persist(uri):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        (recorder.checkpoint_dir() / "last.ckpt").write_text("x")
    loaded_run = R.get_recorder(recorder_id=recorder.id)
    assert (loaded_run.checkpoint_dir() / "last.ckpt").read_text() == "x"
    assert loaded_run.list_artifacts("checkpoints") == ["checkpoints/last.ckpt"]
    assert os.path.isdir(loaded_run.get_local_dir())


def test_recorder_can_be_pickled(uri):
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        pickle_bytes = pickle.dumps(recorder)
        copy = pickle.loads(pickle_bytes)
        copy.log_metrics(step=1, from_elsewhere=1.0)
        copy.save_objects(x=1)
        assert R.load_object("x") == 1
    assert recorder.list_metrics() == {"from_elsewhere": 1.0}


def test_run_of_a_dead_process_can_be_ended(uri, fork):
    R.get_exp(experiment_name="e")
    pid = fork(lambda: (R.start_exp(experiment_name="e"), os.kill(os.getpid(), signal.SIGKILL)))
    os.waitpid(pid, 0)
    (recorder,) = R.list_recorders(experiment_name="e").values()
    assert recorder.status == "RUNNING"
    recorder.end_run(Recorder.STATUS_FA)
    assert read_status(recorder) == "FAILED"


def test_killed_process_leaves_its_log(uri, fork):
    R.get_exp(experiment_name="e")

    def work():
        R.start_exp(experiment_name="e")
        logging.getLogger("qtorch.test").warning("the last words")
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(fork(work), 0)
    (recorder,) = R.list_recorders(experiment_name="e").values()
    assert "run.log" in recorder.list_artifacts()
    assert "W the last words" in read_log(recorder)


def test_log_that_cannot_be_written_does_not_stop_the_run(uri, caplog):
    caplog.set_level("WARNING", "qtorch")  # the start of the run is not logged
    with R.start(experiment_name="e"):
        run = R.get_recorder()
        Path(run.get_local_dir(), "artifacts").write_text("a file in the place of the folder")
        logging.getLogger("qtorch.test").warning("words")
        Path(run.get_local_dir(), "artifacts").unlink()
    assert read_status(run) == "FINISHED"
    assert f"the log of run {run.id} is not complete: " in caplog.text


def test_provenance_is_recorded(uri, tmp_path, monkeypatch):
    repository = tmp_path / "repo"
    repository.mkdir()
    monkeypatch.chdir(repository)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y"]
    (repository / "code.py").write_text("a = 1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    (repository / "code.py").write_text("a = 2\npassword = 'hunter2'\n")
    monkeypatch.setenv("QTORCH_SOMETHING", "postgresql://me:se/cret@host/db")
    monkeypatch.setenv("QTORCH_MY_TOKEN", "hunter2")
    monkeypatch.setenv("QTORCH_KEY", "AKIAABCDEFGHIJKLMNOP")
    monkeypatch.setenv("QTORCH_URLS", '["http://me:secret@host"]')
    monkeypatch.setattr("sys.argv", ["study.py", "--seed", "3", "url=http://me:a'b@h"])
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
    params = recorder.list_params()
    assert params["QTORCH_SOMETHING"] == "postgresql://me:***@host/db"
    assert params["QTORCH_MY_TOKEN"] == params["QTORCH_KEY"] == "***"
    assert "QTORCH_URLS" not in params
    assert params["cmd-sys.argv"] == "study.py --seed 3 'url=http://me:***@h'"
    diff = Path(recorder.download_artifact("code_diff.txt")).read_text()
    assert "+a = 2\n+password = '***'" in diff
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert recorder.list_tags()["mlflow.source.git.commit"] == head.stdout.strip()
    with R.start(recorder_id=recorder.id, resume=True):
        pass
    assert recorder.list_tags()["qtorch.attempt"] == "2"


def test_variables_of_child_processes_are_not_recorded(monkeypatch):
    for name in ("QTORCH_FOLDER", "QTORCH_SWEEP_LOCK", "QTORCH_OF_THE_USER"):
        monkeypatch.setenv(name, "a")
    recorded = qtorch_environment()
    assert recorded["QTORCH_OF_THE_USER"] == "a"
    assert not recorded.keys() & {"QTORCH_FOLDER", "QTORCH_SWEEP_LOCK"}


def test_provenance_can_be_switched_off(uri, monkeypatch):
    monkeypatch.setattr("qtorch.tracking.provenance.git_output", lambda command: "text")
    monkeypatch.setenv("QTORCH_SOMETHING", "a")
    monkeypatch.setenv("QTORCH_RECORD_DIFF", "0")
    monkeypatch.setenv("QTORCH_RECORD_ENVIRONMENT", "0")
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
    assert not [p for p in recorder.list_params() if p.startswith("QTORCH")]
    assert set(recorder.list_artifacts()) <= {"run.log"}


def test_params_and_tags_contain_no_secrets_of_urls(uri):
    long_text = "x" * 10_000 + " http://me:s3cret@host"
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        recorder.log_params(source="http://me:s3cret@host", long=long_text)
        recorder.log_params(source="http://me:s3cret@other")
        recorder.set_tags(source="http://s3cret@host", long=long_text)
    assert recorder.list_params()["source"] == "http://me:***@host"
    tags = recorder.list_tags()
    assert tags["source"] == "http://***@host"
    assert tags["qtorch.changed_param.source"] == "http://me:***@other"
    files = [p for p in Path(recorder.get_local_dir()).rglob("*") if p.is_file()]
    assert files
    assert not [p for p in files if b"s3cret" in p.read_bytes()]


def test_stored_uri_is_completed(monkeypatch):
    full, stored = "postgresql://me:s3cret@host/db", "postgresql://me:***@host/db"
    with pytest.raises(TrackingError, match=r"me:\*\*\*@host/db is stored without .* set MLFLOW"):
        R.set_uri(stored)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", full)
    with R.uri_context(stored):
        assert R.get_uri() == full
        assert repr(R) == f"Workflow(uri={stored!r})"


@pytest.mark.parametrize("password", ["a/b", "a@b", "a#b", "a?b", "1/2"])
def test_password_that_parsers_would_split_is_rejected(password):
    with pytest.raises(TrackingError, match=r"me:\*\*\*@host/db contains one of") as error:
        resolve_uri(f"postgresql://me:{password}@host/db")
    assert password not in str(error.value)


@pytest.mark.slow
def test_mlflow_prints_no_password(tmp_path, capfd):
    """MLflow prints the address of a run that ends."""
    open_store(f"sqlite:///{tmp_path}/server.db")
    server = MlflowServer(tmp_path)
    server.start()
    try:
        with R.uri_context(server.uri.replace("://", "://me:s3cret@")):
            with R.start(experiment_name="e"):
                recorder = R.get_recorder()
            assert R.get_recorder(recorder_id=recorder.id).status == "FINISHED"
    finally:
        server.stop()
    assert "s3cret" not in "".join(capfd.readouterr())


def test_precedence_of_tracking_uris(tmp_path, monkeypatch):
    assert R.get_uri() == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///env.db")
    assert R.get_uri() == f"sqlite:///{tmp_path}/env.db"
    set_defaults(tracking_uri="sqlite:///of_init.db")
    assert R.get_uri() == f"sqlite:///{tmp_path}/of_init.db"
    with R.uri_context("sqlite:///context.db"):
        assert R.get_uri() == f"sqlite:///{tmp_path}/context.db"
        with R.start(experiment_name="e", uri="sqlite:///own.db"):
            assert R.get_uri() == f"sqlite:///{tmp_path}/own.db"
            assert R.get_exp().name == "e"
            recorder = R.get_recorder()
    assert (tmp_path / "own.db").exists()
    assert not (tmp_path / "context.db").exists()
    with R.uri_context(recorder.uri):
        assert R.get_recorder(recorder_id=recorder.id) == recorder
    assert str(tmp_path / "artifacts") in recorder.get_artifact_uri()
    with pytest.raises(TrackingError, match=r"sqlite:///.*mlruns/mlflow.db"):
        R.set_uri("mlruns")
    with pytest.raises(TrackingError, match=r"mlflow.db"):
        R.set_uri("file:///some/mlruns")
    for other_uri in ("databricks", "databricks://profile", "postgresql://h1,h2/db"):
        assert resolve_uri(other_uri) == other_uri


@pytest.mark.parametrize("bad", ["http://127.0.0.1:9", "postgresql://me:pw@127.0.0.1:9/db"])
def test_unreachable_store_raises_quickly(bad):
    start_time = time.monotonic()
    raises_error = pytest.raises(TrackingError, match=r"127\.0\.0\.1:9.* does not answer")
    with raises_error as error, R.start(experiment_name="e", uri=bad):
        pass
    assert time.monotonic() - start_time < 5
    assert "pw" not in str(error.value)


def test_invalid_store_file_raises(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is no database, " * 50)
    raises_error = pytest.raises(TrackingError, match=r"mlflow\.db cannot be opened")
    with raises_error, R.start(uri="sqlite:///mlflow.db"):
        pass
    (tmp_path / "file").touch()
    raises_error = pytest.raises(TrackingError, match="cannot be opened or created")
    with raises_error, R.start(uri="sqlite:///file/mlflow.db"):
        pass


def test_mlflow_global_state_is_restored(uri):
    import mlflow

    before = mlflow.get_tracking_uri()
    with R.start(experiment_name="e"):
        assert "MLFLOW_TRACKING_URI" not in os.environ
    assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() == before
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_console_messages_are_not_repeated(uri, caplog):
    caplog.set_level(logging.INFO)
    with R.start(experiment_name="e"):
        pass
    assert len([r for r in caplog.records if "started run" in r.message]) == 1
