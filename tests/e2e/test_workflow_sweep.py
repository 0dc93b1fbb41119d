"""Tests of `qtorch run -m WORKFLOW` with real processes that are killed."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import psutil
import pytest
from training_runs import metric_points

from qtorch.model.loop.module import ScoreModule
from qtorch.study import sweep_job

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_thread")]

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "qlib_workflows.py"
BEFORE_RUN, IN_TRAINING = "before the second job has a run", "in the second training"


def write_workflow(folder: Path) -> tuple[str, list[str]]:
    """Write a market and a workflow for it; return its path and the words of a short training."""
    spec = importlib.util.spec_from_file_location("qlib_workflows", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    workflows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(workflows)
    market = workflows.write_market(folder, num_instruments=12)
    paths = workflows.write_workflows(folder, market)
    path = next(p for p in paths if p.name.startswith("GRU-"))
    sizes = ["hidden_size=4", "num_layers=1", "n_epochs=3"]
    words = [*workflows.short_overrides(path.stem), *(f"++task.model.kwargs.{s}" for s in sizes)]
    return str(path), words


@pytest.fixture
def hold(folder, monkeypatch):
    """Return `hold(place)`: until the file `killed` exists, the job of seed 1 waits there."""
    train, start_epoch = sweep_job.task_train, ScoreModule.on_train_epoch_start
    seeds = []

    def wait_for_the_kill():
        while seeds[-1] == 1 and not (folder / "killed").exists():
            (folder / "held").touch()
            time.sleep(0.02)

    def train_after_the_kill(task, *arguments, **options):
        seeds.append(task["seed"])
        wait_for_the_kill()
        return train(task, *arguments, **options)

    def note_seed(task, *arguments, **options):
        seeds.append(task["seed"])
        return train(task, *arguments, **options)

    def start_epoch_after_the_kill(module):
        if module.current_epoch == 1:
            wait_for_the_kill()
        start_epoch(module)

    def hold_second_job(place: str) -> None:
        if place == BEFORE_RUN:
            monkeypatch.setattr(sweep_job, "task_train", train_after_the_kill)
            return
        monkeypatch.setattr(sweep_job, "task_train", note_seed)
        monkeypatch.setattr(ScoreModule, "on_train_epoch_start", start_epoch_after_the_kill)

    return hold_second_job


@pytest.mark.parametrize("place", [BEFORE_RUN, IN_TRAINING])
def test_killed_sweep_of_a_workflow_continues_with_the_same_command(
    start, qtorch_cli, runs, folder, hold, place
):
    path, words = write_workflow(folder)
    command = ("run", "-m", path, *words, "seed=0,1")
    hold(place)
    child = start(*command)
    end = time.monotonic() + 240
    while not (folder / "held").exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
    descendants = psutil.Process(child.pid).children(recursive=True)
    child.kill()  # the process of a job in training notices it
    for process in descendants if place == BEFORE_RUN else ():
        process.kill()
    child.communicate()
    (folder / "killed").touch()
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in descendants):
        time.sleep(0.05)

    def job_runs(experiment):
        jobs = [r for r in runs(experiment) if "qtorch.sweep" not in r.list_tags()]
        return {r.list_params()["seed"]: r for r in jobs}

    assert len(job_runs("benchmarks")) == (1 if place == BEFORE_RUN else 2)
    first_run = job_runs("benchmarks")["0"]
    assert first_run.status == "FINISHED"
    result = qtorch_cli(*command)
    assert result.code == 0, result.err
    sweeps = [r for r in runs("benchmarks") if "qtorch.sweep" in r.list_tags()]
    assert [r.status for r in sweeps] == ["FINISHED"]
    assert len(runs("benchmarks")) == 3
    finished_runs = job_runs("benchmarks")
    assert {r.status for r in finished_runs.values()} == {"FINISHED"}
    assert (finished_runs["0"].id, finished_runs["0"].end_time) == (
        first_run.id,
        first_run.end_time,
    )
    if place == IN_TRAINING:
        assert finished_runs["1"].load_object("fit_report")["resumed_from"] is not None

    assert qtorch_cli(*command, "experiment_name=undisturbed").code == 0
    database = folder / "mlruns" / "mlflow.db"
    for seed, run in job_runs("undisturbed").items():
        expected = metric_points(database, run.id)
        assert metric_points(database, finished_runs[seed].id) == expected
