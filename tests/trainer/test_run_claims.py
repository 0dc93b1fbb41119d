"""Two processes that work on one run: the second one is refused and changes nothing in the run."""

from __future__ import annotations

import json
import os
import signal
import socket
import time

import pytest
from forked_process import ForkedProcess

from qtorch import R
from qtorch.core.errors import RunHeldError, TrackingError
from qtorch.process import lease
from qtorch.study.sweep import start_sweep, sweep_jobs
from qtorch.study.sweep_job import ELSEWHERE, SweepMember, run_sweep_job
from qtorch.task import TaskManager
from qtorch.tracking import Recorder
from qtorch.tracking.claims import hold_run, is_run_held
from qtorch.trainer import begin_task_train, end_task_train, task_train
from qtorch.trainer.pooled import DelayTrainerRM
from qtorch.trainer.subprocess_tasks import fail_run
from qtorch.trainer.trainers import DelayTrainerR

pytestmark = pytest.mark.slow


@pytest.fixture
def waiting_task(make_task, tmp_path):
    """A task whose training waits for the file `fits.go`; it writes a line into `fits`."""
    return make_task(fail="wait", log=str(tmp_path / "fits"), record=[])


@pytest.fixture
def start_holder(tmp_path):
    """Return `start_holder(work)`: a process that trains a `waiting_task`, once it does so."""
    processes = []

    def start(work) -> ForkedProcess:
        processes.append(ForkedProcess(lambda: work() and 0))
        end = time.monotonic() + 60
        while not (tmp_path / "fits").exists():
            assert processes[-1].poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait(10)


def state(run_id):
    run = R.get_recorder(recorder_id=run_id)
    return run.status, run.list_tags(), sorted(run.list_artifacts()), run.list_params()


def load(run) -> Recorder:
    return R.get_recorder(recorder_id=run.id)


SECOND_CALLS = {
    "end_task_train": lambda run, task: end_task_train(load(run)),
    "task_train": lambda run, task: task_train(task, run={"recorder_id": run.id}),
    "trainer": lambda run, task: DelayTrainerR("exp").end_train([load(run)]),
    "trainer with processes": lambda run, task: DelayTrainerR(
        "exp", call_in_subproc=True
    ).end_train([load(run)]),
}


@pytest.mark.parametrize(
    "call",
    [c if "proc" not in c else pytest.param(c, marks=pytest.mark.slow) for c in SECOND_CALLS],
)
def test_second_process_is_told_the_holder_and_changes_nothing(
    call, waiting_task, start_holder, tmp_path
):
    (run,) = DelayTrainerR("exp").train([waiting_task])
    holder = start_holder(lambda: end_task_train(load(run)))
    before = state(run.id)
    assert before[0] == "RUNNING"
    text = f"process {holder.pid} on {socket.gethostname()} .since {time.strftime('%Y-%m-%d')}"
    with pytest.raises(RunHeldError, match=text):
        SECOND_CALLS[call](run, waiting_task)
    assert state(run.id) == before
    (tmp_path / "fits.go").touch()
    assert holder.wait(60) == 0
    assert load(run).status == "FINISHED"
    assert len((tmp_path / "fits").read_text().splitlines()) == 1


def test_new_run_is_held_from_its_start(waiting_task, start_holder, tmp_path):
    holder = start_holder(lambda: task_train(waiting_task, "exp"))
    (run,) = R.list_recorders(experiment_name="exp").values()
    with pytest.raises(RunHeldError, match=f"process {holder.pid}"):
        end_task_train(run)
    (tmp_path / "fits.go").touch()
    assert holder.wait(60) == 0
    assert not is_run_held(run.id, R.get_uri())


def test_run_of_a_killed_process_is_resumed_at_once(waiting_task, start_holder, tmp_path):
    run = begin_task_train(waiting_task, "exp")
    holder = start_holder(lambda: end_task_train(load(run)))
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(10)
    (tmp_path / "fits.go").touch()
    begin = time.monotonic()
    assert end_task_train(load(run)).status == "FINISHED"
    assert time.monotonic() - begin < 20


def write_remote_claim(run, seconds_old):
    """Write the claim of a process on another machine, touched that many seconds ago."""
    with hold_run(run.id, R.get_uri()):
        (path,) = [p for p in lease_files() if run.id in p.name]
        claim = json.loads(path.read_text())
    path.write_text(json.dumps({**claim, "machine": "node7 boot pid", "process": [12, "1"]}))
    touched = time.time() - seconds_old
    os.utime(path, (touched, touched))


def lease_files():
    from qtorch.tracking.locations import claims_folder

    return claims_folder(R.get_uri()).glob("run-*.json")


def test_holder_on_another_machine_is_waited_for_until_its_lease_ends(make_task, monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.02)
    run = begin_task_train(make_task(record=[]), "exp")
    write_remote_claim(run, 0.5)
    begin = time.monotonic()
    assert end_task_train(load(run)).status == "FINISHED"
    assert time.monotonic() - begin > 0.2


def test_run_that_another_process_finishes_meanwhile_is_not_trained_again(make_task):
    run = begin_task_train(make_task(record=[]), "exp")
    stale_recorder = load(run)
    end_task_train(load(run))
    before = state(run.id)
    with pytest.raises(TrackingError, match=r"has finished run .* in the meantime"):
        end_task_train(stale_recorder)
    assert state(run.id) == before


def test_deleted_run_of_an_earlier_attempt_is_replaced_by_a_new_one(make_task):
    task = make_task(record=[])
    run = begin_task_train(task, "exp")
    R.get_exp(experiment_name="exp").delete_recorder(recorder_id=run.id)
    new_run = task_train(task, "exp", run={"recorder_id": run.id})
    assert (new_run.status, new_run.id != run.id) == ("FINISHED", True)


def test_sweep_leaves_a_run_to_the_process_that_resumes_it(waiting_task, start_holder, tmp_path):
    sweep_id = start_sweep("s", "exp", ["seed=3"], overrides=["seed=3"]).id
    member = SweepMember(sweep_id, 0, ("seed=3",))
    killed_job = start_holder(lambda: run_sweep_job(waiting_task, member, "exp"))
    killed_job.kill()
    killed_job.wait(10)
    (job,) = sweep_jobs(sweep_id)
    assert (job.status, job.note) == ("KILLED", "its process is gone")
    (tmp_path / "fits").unlink()
    start_holder(lambda: end_task_train(R.get_recorder(recorder_id=job.run_id)))
    before = state(job.run_id)
    outcome = run_sweep_job(waiting_task, member, "exp")
    assert (outcome.action, outcome.recorder.id) == (ELSEWHERE, job.run_id)
    assert state(job.run_id) == before
    assert [j.status for j in sweep_jobs(sweep_id)] == ["RUNNING"]


def test_resume_is_refused_while_a_sweep_works_on_the_run(waiting_task, start_holder):
    sweep_id = start_sweep("s", "exp", ["seed=3"], overrides=["seed=3"]).id
    member = SweepMember(sweep_id, 0, ("seed=3",))
    start_holder(lambda: run_sweep_job(waiting_task, member, "exp"))
    (job,) = sweep_jobs(sweep_id)
    before = state(job.run_id)
    with pytest.raises(RunHeldError):
        end_task_train(R.get_recorder(recorder_id=job.run_id))
    assert state(job.run_id) == before


def test_pool_task_whose_run_is_held_fails_without_a_change_of_the_run(
    waiting_task, start_holder, tmp_path
):
    trainer = DelayTrainerRM("exp", "pool", url=f"sqlite:///{tmp_path}/tasks.db")
    (run,) = trainer.train([waiting_task])
    start_holder(lambda: end_task_train(load(run)))
    before = state(run.id)
    (result,) = trainer.end_train([load(run)])
    (task,) = TaskManager("pool", trainer.url).query(decode=False)
    assert (task["status"], task["errors"]) == ("failed", 3)
    assert "is in use" in task["error"]
    assert (result.id, result.status) == (run.id, "RUNNING")
    load(run).set_tags(train_status=before[1]["train_status"])  # the trainer's own mark of its end
    assert state(run.id) == before


def test_lost_process_does_not_fail_a_run_that_another_one_has_resumed(waiting_task, start_holder):
    run = begin_task_train(waiting_task, "exp")
    start_holder(lambda: end_task_train(load(run)))
    before = state(run.id)
    fail_run(load(run), "its process died")
    assert state(run.id) == before
