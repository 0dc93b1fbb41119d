"""Runs are reused and resumed only while the data, the user's code and qtorch stay the same."""

from __future__ import annotations

import importlib
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import qtorch
from qtorch.core.errors import DataError
from qtorch.core.source_files import package_digest
from qtorch.data import SyntheticSource, TableSource, write_qlib
from qtorch.data.handler.loader import StaticDataLoader
from qtorch.study.sweep_job import (
    FAILED_BEFORE,
    FIT_TAG,
    RECORDS_ONLY,
    RESUMED,
    SKIPPED,
    TRAINED,
    SweepMember,
    find_finished_job,
    run_sweep_job,
)
from qtorch.tracking.manager import R
from qtorch.trainer.pooled import TrainerRM
from qtorch.trainer.provenance import DATA_TAG, SOURCES_TAG, RunInputs, collect_inputs
from qtorch.trainer.run import begin_task_train, end_task_train, task_train

pytestmark = pytest.mark.slow

MEMBER = SweepMember("the-sweep", 0, ("seed=1",))
MODEL_SOURCE = """
import os
from pathlib import Path
from own_factor import FACTOR
from qtorch.model.base import Model as Base

class Model(Base):
    def __init__(self, write=None, stop=None, write_late=None):
        self.write, self.stop, self.write_late = write, stop, write_late

    def fit(self, dataset, *, recorder=None):
        mean = float(dataset.prepare("train", col_set="feature").mean().mean())
        recorder.log_metrics(mean=mean * FACTOR)
        if self.write and Path(self.write).exists():
            change(self.write)
        if self.stop and Path(self.stop).exists():
            raise KeyboardInterrupt

    def predict(self, dataset, segment="test"):
        scores = dataset.prepare(segment, col_set="feature").iloc[:, 0]
        if self.write_late:
            change(self.write_late)
        return scores

def change(path):
    stat, content = os.stat(path), bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(path).write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
"""


@pytest.fixture
def user_code(store, tmp_path, monkeypatch):
    """A function that writes the user's modules `own_model` and `own_factor`."""
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    qtorch.init(trusted=["own_model"], trusted_pickle=True)

    def forget() -> None:
        for name in ("own_model", "own_factor"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()

    def write(factor: float = 1.0) -> None:
        (folder / "own_model.py").write_text(MODEL_SOURCE)
        (folder / "own_factor.py").write_text(f"FACTOR = {factor}\n")
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
        forget()

    write()
    yield write
    forget()


@pytest.fixture(params=["csv", "qlib", "parquet"])
def data(request, tmp_path) -> Data:
    return Data(request.param, tmp_path / "data")


class Data:
    """Bars in a CSV file, in Qlib's layout, or in a parquet file of a StaticDataLoader."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        folder.mkdir()
        source = SyntheticSource(4, "2020-01-01", "2020-03-31", num_sectors=2)
        self.frame = source.load(["close", "open"], instruments="stocks").to_frame()
        if kind == "qlib":
            self.path = write_qlib(source, folder / "market")
            self.file = self.path / "features" / "s1" / "close.day.bin"
        else:
            self.path = self.file = folder / f"bars.{kind}"
            self._write(self.frame)

    def _write(self, frame: pd.DataFrame) -> None:
        if self.kind == "csv":
            frame.reset_index().to_csv(self.file, index=False)
        else:
            frame.to_parquet(self.file)

    def change(self) -> None:
        """Change one value; the file of Qlib keeps its size and modification time."""
        if self.kind == "qlib":
            stat, values = self.file.stat(), np.fromfile(self.file, dtype="<f4")
            values[5] *= 1.5
            values.tofile(self.file)
            os.utime(self.file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        else:
            self.frame.iloc[5, 0] *= 1.5
            self._write(self.frame)

    def task(self, **options) -> dict:
        path = str(self.path)
        handler = {"_target_": "qtorch.data.DataHandlerLP", "instruments": "all"}
        fields = {"feature": ["$close"], "label": ["Ref($close, -1)/$close - 1"]}
        loader = {"_target_": "qtorch.data.QlibDataLoader", "config": fields}
        if self.kind == "parquet":
            config = {"feature": path}
            loader = {"_target_": "qtorch.data.StaticDataLoader", "config": config}
        elif self.kind == "csv":
            handler["source"] = {"_target_": "qtorch.data.TableSource", "path": path}
        else:
            handler["source"] = {"_target_": "qtorch.data.QlibSource", "provider_uri": path}
        segments = {"train": ["2020-01-01", "2020-02-28"], "test": ["2020-03-02", "2020-03-31"]}
        return {
            "model": {"_target_": "own_model.Model", **options},
            "dataset": {
                "_target_": "qtorch.data.DatasetH",
                "handler": {**handler, "data_loader": loader},
                "segments": segments,
            },
            "record": [],
            "seed": 1,
        }


def num_runs() -> int:
    return len(R.list_recorders(experiment_name="exp"))


# -- data that changes during a run ----------------------------------------------------------------


def test_data_that_changes_during_the_fit_fails_the_run_by_name(data, user_code):
    before = data.file.read_bytes()
    with pytest.raises(DataError, match="change") as error_info:
        task_train(data.task(write=str(data.file)), "exp")
    assert data.file.read_bytes() != before
    assert str(data.path) in str(error_info.value)
    (run,) = R.list_recorders(experiment_name="exp").values()
    assert run.status == "FAILED"
    assert "params.pkl" not in run.list_artifacts()
    fingerprint = run.list_tags()[DATA_TAG]
    if data.kind == "qlib":
        assert fingerprint in str(error_info.value)
    else:  # the source knows which files it has read
        assert "fingerprint" in str(error_info.value)


def test_data_that_stays_the_same_is_in_the_record(data, user_code):
    run = task_train(data.task(), "exp")
    assert run.list_tags()[DATA_TAG] == run.load_object("environment")["data"]


def test_table_that_was_changed_after_it_was_read_is_refused(tmp_path):
    data = Data("csv", tmp_path / "data")
    source = TableSource(data.path)
    first = source.fingerprint()
    source.panel()
    data.change()
    with pytest.raises(DataError, match=r"bars.csv has changed since it was read"):
        source.fingerprint()
    assert TableSource(data.path).fingerprint() != first
    assert pickle.loads(pickle.dumps(source)).fingerprint() != first  # a copy reads it again


def test_static_file_that_was_changed_after_it_was_read_is_refused(tmp_path):
    data = Data("parquet", tmp_path / "data")
    loader = StaticDataLoader({"feature": str(data.path)})
    first = loader.fingerprint()
    loader.view()
    assert loader.fingerprint() == first
    data.change()
    with pytest.raises(DataError, match=r"have changed since they were read.*bars.parquet"):
        loader.fingerprint()
    assert StaticDataLoader({"feature": str(data.path)}).fingerprint() != first


def test_fingerprints_of_files_do_not_parse_them(tmp_path, monkeypatch):
    table, static = Data("csv", tmp_path / "a"), Data("parquet", tmp_path / "b")
    monkeypatch.setattr(TableSource, "panel", None)
    monkeypatch.setattr(SyntheticSource, "panel", None)
    monkeypatch.setattr(StaticDataLoader, "view", None)
    for make in (
        lambda: TableSource(table.path),
        lambda: StaticDataLoader({"feature": str(static.path)}),
    ):
        first = make().fingerprint()
        assert make().fingerprint() == first
        table.change()
        static.change()
        assert make().fingerprint() != first
    assert SyntheticSource(seed=1).fingerprint() != SyntheticSource(seed=2).fingerprint()


# -- reuse by sweeps -------------------------------------------------------------------------------


def test_finished_job_is_reused_until_its_data_changes(data, user_code, caplog, monkeypatch):
    caplog.set_level("INFO", "qtorch")
    first = run_sweep_job(data.task(), MEMBER, "exp")
    with monkeypatch.context() as patch:
        patch.setattr("qtorch.data.handler.loader.DataLoader.view", None)  # nothing is loaded
        patch.setattr("qtorch.data.handler.loader.QlibDataLoader.view", None)
        patch.setattr(TableSource, "panel", None)
        second = run_sweep_job(data.task(), MEMBER, "exp")
    assert (first.action, second.action) == (TRAINED, SKIPPED)
    assert f"same task, same data {first.recorder.list_tags()[DATA_TAG][:12]}" in second.reason
    assert second.reason in caplog.text
    data.change()
    assert find_finished_job(data.task(), MEMBER, "exp") is None
    third = run_sweep_job(data.task(), MEMBER, "exp")
    assert third.action == TRAINED
    assert f"not using run {first.recorder.id} (FINISHED) of the same task: the data" in caplog.text
    assert third.recorder.list_metrics() != first.recorder.list_metrics()
    assert run_sweep_job(data.task(), MEMBER, "exp").recorder.id == third.recorder.id


def test_changed_code_or_version_is_trained_again(tmp_path, user_code, caplog, monkeypatch):
    task = Data("csv", tmp_path / "data").task()
    first = run_sweep_job(task, MEMBER, "exp")
    user_code(factor=2.0)
    second = run_sweep_job(task, MEMBER, "exp")
    assert (second.action, num_runs()) == (TRAINED, 2)
    assert "the code of the task's own modules (own_factor, own_model) changed" in caplog.text
    assert second.recorder.list_metrics()["mean"] == 2 * first.recorder.list_metrics()["mean"]
    monkeypatch.setattr(qtorch, "__version__", "0.0.0")
    assert run_sweep_job(task, MEMBER, "exp").action == TRAINED
    assert "qtorch's version or code changed" in caplog.text
    monkeypatch.undo()
    assert package_digest() in collect_inputs(task, None).library


def test_training_is_not_reused_for_records_if_the_data_changed(tmp_path, user_code):
    data = Data("csv", tmp_path / "data")
    run_sweep_job(data.task(), MEMBER, "exp")
    with_record = {**data.task(), "record": ["SignalRecord"]}
    assert run_sweep_job(with_record, MEMBER, "exp").action == RECORDS_ONLY
    data.change()
    assert run_sweep_job(with_record, MEMBER, "exp").action == TRAINED


def test_data_that_changes_while_a_training_is_reused_fails_the_job(tmp_path, user_code):
    data = Data("qlib", tmp_path / "data")
    task = data.task(write_late=str(data.file))
    run_sweep_job(task, MEMBER, "exp")
    with pytest.raises(DataError, match="changed during the run"):
        run_sweep_job({**task, "record": ["SignalRecord"]}, MEMBER, "exp")
    assert sorted(r.status for r in R.list_recorders(experiment_name="exp").values()) == [
        "FAILED",
        "FINISHED",
    ]


def test_failed_job_is_tried_again_once_its_code_is_mended(tmp_path, user_code):
    task = Data("csv", tmp_path / "data").task()
    user_code(factor="'broken'")
    with pytest.raises(TypeError):
        run_sweep_job(task, MEMBER, "exp")
    assert find_finished_job(task, MEMBER, "exp").action == FAILED_BEFORE
    user_code()
    assert run_sweep_job(task, MEMBER, "exp").action == TRAINED


def test_run_of_an_older_version_is_not_reused(tmp_path, user_code, caplog):
    task = Data("csv", tmp_path / "data").task()
    first = run_sweep_job(task, MEMBER, "exp")
    first.recorder.delete_tags(DATA_TAG, SOURCES_TAG)
    first.recorder.set_tags(**{FIT_TAG: "an ID without the code"})
    assert run_sweep_job(task, MEMBER, "exp").action == TRAINED
    assert "it has no record of its data and code" in caplog.text


# -- interrupted runs ------------------------------------------------------------------------------


def interrupt(tmp_path, data: Data, train) -> dict:
    """Interrupt the training of the task that is returned; the next one is not interrupted."""
    stop = tmp_path / "stop"
    stop.touch()
    task = data.task(stop=str(stop))
    with pytest.raises(KeyboardInterrupt):
        train(task)
    stop.unlink()
    return task


def test_interrupted_job_is_resumed_only_on_the_same_data(tmp_path, data, user_code, caplog):
    task = interrupt(tmp_path, data, lambda task: run_sweep_job(task, MEMBER, "exp"))
    assert run_sweep_job(task, MEMBER, "exp").action == RESUMED
    assert num_runs() == 1

    other = SweepMember("other", 0, ("seed=2",))
    (tmp_path / "stop").touch()
    with pytest.raises(KeyboardInterrupt):
        run_sweep_job({**task, "seed": 2}, other, "exp")
    (tmp_path / "stop").unlink()
    data.change()
    assert run_sweep_job({**task, "seed": 2}, other, "exp").action == TRAINED
    assert num_runs() == 3
    assert "(KILLED) of the same task: the data changed" in caplog.text


def test_attempt_of_a_pool_or_scheduler_is_continued_only_on_the_same_data(
    tmp_path, user_code, caplog
):
    data = Data("csv", tmp_path / "data")
    finished = task_train(data.task(), "exp")
    attempt = {"experiment_id": finished.experiment_id, "recorder_id": finished.id}
    assert task_train(data.task(), "exp", run=attempt).id == finished.id
    task = interrupt(tmp_path, data, lambda task: task_train(task, "exp"))
    (killed,) = [
        r for r in R.list_recorders(experiment_name="exp").values() if r.status == "KILLED"
    ]
    data.change()
    for run, its_task in ((finished, data.task()), (killed, task)):
        attempt = {"experiment_id": run.experiment_id, "recorder_id": run.id}
        assert task_train(its_task, "exp", run=attempt).id != run.id
        assert f"not using run {run.id} of an earlier attempt" in caplog.text
    assert num_runs() == 4
    status = R.get_recorder(recorder_id=killed.id).status
    with pytest.raises(DataError, match=r"cannot continue run .*: the data changed"):
        end_task_train(killed)
    assert R.get_recorder(recorder_id=killed.id).status == status  # it stays as it was


def test_second_phase_of_a_training_uses_the_data_of_now(tmp_path, user_code):
    data = Data("csv", tmp_path / "data")
    run = begin_task_train(data.task(), "exp")
    data.change()
    assert end_task_train(run).status == "FINISHED"


def test_pool_trains_the_task_of_changed_data_again(tmp_path, user_code):
    data = Data("csv", tmp_path / "data")
    runs = []
    for _ in range(2):
        trainer = TrainerRM("exp", "pool", url=f"sqlite:///{tmp_path}/pool.db")
        runs += trainer.train([data.task()])
    assert runs[0].id == runs[1].id
    data.change()
    (run,) = TrainerRM("exp", "pool", url=f"sqlite:///{tmp_path}/pool.db").train([data.task()])
    assert run.id != runs[0].id
    assert run.list_metrics() != runs[0].list_metrics()


def test_unknown_inputs_are_equal_to_nothing():
    first_inputs = RunInputs("a", {"own": "b"}, "1")
    assert first_inputs.find_differences(first_inputs.tags) == []
    for unknown in (
        RunInputs(None, {"own": "b"}, "1"),
        RunInputs("a", {"own": None}, "1"),
        RunInputs("a", None, "1"),
    ):
        assert unknown.identity is None
        for first, second in ((first_inputs, unknown), (unknown, first_inputs), (unknown, unknown)):
            (difference,) = first.find_differences(second.tags)
            assert "cannot be compared" in difference
