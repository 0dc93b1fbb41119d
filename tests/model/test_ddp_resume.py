"""A training on two devices that was killed, or resumed on another number of devices."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_process import ForkedProcess
from forked_ranks import (
    DDP,
    FAULT_VARIABLE,
    PIDS_FILE,
    ROW_LOG_VARIABLE,
    fork_ranks_in_place,
    is_running,
    start_ranks_as_usual,
    start_training,
)
from toy_training import ToyDataset, ToyRecorder, resumable_model

from qtorch.model.loop.checkpoint import newest_checkpoint

CHANGES = {"trainer": {"max_epochs": 4, "gradient_clip_val": 1.0, **DDP}}
ONE = {"trainer": {**CHANGES["trainer"], "devices": 1, "strategy": "auto"}}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def use_forked_ranks() -> Iterator[None]:
    fork_ranks_in_place()
    yield
    start_ranks_as_usual()


@pytest.fixture(scope="module")
def reference_fit(tmp_path_factory: pytest.TempPathFactory):
    torch.set_num_threads(1)
    fork_ranks_in_place()
    recorder = ToyRecorder(tmp_path_factory.mktemp("whole"))
    model = resumable_model(**CHANGES)
    model.fit(ToyDataset(), recorder=recorder)
    start_ranks_as_usual()
    return model, recorder.history()


def _start_fit(folder: Path, **variables: str) -> ForkedProcess:
    return start_training(folder, CHANGES, **variables)


def _wait_for_ranks_to_exit(folder: Path, seconds: float = 10.0) -> bool:
    """Return whether all ranks that were started for the folder have exited in time."""
    deadline, pids_file = time.monotonic() + seconds, folder / PIDS_FILE
    while time.monotonic() < deadline:
        pids = [int(p) for p in pids_file.read_text().split()] if pids_file.exists() else []
        if not any(is_running(p) for p in pids):
            return True
        time.sleep(0.05)
    return False


def _resume_fit(folder: Path, **changes: Any):
    recorder = ToyRecorder(folder)
    model = resumable_model(**{**CHANGES, **changes})
    model.fit(ToyDataset(), recorder=recorder)
    return model, recorder.history()


def _assert_same(model: Any, history: Any, reference_fit: Any) -> None:
    expected_model, expected_history = reference_fit
    first, second = expected_model.network_.state_dict(), model.network_.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert history == expected_history
    assert model.evals_result_ == expected_model.evals_result_
    assert model.predict(ToyDataset()).equals(expected_model.predict(ToyDataset()))


def test_killed_with_all_ranks_in_the_middle_of_an_epoch_resumes_exactly(
    tmp_path: Path, reference_fit
) -> None:
    folder = tmp_path / "run"
    process = _start_fit(folder, **{FAULT_VARIABLE: "0:1:10:kill-all"})
    assert process.wait(120) == -signal.SIGKILL
    assert _wait_for_ranks_to_exit(folder)
    model, history = _resume_fit(folder)
    assert model.fit_report_["resumed_from"] is not None
    _assert_same(model, history, reference_fit)
    assert not list((folder / "checkpoints").glob(".ranks-*"))  # what the killed training left


def test_user_module_killed_with_all_ranks_resumes_exactly(tmp_path: Path) -> None:
    """What it logged in the first half of the epoch, on both devices, counts too."""
    arguments = {
        "network": {"_target_": "user_networks.LoggingModule"},
        "monitor": "own_valid_loss",
        "early_stop": None,
        "scheduler": None,
        "inner_steps": "auto",
        "trainer": {"max_epochs": 3, **DDP},
    }
    process = start_training(tmp_path / "run", arguments, **{FAULT_VARIABLE: "0:1:10:kill-all"})
    assert process.wait(120) == -signal.SIGKILL
    assert _wait_for_ranks_to_exit(tmp_path / "run")
    (tmp_path / "whole").mkdir()
    resumed_fit, uninterrupted_fit = (
        _resume_fit(tmp_path / name, **arguments) for name in ("run", "whole")
    )
    assert resumed_fit[0].fit_report_["resumed_from"] is not None
    assert uninterrupted_fit[0].fit_report_["resumed_from"] is None
    _assert_same(*resumed_fit, uninterrupted_fit)


def _read_row_log(path: Path) -> dict[tuple[int, int], list[int]]:
    """Return the rows that all ranks used for each batch (epoch, step)."""
    rows_by_batch: dict[tuple[int, int], list[int]] = {}
    for line in path.read_text().splitlines():
        epoch, step, rows = json.loads(line)
        rows_by_batch.setdefault((epoch, step), []).extend(rows)
    return rows_by_batch


def test_resume_on_one_device_after_two(tmp_path: Path, caplog, monkeypatch) -> None:
    """The rest of the epoch uses the samples that were not used yet."""
    from qtorch.data.dataset.batches import BatchLoader

    folder = tmp_path / "run"
    process = _start_fit(folder, **{FAULT_VARIABLE: "0:1:10:kill-all"})
    assert process.wait(120) == -signal.SIGKILL
    used: list[tuple[int, int]] = []
    original_batches = BatchLoader.batches

    def batches_with_record(self, epoch: int, start_step: int = 0):
        for step, batch in enumerate(original_batches(self, epoch, start_step), start_step):
            if self.order == "random":
                used.append((epoch, step))
            yield batch

    monkeypatch.setattr(BatchLoader, "batches", batches_with_record)
    with caplog.at_level(logging.WARNING, logger="qtorch"):
        model, history = _resume_fit(folder, **ONE)
    assert "was written with 2 devices, this training resumes with 1" in caplog.text
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert used[0][0] == 1
    assert used[0][1] in (4, 8)  # checkpoints are written after every fourth batch
    assert used == [(e, s) for e in range(1, 4) for s in range(20) if (e, s) >= used[0]]
    assert model.fit_report_["epochs"] == 4
    assert len(history) == 4 * 5


def test_resume_on_two_devices_after_one(
    tmp_path: Path, caplog, monkeypatch, reference_fit
) -> None:
    from qtorch.data.dataset.batches import BatchLoader

    class Stop(Exception):
        pass

    original_batches = BatchLoader.batches

    def failing_batches(self, epoch: int, start_step: int = 0):
        for step, batch in enumerate(original_batches(self, epoch, start_step), start_step):
            if self.order == "random" and (epoch, step) == (1, 10):
                raise Stop
            yield batch

    folder = tmp_path / "run"
    folder.mkdir()
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(BatchLoader, "batches", failing_batches)
        resumable_model(**ONE).fit(ToyDataset(), recorder=ToyRecorder(folder))
    monkeypatch.setenv(ROW_LOG_VARIABLE, str(tmp_path / "diary"))
    with caplog.at_level(logging.WARNING, logger="qtorch"):
        model, history = _resume_fit(folder)
    assert "was written with 1 devices, this training resumes with 2" in caplog.text
    row_log = _read_row_log(tmp_path / "diary")
    assert min(row_log) in ((1, 8), (1, 4))
    rows = [r for (epoch, _), rows in sorted(row_log.items()) if epoch == 1 for r in rows]
    assert len(rows) == len(set(rows)) == len(ToyDataset().samples("train")) - 50 * min(row_log)[1]
    assert len(history) == 4 * 5
    # The epoch's mean loss counts both parts, each sample once.
    loss = model.evals_result_["train"]["loss"][1]
    assert loss == pytest.approx(reference_fit[0].evals_result_["train"]["loss"][1], rel=0.05)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"max_epochs": 2}, {"max_epochs": 4}),
        ({"max_steps": 7}, {"max_epochs": 3}),
        ({"max_steps": 7}, {"max_steps": 17}),
    ],
    ids=["by epochs", "inside an epoch, then by epochs", "inside an epoch, then by steps"],
)
def test_longer_fit_on_two_devices_is_as_if_there_had_been_no_end(
    tmp_path: Path, short: dict[str, int], long: dict[str, int]
) -> None:
    trainer = {"gradient_clip_val": 1.0, **DDP}
    models = []
    for name, lengths in {"run": (short, long), "whole": (long,)}.items():
        (tmp_path / name).mkdir()
        for length in lengths:
            models.append(resumable_model(trainer={**trainer, **length}))
            models[-1].fit(ToyDataset(), recorder=ToyRecorder(tmp_path / name))
    _, longer, whole = models
    assert longer.fit_report_["resumed_from"] is not None
    _assert_same(longer, None, (whole, None))
