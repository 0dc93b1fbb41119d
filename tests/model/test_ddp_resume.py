"""A training on two devices that was killed, or taken up by another number of them."""

from __future__ import annotations

import json
import logging
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import DDP, DIARY, FATE, PIDS, Forked, ForkedRank, is_running, training_in
from toy_training import ToyDataset, ToyRecorder, resumable_model

import qtorch.model.ranks
from qtorch.model.checkpoint import newest_checkpoint

CHANGES = {"trainer": {"max_epochs": 4, "gradient_clip_val": 1.0, **DDP}}
ONE = {"trainer": {**CHANGES["trainer"], "devices": 1, "strategy": "auto"}}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qtorch.model.ranks, "RankProcess", ForkedRank)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qtorch.model.ranks, "RankProcess", ForkedRank)
        recorder = ToyRecorder(tmp_path_factory.mktemp("whole"))
        model = resumable_model(**CHANGES)
        model.fit(ToyDataset(), recorder=recorder)
    return model, recorder.history()


def _begun(folder: Path, **told: str) -> Forked:
    return training_in(folder, CHANGES, **told)


def _ranks_gone(folder: Path, seconds: float = 10.0) -> bool:
    """Whether every rank that was started for the folder is gone, soon."""
    end, told = time.monotonic() + seconds, folder / PIDS
    while time.monotonic() < end:
        pids = [int(p) for p in told.read_text().split()] if told.exists() else []
        if not any(is_running(p) for p in pids):
            return True
        time.sleep(0.05)
    return False


def _resumed(folder: Path, **changes: Any):
    recorder = ToyRecorder(folder)
    model = resumable_model(**{**CHANGES, **changes})
    model.fit(ToyDataset(), recorder=recorder)
    return model, recorder.history()


def _same(model: Any, history: Any, uninterrupted: Any) -> None:
    whole, expected = uninterrupted
    first, second = whole.network_.state_dict(), model.network_.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert history == expected
    assert model.evals_result_ == whole.evals_result_
    assert model.predict(ToyDataset()).equals(whole.predict(ToyDataset()))


def test_killed_with_all_its_ranks_in_mid_epoch(tmp_path: Path, uninterrupted) -> None:
    folder = tmp_path / "run"
    process = _begun(folder, **{FATE: "0:1:10:kill-all"})
    assert process.join() == -signal.SIGKILL
    assert _ranks_gone(folder)
    model, history = _resumed(folder)
    assert model.fit_report_["resumed_from"] is not None
    _same(model, history, uninterrupted)
    assert not list((folder / "checkpoints").glob(".ranks-*"))  # what the killed one left


def test_a_users_module_that_was_killed_with_all_its_ranks(tmp_path: Path) -> None:
    """What it has logged of the epoch's first half, on both devices, counts too."""
    own = {
        "network": {"_target_": "user_networks.Talkative"},
        "monitor": "own_valid_loss",
        "early_stop": None,
        "scheduler": None,
        "inner_steps": "auto",
        "trainer": {"max_epochs": 3, **DDP},
    }
    process = training_in(tmp_path / "run", own, **{FATE: "0:1:10:kill-all"})
    assert process.join() == -signal.SIGKILL
    assert _ranks_gone(tmp_path / "run")
    (tmp_path / "whole").mkdir()
    resumed, whole = (_resumed(tmp_path / name, **own) for name in ("run", "whole"))
    assert resumed[0].fit_report_["resumed_from"] is not None
    assert whole[0].fit_report_["resumed_from"] is None
    _same(*resumed, whole)


def _diary(path: Path) -> dict[tuple[int, int], list[int]]:
    """The rows that were used for each batch (epoch, step), of all ranks."""
    found: dict[tuple[int, int], list[int]] = {}
    for line in path.read_text().splitlines():
        epoch, step, rows = json.loads(line)
        found.setdefault((epoch, step), []).extend(rows)
    return found


def test_two_devices_then_one(tmp_path: Path, caplog, monkeypatch) -> None:
    """The rest of the epoch is of the samples that were not yet used."""
    from qtorch.data.batches import BatchLoader

    folder = tmp_path / "run"
    process = _begun(folder, **{FATE: "0:1:10:kill-all"})
    assert process.join() == -signal.SIGKILL
    used: list[tuple[int, int]] = []
    whole = BatchLoader.batches

    def noted(self, epoch: int, start_step: int = 0):
        for step, batch in enumerate(whole(self, epoch, start_step), start_step):
            if self.order == "random":
                used.append((epoch, step))
            yield batch

    monkeypatch.setattr(BatchLoader, "batches", noted)
    with caplog.at_level(logging.WARNING, logger="qtorch"):
        model, history = _resumed(folder, **ONE)
    assert "is of 2 devices, this training goes on with 1" in caplog.text
    found = newest_checkpoint(folder / "checkpoints")
    assert found is not None
    assert used[0][0] == 1
    assert used[0][1] in (4, 8)  # a checkpoint after each fourth batch
    assert used == [(e, s) for e in range(1, 4) for s in range(20) if (e, s) >= used[0]]
    assert model.fit_report_["epochs"] == 4
    assert len(history) == 4 * 5


def test_one_device_then_two(tmp_path: Path, caplog, monkeypatch, uninterrupted) -> None:
    from qtorch.data.batches import BatchLoader

    class Stop(Exception):
        pass

    whole = BatchLoader.batches

    def dying(self, epoch: int, start_step: int = 0):
        for step, batch in enumerate(whole(self, epoch, start_step), start_step):
            if self.order == "random" and (epoch, step) == (1, 10):
                raise Stop
            yield batch

    folder = tmp_path / "run"
    folder.mkdir()
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(BatchLoader, "batches", dying)
        resumable_model(**ONE).fit(ToyDataset(), recorder=ToyRecorder(folder))
    monkeypatch.setenv(DIARY, str(tmp_path / "diary"))
    with caplog.at_level(logging.WARNING, logger="qtorch"):
        model, history = _resumed(folder)
    assert "is of 1 devices, this training goes on with 2" in caplog.text
    diary = _diary(tmp_path / "diary")
    assert min(diary) in ((1, 8), (1, 4))
    rows = [r for (epoch, _), rows in sorted(diary.items()) if epoch == 1 for r in rows]
    assert len(rows) == len(set(rows)) == len(ToyDataset().samples("train")) - 50 * min(diary)[1]
    assert len(history) == 4 * 5
    # The mean loss of the epoch counts both parts, each sample once.
    loss = model.evals_result_["train"]["loss"][1]
    assert loss == pytest.approx(uninterrupted[0].evals_result_["train"]["loss"][1], rel=0.05)
