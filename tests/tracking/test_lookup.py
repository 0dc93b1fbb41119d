"""How users name stores and runs: the folder above, `latest`, the first digits, a name."""

from __future__ import annotations

import pytest

from qtorch import R, init
from qtorch.tracking.lookup import select_run, select_store
from qtorch.tracking.store_types import NotInStoreError


def add_run(name, experiment="e", fails=False) -> str:
    recorder = R.start_exp(experiment_name=experiment, recorder_name=name) and R.get_recorder()
    recorder.end_run("FAILED" if fails else "FINISHED")
    return str(recorder.id)


def test_run_is_selected_by_id_first_digits_name_or_as_the_latest():
    first = add_run("lstm")
    second = add_run("lstm", experiment="other")
    failed = add_run("gru", fails=True)
    assert select_run(first).id == first
    assert select_run("lstm").id == second
    assert select_run("gru").id == select_run("latest").id == failed
    assert select_run("latest", status="FINISHED").id == second
    shortest = next(k for k in range(4, 32) if first[:k] not in (second[:k], failed[:k]))
    assert select_run(first[:shortest]).id == first


def test_tagged_runs_are_not_the_latest():
    first = add_run("lstm")
    with R.start(experiment_name="e"):
        R.set_tags(kind="sweep")
    assert select_run("latest", without_tags=["kind"]).id == first


def test_unknown_and_ambiguous_names_are_refused(monkeypatch):
    run_id = add_run("lstm")
    with pytest.raises(NotInStoreError, match=rf"no run 'lstn' .*mlflow\.db\. Newest .*{run_id}"):
        select_run("lstn")
    with pytest.raises(NotInStoreError, match="no run that is KILLED"):
        select_run("latest", status="KILLED")
    rows = R._store().runs([R.get_exp(experiment_name="e").id]) * 2
    monkeypatch.setattr("qtorch.tracking.lookup.list_runs", lambda: rows)
    with pytest.raises(NotInStoreError, match=r"several runs begin with .*Give more digits"):
        select_run(run_id[:6])


def test_store_of_the_nearest_folder_above_is_used(tmp_path, monkeypatch):
    run_id = add_run("lstm")
    folder = tmp_path / "notebooks" / "deep"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert select_run("latest").id == run_id
    assert list(folder.iterdir()) == []


def test_missing_store_is_named_and_not_created(tmp_path):
    with pytest.raises(NotInStoreError, match=f"no tracking store in {tmp_path}"):
        select_store()
    init(tracking_uri="sqlite:///other.db")
    with pytest.raises(NotInStoreError, match=rf"no tracking store {tmp_path}/other\.db"):
        select_store()
    assert list(tmp_path.iterdir()) == []
