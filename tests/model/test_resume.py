"""A training that was killed and resumed is the training that never was."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from forked_ranks import Forked
from toy_training import ToyDataset, ToyRecorder, resumable_model
from toy_training import main as train_in

from qtorch.core.errors import ConfigError
from qtorch.core.files import whole_file
from qtorch.core.stops import STOPS, noted
from qtorch.data.batches import BatchLoader
from qtorch.model.checkpoint import (
    BEST,
    KEEPER,
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    CheckpointError,
    newest_checkpoint,
    read_checkpoint,
)
from qtorch.model.interruption import TrainingInterrupted


def _weights(model) -> dict[str, torch.Tensor]:
    return model.network_.state_dict()


def _same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory):
    torch.set_num_threads(1)
    recorder = ToyRecorder(tmp_path_factory.mktemp("whole"))
    model = resumable_model()
    model.fit(ToyDataset(), recorder=recorder)
    return model, recorder.history()


def _killed(folder: Path, at: str, how: str = "SIGKILL") -> int | None:
    """How a process ended that trained there; it has its imports from this one."""
    folder.mkdir(exist_ok=True)
    return Forked(lambda: train_in(str(folder), at, how)).join()


def _resumed(folder: Path, **changes):
    recorder = ToyRecorder(folder)
    model = resumable_model(**changes)
    model.fit(ToyDataset(), recorder=recorder)
    return model, recorder.history()


@pytest.mark.slow
def test_killed_in_mid_epoch_and_resumed(tmp_path: Path, uninterrupted) -> None:
    assert _killed(tmp_path / "run", "1:10") == -signal.SIGKILL
    model, history = _resumed(tmp_path / "run")
    assert model.fit_report_["resumed_from"] is not None
    assert _same(_weights(model), _weights(uninterrupted[0]))
    assert history == uninterrupted[1]
    assert model.evals_result_ == uninterrupted[0].evals_result_


@pytest.mark.slow
@pytest.mark.parametrize("at", ["0:2", "0:5", "1:0", "1:4", "2:9", "2:19", "3:19"])
def test_killed_anywhere(tmp_path: Path, uninterrupted, at: str) -> None:
    assert _killed(tmp_path / "run", at) == -signal.SIGKILL
    model, history = _resumed(tmp_path / "run")
    assert _same(_weights(model), _weights(uninterrupted[0]))
    assert history == uninterrupted[1]


@pytest.mark.slow
def test_killed_twice_and_resumed_with_other_inner_steps(tmp_path: Path, uninterrupted) -> None:
    for at in ("1:9", "2:14"):
        assert _killed(tmp_path / "run", at) == -signal.SIGKILL
    model, history = _resumed(tmp_path / "run", inner_steps=7)
    assert _same(_weights(model), _weights(uninterrupted[0]))
    assert history == uninterrupted[1]


class _Stop(Exception):
    pass


def _stopped_after(monkeypatch: pytest.MonkeyPatch, folder: Path, epoch: int, step: int) -> None:
    """A training that dies by an exception before a batch, in this process: quick to make."""
    whole = BatchLoader.batches

    def dying(self, number: int, start_step: int = 0):
        for k, batch in enumerate(whole(self, number, start_step), start_step):
            if self.order == "random" and (number, k) == (epoch, step):
                raise _Stop
            yield batch

    folder.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(BatchLoader, "batches", dying)
        with pytest.raises(_Stop):
            resumable_model().fit(ToyDataset(), recorder=ToyRecorder(folder))


@pytest.mark.slow
@pytest.mark.parametrize("at", [(0, 6), (1, 0), (2, 13)])
def test_resumed_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted, at: tuple[int, int]
) -> None:
    _stopped_after(monkeypatch, tmp_path / "run", *at)
    model, history = _resumed(tmp_path / "run")
    assert _same(_weights(model), _weights(uninterrupted[0]))
    assert history == uninterrupted[1]


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted, caplog
) -> None:
    _stopped_after(monkeypatch, tmp_path / "run", 2, 13)
    last = tmp_path / "run" / "checkpoints" / LAST
    last.write_bytes(last.read_bytes()[:-2000])
    with caplog.at_level(logging.WARNING, logger="qtorch"):
        model, history = _resumed(tmp_path / "run")
    assert "cannot be read" in caplog.text
    assert model.fit_report_["resumed_from"].endswith(PREVIOUS)
    assert _same(_weights(model), _weights(uninterrupted[0]))
    assert history == uninterrupted[1]


@pytest.mark.slow
def test_a_finished_training_is_not_repeated(recorder: ToyRecorder, uninterrupted, caplog) -> None:
    resumable_model().fit(ToyDataset(), recorder=recorder)
    logged = recorder.history()
    again = resumable_model()
    again.fit(ToyDataset(), recorder=recorder)
    assert again.fit_report_["resumed_from"] is not None
    assert _same(_weights(again), _weights(uninterrupted[0]))
    assert recorder.history() == logged  # said again, for a killed process may not have; not other
    longer = resumable_model(trainer={**again.trainer, "max_epochs": 5})
    assert "threads" not in caplog.text
    torch.set_num_threads(2)
    try:
        longer.fit(ToyDataset(), recorder=recorder)
    finally:
        torch.set_num_threads(1)
    assert longer.fit_report_["epochs"] == 5
    assert "is of 1 threads, this training goes on with 2" in caplog.text


@pytest.mark.slow
def test_another_training_in_the_same_run_starts_anew(recorder: ToyRecorder, caplog) -> None:
    resumable_model().fit(ToyDataset(), recorder=recorder)
    other = resumable_model(seed=6)
    with caplog.at_level(logging.WARNING, logger="qtorch"):
        other.fit(ToyDataset(), recorder=recorder)
    assert "another training" in caplog.text
    assert other.fit_report_["resumed_from"] is None


def test_a_path_of_another_training_is_an_error(recorder: ToyRecorder, tmp_path: Path) -> None:
    resumable_model().fit(ToyDataset(), recorder=recorder)
    path = recorder.checkpoint_dir() / LAST
    with pytest.raises(ConfigError, match="another training"):
        resumable_model(seed=6).fit(ToyDataset(), resume=path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        resumable_model().fit(ToyDataset(), resume=tmp_path / "nothing.ckpt")
    with pytest.raises(ConfigError, match="no checkpoint"):
        resumable_model().fit(ToyDataset(), resume=tmp_path)


def test_a_checkpoint_of_an_earlier_format_is_refused_by_name(recorder: ToyRecorder) -> None:
    resumable_model().fit(ToyDataset(), recorder=recorder)
    path = recorder.checkpoint_dir() / LAST
    content = torch.load(path, weights_only=False)
    del content[KEEPER]["format"]  # the first one had none
    torch.save(content, path)
    written = path.read_bytes()
    for resume in (path, path.parent, "auto"):
        with pytest.raises(ConfigError, match="of format 1, and this version of qtorch reads"):
            resumable_model().fit(ToyDataset(), resume=resume, recorder=recorder)
    assert path.read_bytes() == written


def test_last_previous_and_best_are_kept_alone(recorder: ToyRecorder) -> None:
    model, folder = resumable_model(), recorder.checkpoint_dir()
    assert Forked(lambda: _dies_writing(folder)).join() == -signal.SIGKILL
    assert len(list(folder.iterdir())) == 2
    model.fit(ToyDataset(), recorder=recorder)
    assert sorted(p.name for p in folder.iterdir()) == sorted([LAST, PREVIOUS, BEST])
    best = read_checkpoint(folder / BEST)["state_dict"]
    assert all(torch.equal(best[f"network.{k}"], v) for k, v in _weights(model).items())


def _dies_writing(folder: Path) -> None:
    """A process is killed before it has named a checkpoint, another one while it writes one."""
    AtomicCheckpointIO().save_checkpoint({"x": 1}, folder / f".new-{BEST}")
    with whole_file(folder / f".new-{LAST}") as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_full_disk_is_one_clear_error_and_leaves_what_was(
    recorder: ToyRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumable_model().fit(ToyDataset(), recorder=recorder)
    folder = recorder.checkpoint_dir()
    before = (folder / LAST).read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        resumable_model(seed=1).fit(ToyDataset(), recorder=recorder)
    assert (folder / LAST).read_bytes() == before
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def _signalled(
    monkeypatch: pytest.MonkeyPatch, folder: Path, at: tuple[int, int], *numbers: signal.Signals
) -> TrainingInterrupted:
    """The error of a training that gets signals before a batch."""
    whole = BatchLoader.batches

    def signalling(self, epoch: int, start_step: int = 0):
        for k, batch in enumerate(whole(self, epoch, start_step), start_step):
            if self.order == "random" and (epoch, k) == at:
                for number in numbers:
                    os.kill(os.getpid(), number)
            yield batch

    folder.mkdir(exist_ok=True)
    before = [signal.getsignal(number) for number in STOPS]
    with monkeypatch.context() as patch:
        patch.setattr(BatchLoader, "batches", signalling)
        with pytest.raises(TrainingInterrupted) as caught:
            resumable_model().fit(ToyDataset(), recorder=ToyRecorder(folder))
    assert before == [signal.getsignal(number) for number in STOPS]
    return caught.value


@pytest.mark.slow
@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGINT,),
        (signal.SIGTERM,),
        (signal.SIGUSR1,),
        (signal.SIGUSR1, *2 * (signal.SIGTERM,)),
    ],
)
def test_a_stop_in_mid_epoch_keeps_a_checkpoint_of_this_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted, numbers: tuple
) -> None:
    error = _signalled(monkeypatch, tmp_path / "run", (2, 7), *numbers)
    assert noted.answered == numbers[0]
    assert noted.further >= set(numbers[1:])
    assert isinstance(error, KeyboardInterrupt)
    assert "in epoch 2 after batch 8 of 20" in str(error)
    assert "Go on with the same fit in run toy" in str(error)
    assert error.checkpoint == str(tmp_path / "run" / "checkpoints" / LAST)
    model, history = _resumed(tmp_path / "run")
    assert _same(_weights(model), _weights(uninterrupted[0]))
    assert history == uninterrupted[1]


def test_ctrl_c_in_the_last_step_of_an_epoch_waits_for_its_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted
) -> None:
    error = _signalled(monkeypatch, tmp_path / "run", (1, 19), signal.SIGINT)
    assert "in epoch 2 after batch 0 of 20" in str(error)
    model, history = _resumed(tmp_path / "run")
    assert _same(_weights(model), _weights(uninterrupted[0]))
    assert history == uninterrupted[1]


def test_a_stop_whose_exception_was_lost_stops_the_training_that_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr(noted, "asked", signal.SIGTERM)
    with pytest.raises(TrainingInterrupted, match="in epoch 0 after batch"):
        resumable_model().fit(ToyDataset(), recorder=ToyRecorder(folder))
    monkeypatch.undo()
    model, history = _resumed(folder)
    assert _same(_weights(model), _weights(uninterrupted[0]))
    assert history == uninterrupted[1]


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted
) -> None:
    twice = (signal.SIGINT, signal.SIGINT)
    _signalled(monkeypatch, tmp_path / "run", (2, 7), *twice)
    found = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found[1]["global_step"] == 2 * 20 + 4  # not of step 8: of the last multiple of four
    model, history = _resumed(tmp_path / "run")
    assert _same(_weights(model), _weights(uninterrupted[0]))
    assert history == uninterrupted[1]


def test_without_a_recorder_the_checkpoint_of_an_interrupted_fit_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uninterrupted
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    whole = BatchLoader.batches

    def signalling(self, epoch: int, start_step: int = 0):
        for k, batch in enumerate(whole(self, epoch, start_step), start_step):
            if self.order == "random" and (epoch, k) == (1, 3):
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(BatchLoader, "batches", signalling)
        with pytest.raises(TrainingInterrupted, match="resume=") as caught:
            resumable_model().fit(ToyDataset())
    model = resumable_model()
    model.fit(ToyDataset(), resume=caught.value.checkpoint)
    assert _same(_weights(model), _weights(uninterrupted[0]))
    left = {p.name for p in tmp_path.glob("qtorch-fit-*")}
    assert left == {Path(caught.value.checkpoint or "").parent.name}
