"""A damaged checkpoint is refused by name, and the training resumes from the one before."""

from __future__ import annotations

import logging
import random
import zipfile
from pathlib import Path

import pytest
import torch
from toy_training import ToyDataset, ToyRecorder, resumable_model

from qtorch.model.loop.checkpoint import (
    BEST,
    CALLBACK_STATE_KEY,
    FORMAT_VERSION,
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    CheckpointError,
    read_checkpoint,
    save_and_rotate,
)


def flip_bit(path: Path) -> None:
    """Change one bit of a file, in place."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / LAST
    content = {"format": FORMAT_VERSION, "weights": torch.arange(200.0), "text": "x"}
    AtomicCheckpointIO().save_checkpoint({CALLBACK_STATE_KEY: content}, path)
    return path


def test_flipped_bit_anywhere_is_refused(checkpoint: Path) -> None:
    content, rng = checkpoint.read_bytes(), random.Random(0)
    positions = {*range(60), *range(-60, 0), *rng.choices(range(len(content)), k=300)}
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        checkpoint.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{checkpoint} cannot be read"):
            read_checkpoint(checkpoint)
    checkpoint.write_bytes(content)
    assert read_checkpoint(checkpoint)[CALLBACK_STATE_KEY]["weights"][-1] == 199


def test_checkpoint_stays_an_ordinary_file_of_torch(checkpoint: Path) -> None:
    weights = torch.load(checkpoint, weights_only=True, mmap=True)[CALLBACK_STATE_KEY]["weights"]
    assert torch.equal(weights, torch.arange(200.0))
    with zipfile.ZipFile(checkpoint) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"qtorch-crc32-")


def test_damaged_last_checkpoint_does_not_replace_the_previous_one(tmp_path: Path) -> None:
    for name in (LAST, PREVIOUS):
        (tmp_path / name).write_text(name)
    save_and_rotate(lambda path: Path(path).write_text("new"), tmp_path, keep_previous=True)
    assert (tmp_path / LAST).read_text() == "new"
    assert (tmp_path / PREVIOUS).read_text() == PREVIOUS


def _fit(recorder: ToyRecorder, epochs: int, **options) -> object:
    model = resumable_model(trainer={**resumable_model().trainer, "max_epochs": epochs})
    model.fit(ToyDataset(), recorder=recorder, **options)
    return model


def test_damaged_best_checkpoint_is_refused(recorder: ToyRecorder) -> None:
    _fit(recorder, 1)
    path = recorder.checkpoint_dir() / BEST
    flip_bit(path)
    with pytest.raises(CheckpointError, match=rf"{path} cannot be read.*damaged"):
        _fit(recorder, 2, resume=path)


def test_training_starts_from_scratch_if_no_checkpoint_is_intact(
    recorder: ToyRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    _fit(recorder, 1)
    folder = recorder.checkpoint_dir()
    flip_bit(folder / LAST)
    flip_bit(folder / PREVIOUS)
    with caplog.at_level(logging.WARNING, logger="qtorch"):
        model = _fit(recorder, 1)
    assert model.fit_report_["resumed_from"] is None
    assert f"{folder} contains no intact checkpoint" in caplog.text
