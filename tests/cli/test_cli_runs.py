"""Tests of `qtorch runs`."""

from __future__ import annotations

import pytest

from qtorch import R
from qtorch.cli.main import main


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
