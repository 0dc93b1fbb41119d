"""`hydra/sweeper=optuna` as a user runs it: pruning, two processes, a kill, and the same again."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from contextlib import closing

import pytest

from qtorch.study.claim import claimed
from qtorch.study.sweep import claim_path
from qtorch.tracking.current import all_running

pytest.importorskip("optuna")

SPACE = ("model.optimizer.lr=tag(log, interval(1e-5, 1e-1))", "model.network.hidden_size=2,4")
SEARCH = (
    "train", "-m", "debug=tiny", "log_level=ERROR", "hydra/sweeper=optuna", *SPACE,
    "model.network.num_layers=1", "trainer.max_epochs=3", "hydra.sweeper.n_trials=6",
    "hydra.sweeper.grace=8", "hydra.sweeper.pruner={_target_:optuna.pruners.MedianPruner,"
    "n_startup_trials:1}",
)  # fmt: skip
PATIENCE = 180.0  # seconds, of a machine with much to do


def trials(folder) -> list[tuple[str, int]]:
    """State and number of the study's trials; none while there is no study."""
    path = folder / "mlruns" / "mlflow-optuna.db"
    if not path.exists():
        return []
    with closing(sqlite3.connect(path, timeout=20)) as connection:
        try:
            return connection.execute("SELECT state, number FROM trials ORDER BY number").fetchall()
        except sqlite3.OperationalError:
            return []


def forked(*argv: str) -> int:
    """The command in a process of its own, its imports done."""
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
def test_two_processes_search_together_and_a_killed_one_loses_nothing(
    warm, folder, qtorch_cli, runs
):
    import qtorch.cli.job
    import qtorch.tracking.trials.study  # noqa: F401 - the imports of the forked processes

    victim, other = forked(*SEARCH), forked(*SEARCH)
    end = time.monotonic() + PATIENCE
    while sum(state == "COMPLETE" for state, _ in trials(folder)) < 2:
        assert time.monotonic() < end, trials(folder)
        time.sleep(0.05)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    _, code = os.waitpid(other, 0)
    assert os.waitstatus_to_exitcode(code) == 0
    told = qtorch_cli(*SEARCH)
    assert told.code == 0, told.err
    states = [state for state, _ in trials(folder)]
    good = states.count("COMPLETE") + states.count("PRUNED")
    assert (good, states.count("RUNNING"), states.count("WAITING")) == (6, 0, 0), states
    assert states.count("FAIL") <= 1  # the killed one's trial, which was run again
    assert "has 6 trials already" in told.err
    assert "best: trial" in told.out
    assert list(folder.glob("outputs/*/*/search.png"))
    finished = [r for r in runs() if r.status == "FINISHED"]
    tagged = [r.list_tags().get("qtorch.trial") for r in finished]
    assert len(set(tagged) - {None}) == 6
    pruned = [r for r in finished if "pruned" in r.list_tags()]
    assert len(pruned) == states.count("PRUNED")


@pytest.mark.slow
def test_a_search_goes_on_in_its_study_and_what_failed_is_tried_again_once_its_job_is_free(
    warm, folder, qtorch_cli, runs, monkeypatch
):
    (folder / "fragile.py").write_text(
        "from pathlib import Path\nfrom qtorch.nn import LSTM\n\n\nclass Fragile(LSTM):\n"
        "    def __init__(self, d_feat, hidden_size, num_layers=1, dropout=0.0):\n"
        "        assert Path('mended').exists(), 'not yet'\n"
        "        super().__init__(d_feat, hidden_size, num_layers)\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("QTORCH_TRUSTED", "fragile")
    told = qtorch_cli(
        "train", "-m", "debug=tiny", "log_level=ERROR", "hydra/sweeper=optuna", SPACE[1],
        "hydra.sweeper.n_trials=1", "model.network._target_=fragile.Fragile",
    )  # fmt: skip
    assert told.code == 1
    assert trials(folder) == [("FAIL", 0)]
    (failed,) = (r for r in runs() if "qtorch.task_id" in r.list_tags())
    (name,) = (tags["qtorch.sweep"] for r in runs() if "qtorch.sweep" in (tags := r.list_tags()))
    tags = failed.list_tags()
    (key,) = (tag for tag in tags if tag.startswith("qtorch.job."))

    (folder / "mended").touch()
    with claimed(claim_path(failed.experiment_id, tags)):  # as a killed search's own job may
        resumed = forked("sweep", "resume", name, "retry=true")
        end = time.monotonic() + PATIENCE
        while failed.list_tags()[key] == tags[key]:  # until a second attempt has its number there
            assert time.monotonic() < end
            time.sleep(0.5)
    _, code = os.waitpid(resumed, 0)
    assert os.waitstatus_to_exitcode(code) == 0
    assert trials(folder) == [("FAIL", 0), ("COMPLETE", 1)]
    (again,) = (r for r in runs() if "qtorch.task_id" in r.list_tags())
    assert (again.id, again.status) == (failed.id, "FINISHED")
    told = qtorch_cli("sweep", "resume", name)
    assert told.code == 0, told.err
    assert "has 1 trial already" in told.err
    assert "failed, tried again" in told.out


@pytest.mark.slow
def test_ctrl_c_under_a_launcher_of_several_processes_leaves_the_trials_to_be_run(folder):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    child = forked(*SEARCH, "hydra/launcher=joblib", "hydra.sweeper.n_jobs=2")
    end = time.monotonic() + PATIENCE
    while [state for state, _ in trials(folder)] != ["RUNNING"] * 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(child, signal.SIGINT)
    _, code = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(code) == 130
    assert [state for state, _ in trials(folder)] == ["FAIL"] * 2 + ["WAITING"] * 2


@pytest.mark.slow
def test_a_search_without_a_space_or_with_a_wrong_metric_is_told(qtorch_cli, runs):
    told = qtorch_cli("train", "-m", "hydra/sweeper=optuna", "debug=tiny")
    assert "the search has no space" in told.error()
    told = qtorch_cli(
        "train", "-m", "hydra/sweeper=optuna", "hydra.sweeper.smapler=tpe", "seed=0,1"
    )
    assert "Did you mean 'sampler'" in told.error()
    assert [r.status for r in runs()] == ["FAILED"]  # the search itself: no trial began
    assert not all_running()
