"""Tests of `qtorch runs`."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from forked_process import ForkedProcess

from qtorch import R
from qtorch.cli.main import main
from qtorch.study.sweep import JOB_TAG, SWEEP_TAG
from qtorch.tracking.claims import hold_run, share_run
from qtorch.tracking.locations import claims_folder
from qtorch.tracking.recorder import remove_running


@pytest.fixture(autouse=True)
def ids(tmp_path, monkeypatch) -> list[str]:
    """The IDs of a finished and a failed run in the store of the working folder."""
    monkeypatch.chdir(tmp_path)
    run_ids = []
    for name, status in (("lstm", "FINISHED"), ("gru", "FAILED")):
        R.start_exp(experiment_name="mine", recorder_name=name)
        recorder = R.get_recorder()
        recorder.log_params(seed=len(name))
        recorder.log_batch({"test.IC": 0.0123, "train.IC": 0.5})
        recorder.end_run(status)
        run_ids.append(str(recorder.id))
    return run_ids


def run(capsys, *words) -> str:
    code = main(["runs", *words])
    output = capsys.readouterr()
    return output.out if code == 0 else f"exit code {code}: {output.err}"


def test_runs_are_listed_the_newest_first(ids, capsys):
    table = run(capsys)
    assert table.index(ids[1][:12]) < table.index(ids[0][:12])
    assert "0.0123" in table
    assert "mine" in table


def test_runs_are_filtered_and_columns_chosen(ids, capsys):
    table = run(capsys, "status=failed", "columns=seed, train.IC")
    assert ids[0][:12] not in table
    assert ids[1][:12] in table
    assert "0.5000" in table
    assert "│" not in table
    assert ids[1][:12] not in run(capsys, 'filter=params.seed = "4"')
    assert run(capsys, "limit=1").count("mine") == 1


@pytest.fixture
def orphan_run(ids) -> str:
    """The ID of a run that is RUNNING in the store, whose process was killed."""
    R.start_exp(experiment_name="mine", recorder_name="lost")
    recorder = R.get_recorder()
    run_id = str(recorder.id)
    recorder.set_tags(hostname="here")  # as the run of a task has it
    recorder.flush()
    remove_running(recorder)
    assert recorder._deactivate is not None
    recorder._deactivate()  # it is not MLflow's active run either
    with hold_run(run_id, R.get_uri()):
        (path,) = claims_folder(R.get_uri()).glob(f"run-{run_id}.json")
        claim = json.loads(path.read_text())
    # No process starts one tick after the machine.
    path.write_text(json.dumps({**claim, "process": [os.getpid(), "1"]}))
    return run_id


def test_run_whose_process_is_gone_counts_as_killed(orphan_run, ids, capsys):
    table = run(capsys)
    assert "KILLED (its process is gone)" in table
    assert f"resume run {orphan_run[:12]}: qtorch train resume={orphan_run}" in table
    assert orphan_run[:12] in run(capsys, "status=killed", "limit=1")
    assert orphan_run[:12] not in run(capsys, "status=running")
    assert R.get_recorder(recorder_id=orphan_run).status == "RUNNING"  # the store is only read


def test_run_is_running_as_long_as_its_process_may_live(orphan_run, capsys):
    (path,) = claims_folder(R.get_uri()).glob(f"run-{orphan_run}.json")
    claim = {**json.loads(path.read_text()), "machine": "node7 boot pid"}
    path.write_text(json.dumps(claim))  # touched now, by another machine
    assert orphan_run[:12] in run(capsys, "status=running")
    assert "resume" not in run(capsys)
    os.utime(path, (0, 0))
    assert "KILLED (its process is gone)" in run(capsys)
    path.unlink()  # nobody knows of a process
    assert "RUNNING" in run(capsys)
    assert "KILLED" not in run(capsys)


def test_lost_job_of_a_sweep_is_resumed_with_its_sweep(orphan_run, capsys):
    R.get_recorder(recorder_id=orphan_run).set_tags(**{f"{JOB_TAG}abc": "{}"})
    assert f"resume run {orphan_run[:12]}: qtorch sweep resume abc" in run(capsys)


def wait_in_run(write_end: int, tag: str, param: str) -> None:
    """Wait in a run until the process is killed."""
    with R.start(experiment_name="mine"):
        recorder = R.get_recorder()
        recorder.set_tags(**{tag: "name"})
        recorder.log_params(**{param: 1})
        recorder.flush()
        os.write(write_end, str(recorder.id).encode())
        time.sleep(600)


@pytest.mark.parametrize(
    ("tag", "param", "hint"),
    [
        (SWEEP_TAG, "p", "qtorch sweep resume {id}"),
        ("t", "rolling.step", "start its rolling study again"),
        ("t", "p", "R.start(recorder_id='{id}', resume=True)"),
    ],
    ids=["sweep", "rolling", "program"],
)
def test_run_of_any_killed_process_counts_as_killed(capsys, tag, param, hint):
    read_end, write_end = os.pipe()
    process = ForkedProcess(lambda: wait_in_run(write_end, tag, param))
    os.close(write_end)  # so that reading ends if the process fails
    run_id = os.read(read_end, 32).decode()
    assert "KILLED" not in run(capsys)
    assert run_id[:12] in run(capsys, "status=running")
    process.kill()
    process.wait(10)
    table = run(capsys)
    assert "KILLED (its process is gone)" in table
    assert f"resume run {run_id[:12]}: {hint.format(id=run_id)}" in table
    with R.start(experiment_name="mine", recorder_id=run_id, resume=True):
        assert "KILLED" not in run(capsys)
        assert len(list(claims_folder(R.get_uri()).glob(f"run-{run_id}*.json"))) == 1
    assert "KILLED" not in run(capsys)
    assert not list(claims_folder(R.get_uri()).glob(f"run-{run_id}*.json"))


def test_run_is_alive_as_long_as_one_of_its_processes(capsys):
    with R.start(experiment_name="mine"):
        run_id = str(R.get_recorder().id)
        process = ForkedProcess(lambda: share_and_die(run_id))
        process.wait(10)
        assert len(list(claims_folder(R.get_uri()).glob(f"run-{run_id}*.json"))) == 2
        assert "KILLED" not in run(capsys)


def share_and_die(run_id: str) -> None:
    with share_run(run_id, R.get_uri()):
        os.kill(os.getpid(), signal.SIGKILL)


def test_wrong_options_are_refused(capsys):
    assert "Did you mean 'FINISHED'" in run(capsys, "status=finish")
    assert "Did you mean 'mine'" in run(capsys, "experiment=mone")
    assert "Did you mean 'columns'" in run(capsys, "column=seed")


def test_empty_folder_gets_no_store(tmp_path, monkeypatch, capsys):
    folder = tmp_path.parent / "empty"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    assert "there is no tracking store" in run(capsys)
    assert not list(folder.iterdir())
