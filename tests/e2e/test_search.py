"""Tests of `hydra/sweeper=optuna`: pruning, two processes, a kill, resuming."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from contextlib import closing

import pytest

from qtorch.process.lease import hold_claim
from qtorch.study.sweep import claim_path
from qtorch.tracking.recorder import running_recorders

pytest.importorskip("optuna")

SPACE = ("model.optimizer.lr=tag(log, interval(1e-5, 1e-1))", "model.network.hidden_size=2,4")
SEARCH = (
    "train", "-m", "debug=tiny", "log_level=ERROR", "hydra/sweeper=optuna", *SPACE,
    "model.network.num_layers=1", "trainer.max_epochs=3", "hydra.sweeper.n_trials=6",
    "hydra.sweeper.grace=8", "hydra.sweeper.pruner={_target_:optuna.pruners.MedianPruner,"
    "n_startup_trials:1}",
)  # fmt: skip
TIMEOUT = 180.0  # seconds, enough for a busy machine


def trials(folder) -> list[tuple[str, int]]:
    """Return state and number of the study's trials; an empty list if there is no study."""
    path = folder / "mlruns" / "mlflow-optuna.db"
    if not path.exists():
        return []
    with closing(sqlite3.connect(path, timeout=20)) as connection:
        try:
            return connection.execute("SELECT state, number FROM trials ORDER BY number").fetchall()
        except sqlite3.OperationalError:
            return []


def fork_command(*argv: str) -> int:
    """Run the command in a forked process, without import time; return its process ID."""
    from qtorch.cli.main import main

    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        code = main(argv)
    finally:
        os._exit(code)


@pytest.mark.slow
def test_two_processes_share_a_search_and_one_is_killed(
    session_fork_server, folder, qtorch_cli, runs
):
    import qtorch.cli.jobs.job
    import qtorch.study.search.study  # noqa: F401 - imported for the forked processes

    victim, survivor = fork_command(*SEARCH), fork_command(*SEARCH)
    end = time.monotonic() + TIMEOUT
    while sum(state == "COMPLETE" for state, _ in trials(folder)) < 2:
        assert time.monotonic() < end, trials(folder)
        time.sleep(0.05)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    _, code = os.waitpid(survivor, 0)
    assert os.waitstatus_to_exitcode(code) == 0
    result = qtorch_cli(*SEARCH)
    assert result.code == 0, result.err
    states = [state for state, _ in trials(folder)]
    num_ended = states.count("COMPLETE") + states.count("PRUNED")
    assert (num_ended, states.count("RUNNING"), states.count("WAITING")) == (6, 0, 0), states
    assert states.count("FAIL") <= 1  # the trial of the killed process, which was repeated
    assert "already has 6 trials" in result.err
    assert "best: trial" in result.out
    assert list(folder.glob("outputs/*/*/search.png"))
    finished_runs = [r for r in runs() if r.status == "FINISHED"]
    trial_tags = [r.list_tags().get("qtorch.trial") for r in finished_runs]
    assert len(set(trial_tags) - {None}) == 6
    pruned_runs = [r for r in finished_runs if "pruned" in r.list_tags()]
    assert len(pruned_runs) == states.count("PRUNED")


@pytest.mark.slow
def test_resumed_search_retries_failed_trials_once_their_job_is_free(
    session_fork_server, folder, qtorch_cli, runs, monkeypatch
):
    (folder / "fragile.py").write_text(
        "from pathlib import Path\nfrom qtorch.nn import LSTM\n\n\nclass Fragile(LSTM):\n"
        "    def __init__(self, d_feat, hidden_size, num_layers=1, dropout=0.0):\n"
        "        assert Path('fixed').exists(), 'not fixed yet'\n"
        "        super().__init__(d_feat, hidden_size, num_layers)\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("QTORCH_TRUSTED", "fragile")
    result = qtorch_cli(
        "train", "-m", "debug=tiny", "log_level=ERROR", "hydra/sweeper=optuna", SPACE[1],
        "hydra.sweeper.n_trials=1", "model.network._target_=fragile.Fragile",
    )  # fmt: skip
    assert result.code == 1
    assert trials(folder) == [("FAIL", 0)]
    (failed_run,) = (r for r in runs() if "qtorch.task_id" in r.list_tags())
    (name,) = (tags["qtorch.sweep"] for r in runs() if "qtorch.sweep" in (tags := r.list_tags()))
    tags = failed_run.list_tags()
    (key,) = (tag for tag in tags if tag.startswith("qtorch.job."))

    (folder / "fixed").touch()
    # The job of a killed search may still hold the claim.
    with hold_claim(claim_path(failed_run.experiment_id, tags)):
        resume_pid = fork_command("sweep", "resume", name, "retry=true")
        end = time.monotonic() + TIMEOUT
        # Wait until the second attempt has added its number to the tag.
        while failed_run.list_tags()[key] == tags[key]:
            assert time.monotonic() < end
            time.sleep(0.5)
    _, code = os.waitpid(resume_pid, 0)
    assert os.waitstatus_to_exitcode(code) == 0
    assert trials(folder) == [("FAIL", 0), ("COMPLETE", 1)]
    (retried_run,) = (r for r in runs() if "qtorch.task_id" in r.list_tags())
    assert (retried_run.id, retried_run.status) == (failed_run.id, "FINISHED")
    result = qtorch_cli("sweep", "resume", name)
    assert result.code == 0, result.err
    assert "already has 1 trial" in result.err
    assert "failed, retried" in result.out


@pytest.mark.slow
def test_ctrl_c_with_a_parallel_launcher_requeues_the_trials(folder):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    child = fork_command(*SEARCH, "hydra/launcher=joblib", "hydra.sweeper.n_jobs=2")
    end = time.monotonic() + TIMEOUT
    while [state for state, _ in trials(folder)] != ["RUNNING"] * 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(child, signal.SIGINT)
    _, code = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(code) == 130
    assert [state for state, _ in trials(folder)] == ["FAIL"] * 2 + ["WAITING"] * 2


@pytest.mark.slow
def test_search_without_a_space_or_with_a_wrong_option(qtorch_cli, runs):
    result = qtorch_cli("train", "-m", "hydra/sweeper=optuna", "debug=tiny")
    assert "the search has no space" in result.error()
    result = qtorch_cli(
        "train", "-m", "hydra/sweeper=optuna", "hydra.sweeper.smapler=tpe", "seed=0,1"
    )
    assert "Did you mean 'sampler'" in result.error()
    assert [r.status for r in runs()] == ["FAILED"]  # the search itself; no trial has started
    assert not running_recorders()
