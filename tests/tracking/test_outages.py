"""A tracking server that is away, or behind a proxy that misbehaves: nothing is lost or mistaken.

QTORCH_FAULT_SEEDS is the number of random sequences of faults; a longer run is
`QTORCH_FAULT_SEEDS=200 pytest tests/tracking/test_outages.py`.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from local_servers import MlflowServer
from misbehaving_proxy import Proxy
from mlflow.store.artifact import local_artifact_repo

from qtorch.core.errors import TrackingError
from qtorch.task import TaskManager, run_task
from qtorch.tracking import R
from qtorch.tracking import delivery as outbox
from qtorch.tracking.mlflow_store import open_store
from qtorch.tracking.run_log import RUN_LOG
from qtorch.tracking.store_types import NotInStoreError

pytestmark = pytest.mark.slow
NUM_SEEDS = int(os.environ.get("QTORCH_FAULT_SEEDS", "2"))
NUM_STEPS = 12
# The tests take those of the proxy's modes that MLflow takes for an answer of its server: an empty
# page for success, one of status 404 or 400 for a refusal, half a page for a whole one. Longer runs
# take all modes.
MODES = Proxy.MODES if NUM_SEEDS > 2 else ("empty_but_healthy", "error_404_but_healthy")
WRITING_MODES = MODES if NUM_SEEDS > 2 else (*MODES, "bad_request_but_healthy")
READING_MODES = MODES if NUM_SEEDS > 2 else (*MODES, "half_but_healthy")


@pytest.fixture(scope="module")
def server(tmp_path_factory, template_cache):
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTORCH_CACHE", str(template_cache))
        open_store(f"sqlite:///{folder}/server.db")  # a copy is faster than the migrations
        server = MlflowServer(folder)
        server.start()
    yield server
    server.stop()


@pytest.fixture
def proxy(server, monkeypatch):
    """A proxy in front of the server, and short limits of time."""
    monkeypatch.setenv("QTORCH_TRACKING_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    monkeypatch.setattr("qtorch.tracking.artifacts.PAUSES", (0.05,))
    monkeypatch.setattr("qtorch.tracking.delivery.INTERVAL", 0.02)
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


def log_step(step: int) -> None:
    """Log a part of a run: metrics, a param, tags and artifacts, some of them again and again."""
    R.log_metrics(step=step, loss=1 / (step + 1), bad=float("nan"))
    R.log_params(**{f"param{step}": step})
    R.set_tags(last=step, **{f"tag{step}": f"value {step}"})
    if step % 3 == 0:
        # The same name in two formats, and a page, which is no page of a proxy.
        R.save_objects(**{"state.pkl": {"step": step} if step % 2 else pd.Series([1.5] * step)})
        Path(f"page{step}.html").write_text(f"<html>{step}</html>")
        R.log_artifact(f"page{step}.html", "report")
        Path("same.txt").write_text(f"{step}" * (step + 1))
        R.log_artifact("same.txt")


def read_run(server, run_id: str) -> dict:
    """Read what the server has of a run, without the proxy and without qtorch's checks."""
    client = open_store(server.uri).client
    run = client.get_run(run_id)
    files: dict[str, bytes] = {}
    root = Path(server.folder, "files", run.info.experiment_id, run_id, "artifacts")
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        files[str(path.relative_to(root))] = path.read_bytes()
    return {
        "status": run.info.status,
        "metrics": {
            key: sorted((p.step, str(p.value)) for p in client.get_metric_history(run_id, key))
            for key in run.data.metrics
        },
        "params": {k: v for k, v in run.data.params.items() if k.startswith("param")},
        "tags": {k: v for k, v in run.data.tags.items() if k.startswith(("tag", "last"))},
        "files": {k: v for k, v in files.items() if not k.startswith(("code_", RUN_LOG))},
    }


def expected_run(num_steps: int = NUM_STEPS) -> dict:
    """What a run with `num_steps` calls of `log_step` contains."""
    last = (num_steps - 1) // 3 * 3
    return {
        "status": "FINISHED",
        "metrics": {
            "loss": sorted((s, str(1 / (s + 1))) for s in range(num_steps)),
            "bad": sorted((s, "nan") for s in range(num_steps)),
        },
        "params": {f"param{s}": str(s) for s in range(num_steps)},
        "tags": {"last": str(num_steps - 1)} | {f"tag{s}": f"value {s}" for s in range(num_steps)},
        "files": {"same.txt": (f"{last}" * (last + 1)).encode(), state_file(last): None}
        | {f"report/page{s}.html": f"<html>{s}</html>".encode() for s in range(0, num_steps, 3)},
    }


def state_file(step: int) -> str:
    return f"state.pkl.{'json' if step % 2 else 'parquet'}"


def assert_complete(run: dict, num_steps: int = NUM_STEPS) -> None:
    # A killed upload leaves a temporary file of MLflow's server beside the artifacts.
    temporary = local_artifact_repo._TEMP_ARTIFACT_PREFIX
    files = {name: data for name, data in run["files"].items() if not name.startswith(temporary)}
    run, expected = {**run, "files": files}, expected_run(num_steps)
    assert sorted(run["files"]) == sorted(expected["files"])
    state = next(name for name in expected["files"] if name.startswith("state"))
    expected["files"][state] = run["files"][state]  # the name tells which of its values it is
    assert run == expected


def send_outbox() -> list[str]:
    return [r.error for r in outbox.send_outbox() if r.error]


def test_undisturbed_run_is_what_the_other_tests_expect(server, proxy):
    with R.start(experiment_name="e", uri=proxy.uri):
        recorder = R.get_recorder()
        for step in range(NUM_STEPS):
            log_step(step)
    assert_complete(read_run(server, recorder.id))
    assert recorder.load_object("state.pkl") == {"step": 9}


@pytest.mark.parametrize("mode", WRITING_MODES)
def test_run_is_not_finished_before_everything_arrived(mode, server, proxy, outbox_folder):
    with R.start(experiment_name="e", uri=proxy.uri):
        recorder = R.get_recorder()
        log_step(0)
        assert recorder.flush()
        proxy.mode = mode
        for step in range(1, 5):
            log_step(step)
        assert recorder.load_object("state.pkl") == {"step": 3}  # from the outbox
    assert recorder.status == "RUNNING"
    assert send_outbox()
    assert read_run(server, recorder.id)["status"] == "RUNNING"
    proxy.mode = "forward"
    assert not send_outbox()
    assert_complete(read_run(server, recorder.id), 5)
    assert list(outbox_folder.iterdir()) == []


@pytest.mark.parametrize("mode", ["silence", "page_but_healthy", "endless_but_healthy"])
def test_server_that_comes_back_gets_everything_before_the_status(
    mode, server, proxy, outbox_folder, monkeypatch
):
    monkeypatch.setenv("QTORCH_TRACKING_PATIENCE", "20")
    with R.start(experiment_name="e", uri=proxy.uri):
        recorder = R.get_recorder()
        recorder.flush()
        proxy.mode = mode
        for step in range(4):
            log_step(step)
        proxy.mode = "forward"
        log_step(4)
        for step in range(5, 8):  # the artifact of step 6 must not arrive before that of step 3
            log_step(step)
    assert recorder.status == "FINISHED"
    assert_complete(read_run(server, recorder.id), 8)
    assert list(outbox_folder.iterdir()) == []


def test_artifacts_arrive_during_the_run(server, proxy):
    with R.start(experiment_name="e", uri=proxy.uri):
        recorder = R.get_recorder()
        recorder.flush()
        proxy.mode = "page"
        log_step(0)
        proxy.mode = "forward"
        end = time.monotonic() + 30
        while "same.txt" not in read_run(server, recorder.id)["files"]:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert recorder.load_object("state.pkl").empty


def test_confirmed_upload_that_did_not_arrive_is_repeated(server, proxy):
    with R.start(experiment_name="e", uri=proxy.uri):
        recorder = R.get_recorder()
        proxy.is_swallowing = True
        log_step(0)
    assert recorder.status == "RUNNING"
    proxy.is_swallowing = False
    assert not send_outbox()
    assert_complete(read_run(server, recorder.id), 1)


@pytest.mark.parametrize("mode", READING_MODES)
def test_reading_fails_and_takes_no_page_for_data(mode, server, proxy, tmp_path):
    with R.start(experiment_name="e", uri=proxy.uri):
        recorder = R.get_recorder()
        log_step(0)
    proxy.mode = mode
    reads = (
        lambda: R.get_recorder(recorder_id=recorder.id),
        recorder.list_tags,
        recorder.list_artifacts,
        lambda: recorder.load_object("state.pkl"),
        lambda: recorder.client.download_artifacts(recorder.id, "report/page0.html", str(tmp_path)),
        lambda: recorder.client.get_metric_history(recorder.id, "loss"),
        lambda: recorder.client.create_run("0"),
    )
    for number, read in enumerate(reads):
        with R.uri_context(proxy.uri), pytest.raises(Exception) as info:
            read()
        assert not isinstance(info.value, NotInStoreError | KeyError), number
        if number < 4:
            assert isinstance(info.value, TrackingError)
            assert "secret" not in str(info.value)


@pytest.mark.parametrize("mode", ["page", "half", "endless", "empty", "redirect"])
def test_download_that_is_no_artifact_fails(mode, server, proxy):
    with R.start(experiment_name="e", uri=proxy.uri):
        recorder = R.get_recorder()
        log_step(0)
    forward = proxy._send_forward

    def misbehave(request, body):
        is_download = "/mlflow-artifacts/artifacts/" in request.path
        (getattr(proxy, f"_send_{mode}") if is_download else forward)(request, body)

    proxy._send_forward = misbehave
    proxy.mode = "forward"
    for name in ("report/page0.html", "state.pkl"):
        if mode == "endless":
            threading.Timer(4, lambda: setattr(proxy, "mode", "silence")).start()
        with pytest.raises(TrackingError, match=r"could not fetch"):
            recorder.download_artifact(name, ".")


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_killed_process_leaves_no_finished_run_that_is_incomplete(
    seed, server, proxy, fork, tmp_path, monkeypatch
):
    monkeypatch.setenv("QTORCH_TRACKING_PATIENCE", "0.2")
    R.get_exp(experiment_name="killed")
    chance = random.Random(seed)
    start = tmp_path / "started"

    def job():
        with R.start(experiment_name="killed", uri=proxy.uri):
            start.write_text(R.get_recorder().id)
            for step in range(NUM_STEPS):
                log_step(step)

    for _ in range(3):
        start.unlink(missing_ok=True)
        proxy.mode = "forward"
        pid = fork(job)
        while not start.exists() or not start.read_text():
            time.sleep(0.01)
        run_id, end = start.read_text(), time.monotonic() + chance.uniform(0.0, 3.0)
        while time.monotonic() < end:
            proxy.mode = chance.choice(["forward", "forward", "silence", "page", "reset"])
            time.sleep(chance.uniform(0.0, 0.3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        proxy.mode = "forward"
        run = read_run(server, run_id)
        if run["status"] == "FINISHED":
            assert_complete(run)
        pid = fork(outbox.send_outbox)  # is killed too
        time.sleep(chance.uniform(0.0, 0.3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        run = read_run(server, run_id)
        if run["status"] == "FINISHED":
            assert_complete(run)
        assert not send_outbox()
        run = read_run(server, run_id)
        if run["status"] == "FINISHED":
            assert_complete(run)
        else:  # everything up to some step
            steps = [s for s, _ in run["metrics"].get("loss", [])]
            assert steps == list(range(len(steps)))
        assert outbox.outbox_files(run_id) == []


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_random_faults_leave_the_run_of_an_undisturbed_server(
    seed, server, proxy, monkeypatch, outbox_folder
):
    monkeypatch.setenv("QTORCH_TRACKING_PATIENCE", "0.5")
    chance = random.Random(1000 + seed)
    is_over = threading.Event()
    with R.start(experiment_name="random", uri=proxy.uri):
        recorder = R.get_recorder()
        recorder.flush()

        def disturb():
            while not is_over.wait(chance.uniform(0.0, 0.6)):
                proxy.mode = chance.choice(["forward", "forward", "forward", *Proxy.MODES])
                proxy.seconds = chance.choice([0.0, 0.0, 0.1])
                proxy.is_swallowing = chance.random() < 0.2

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            for step in range(NUM_STEPS):
                log_step(step)
                time.sleep(chance.uniform(0.0, 0.1))
        finally:
            if chance.random() < 0.5:
                is_over.set()
                thread.join()
    is_over.set()
    thread.join()
    run = read_run(server, recorder.id)
    if "FINISHED" in (recorder.status, run["status"]):
        assert_complete(run)
    proxy.mode, proxy.seconds, proxy.is_swallowing = "forward", 0.0, False
    assert not send_outbox()
    assert_complete(read_run(server, recorder.id))
    assert list(outbox_folder.iterdir()) == []


class CountingModel:
    """A model that writes a line to a file for each training, and waits for another file."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def fit(self, dataset, *, recorder):
        with Path(self.folder, "fits").open("a") as file:
            file.write(f"{recorder.id}\n")
        while not Path(self.folder, "go").exists():
            time.sleep(0.02)
        for step in range(3):
            log_step(step)


class NoData:
    """A dataset for a model that needs none."""


@pytest.fixture
def pool(tmp_path, proxy, monkeypatch):
    """A pool with one task, whose run is stored through the proxy."""
    monkeypatch.setenv("QTORCH_TRUSTED", "test_outages")
    manager = TaskManager("pool", lease=3.0)
    tracking = {"uri": proxy.uri, "experiment_name": "pool"}
    model = {"_target_": "test_outages.CountingModel", "folder": str(tmp_path)}
    data = {"_target_": "test_outages.NoData"}
    manager.create_task([{"model": model, "dataset": data, "tracking": tracking}])
    yield manager
    manager.close()


def run_pool(**options) -> None:
    run_task("qtorch.trainer.run.task_train", "pool", lease=3.0, **options)


def cut_connection(folder: Path, proxy: Proxy) -> str:
    """Let the proxy misbehave as soon as a model is trained; return the ID of its run."""
    end = time.monotonic() + 60
    while not (folder / "fits").exists() or not (folder / "fits").read_text().endswith("\n"):
        assert time.monotonic() < end, "the training did not start"
        time.sleep(0.02)
    proxy.mode = "page_but_healthy"
    (folder / "go").touch()
    return (folder / "fits").read_text().split()[-1]


def wait_for_status_in_outbox(run_id: str) -> None:
    end = time.monotonic() + 60
    while not any('{"status"' in p.read_text() for p in outbox.outbox_files(run_id)):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("force_release", [False, True])
def test_task_is_done_when_its_run_is_delivered(
    force_release, server, proxy, pool, tmp_path, session_fork_server
):
    statuses: list = []

    def disturb():
        run_id = cut_connection(tmp_path, proxy)
        wait_for_status_in_outbox(run_id)
        time.sleep(4)  # longer than the patience at the end of the run
        statuses.append(pool.task_stat())
        statuses.append(read_run(server, run_id)["status"])
        proxy.mode = "forward"

    thread = threading.Thread(target=disturb)
    thread.start()
    run_pool(force_release=force_release)
    thread.join()
    assert statuses == [{"running": 1}, "RUNNING"]
    (task,) = pool.query()
    assert (task["status"], task["res"].status, task["errors"]) == ("done", "FINISHED", 0)
    assert_contains_steps(read_run(server, task["res"].id), 3)


def assert_contains_steps(run: dict, num_steps: int) -> None:
    """Check the run of a task, which has further files and params."""
    expected = expected_run(num_steps)
    assert run["metrics"] == expected["metrics"]
    assert run["params"].items() >= expected["params"].items()
    assert run["tags"].items() >= expected["tags"].items()
    assert run["files"].keys() >= expected["files"].keys()


@pytest.mark.parametrize("is_outbox_shared", [True, False])
def test_task_of_a_dead_worker_is_finished_by_another(
    is_outbox_shared, server, proxy, pool, tmp_path, fork, monkeypatch
):
    pid = fork(run_pool)
    run_id = cut_connection(tmp_path, proxy)
    wait_for_status_in_outbox(run_id)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    proxy.mode = "forward"
    if not is_outbox_shared:
        monkeypatch.setenv("QTORCH_OUTBOX", str(tmp_path / "other"))
    run_pool(max_tasks=1, idle_timeout=30.0)
    (task,) = pool.query()
    assert (task["status"], task["res"].id, task["res"].status) == ("done", run_id, "FINISHED")
    assert_contains_steps(read_run(server, run_id), 3)
    num_fits = len((tmp_path / "fits").read_text().split())
    assert num_fits == (1 if is_outbox_shared else 2)  # else only the dead machine has the results
    if not is_outbox_shared:  # which later sends them too
        complete_run = read_run(server, run_id)
        assert not [r.error for r in outbox.send_outbox(folder=tmp_path / "outbox") if r.error]
        assert read_run(server, run_id) == complete_run
