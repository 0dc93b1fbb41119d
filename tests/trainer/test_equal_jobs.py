"""Two jobs of a sweep that are the same task: one is trained, and both are jobs of its run."""

from __future__ import annotations

import pytest

from qtorch import R
from qtorch.cli.jobs.repeats import connect_repeats, failure_texts, store_repeats
from qtorch.cli.jobs.work import apply_outcome
from qtorch.cli.tables.jobs import job_counts_text, print_sweep
from qtorch.study.sweep import JobResult, add_repeats, end_sweep, start_sweep, sweep_jobs
from qtorch.study.sweep_job import SweepMember, run_sweep_job
from qtorch.tracking.claims import hold_run


@pytest.fixture
def sweep_id() -> str:
    return str(start_sweep("equal", "exp", ["x=1,2"], overrides=["x=1,2"], count=2).id)


def run_job(task, sweep_id: str, number: int) -> JobResult:
    outcome = run_sweep_job(task, SweepMember(sweep_id, number, ("x=1",)), "exp")
    result = JobResult(number, ["x=1"], "FAILED", run_id=str(outcome.recorder.id))
    apply_outcome(result, outcome)
    return result


def test_second_job_has_the_result_of_the_first(sweep_id, make_task, capsys):
    for _ in range(2):  # the command, and the same command again
        results = [run_job(make_task(), sweep_id, number) for number in (0, 1)]
        connect_repeats(results)
        store_repeats(sweep_id, results)
        assert [r.same_as for r in results] == [None, 0]
        assert [(r.status, r.error) for r in results] == [("FINISHED", None)] * 2
        (job,) = sweep_jobs(sweep_id)  # statistics and the best job count the task once
        assert (job.number, job.run_id) == (0, results[0].run_id)
        rows = add_repeats([job])
        assert [(r.number, r.same_as) for r in rows] == [(0, None), (1, 0)]
        assert rows[1].metrics == job.metrics != {}
    assert job_counts_text(rows, 2) == "2 jobs, all finished"
    print_sweep("equal", [job], 2)
    output = capsys.readouterr().out
    assert "FINISHED (same as job 0)" in output
    assert "not started" not in output
    end_sweep(R.get_recorder(recorder_id=sweep_id))
    assert R.get_recorder(recorder_id=sweep_id).status == "FINISHED"


def test_job_does_not_fail_because_an_equal_one_is_at_work(sweep_id, make_task):
    first = run_job(make_task(), sweep_id, 0)
    R.get_recorder(recorder_id=first.run_id).end_run("KILLED")
    with hold_run(str(first.run_id), R.get_uri()):
        second, third = (run_job(make_task(), sweep_id, number) for number in (1, 2))
    assert second.error == third.error == "another process is working on it."
    connect_repeats([second, third])  # a process of another command does the work
    assert second.error == third.error == "another process is working on it."
    connect_repeats([first, second])
    assert (second.same_as, second.error) == (0, None)


def test_equal_jobs_that_fail_are_named_in_one_error(sweep_id, make_task):
    task = make_task(fail="error")
    results = []
    for number in range(3):
        try:
            results.append(run_job(task, sweep_id, number))
        except ValueError as error:
            run_id = results[0].run_id if results else R.list_recorders(experiment_name="exp")
            assert not results
            (run_id,) = [k for k in run_id if k != sweep_id]
            results.append(JobResult(number, ["x=1"], "FAILED", run_id=run_id, error=str(error)))
    results.append(JobResult(3, ["x=3"], "FAILED", error="another one"))
    connect_repeats(results)
    first = f"jobs 0, 1, 2 (the same task): {results[0].error}"
    assert failure_texts(results) == [first, "job 3: another one"]
    assert "failed before" not in first
    connect_repeats(results[1:])  # the same command again
    assert failure_texts(results[1:3]) == [f"jobs 1, 2 (the same task): {results[1].error}"]
    assert "failed before; set sweep.retry=true" in str(results[1].error)
