"""A training that was killed and resumed ends like an uninterrupted one."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from forked_process import ForkedProcess
from toy_training import ToyDataset, ToyRecorder, model_weights, resumable_model, same_weights
from toy_training import main as run_training

from qtorch.core.errors import ConfigError
from qtorch.core.files import atomic_write
from qtorch.data.dataset.batches import BatchLoader
from qtorch.model.loop.checkpoint import (
    ACCUMULATORS,
    BEST,
    CALLBACK_STATE_KEY,
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    CheckpointError,
    newest_checkpoint,
    read_checkpoint,
)
from qtorch.model.loop.curves import TRAININGS_FILE
from qtorch.model.loop.interruption import TrainingInterrupted
from qtorch.model.loop.module import MODULE_STATE_KEY
from qtorch.process.stops import STOP_SIGNALS, StopSignals, received_signals


@pytest.fixture(scope="module")
def reference_fit(tmp_path_factory: pytest.TempPathFactory):
    torch.set_num_threads(1)
    recorder = ToyRecorder(tmp_path_factory.mktemp("whole"))
    model = resumable_model()
    model.fit(ToyDataset(), recorder=recorder)
    return model, recorder.history()


def _train_until_signal(folder: Path, kill_step: str, signal_name: str = "SIGKILL") -> int | None:
    """Train in a forked process that gets a signal at a batch; return its exit code."""
    folder.mkdir(exist_ok=True)
    return ForkedProcess(lambda: run_training(str(folder), kill_step, signal_name)).wait(120)


def _resume_fit(folder: Path, **changes):
    recorder = ToyRecorder(folder)
    model = resumable_model(**changes)
    model.fit(ToyDataset(), recorder=recorder)
    return model, recorder.history()


@pytest.mark.slow
def test_killed_in_the_middle_of_an_epoch_resumes_exactly(tmp_path: Path, reference_fit) -> None:
    assert _train_until_signal(tmp_path / "run", "1:10") == -signal.SIGKILL
    model, history = _resume_fit(tmp_path / "run")
    assert model.fit_report_["resumed_from"] is not None
    assert same_weights(model_weights(model), model_weights(reference_fit[0]))
    assert history == reference_fit[1]
    assert model.evals_result_ == reference_fit[0].evals_result_


@pytest.mark.slow
@pytest.mark.parametrize("at", ["0:2", "0:5", "1:0", "1:4", "2:9", "2:19", "3:19"])
def test_killed_at_any_step_resumes_exactly(tmp_path: Path, reference_fit, at: str) -> None:
    assert _train_until_signal(tmp_path / "run", at) == -signal.SIGKILL
    model, history = _resume_fit(tmp_path / "run")
    assert same_weights(model_weights(model), model_weights(reference_fit[0]))
    assert history == reference_fit[1]


@pytest.mark.slow
def test_killed_twice_resumes_exactly_with_other_inner_steps(tmp_path: Path, reference_fit) -> None:
    for at in ("1:9", "2:14"):
        assert _train_until_signal(tmp_path / "run", at) == -signal.SIGKILL
    model, history = _resume_fit(tmp_path / "run", inner_steps=7)
    assert same_weights(model_weights(model), model_weights(reference_fit[0]))
    assert history == reference_fit[1]


class _Stop(Exception):
    pass


def _fail_before_batch(
    monkeypatch: pytest.MonkeyPatch, folder: Path, epoch: int, step: int
) -> None:
    """Run a training in this process that fails before a batch (faster than killing a process)."""
    original_batches = BatchLoader.batches

    def failing_batches(self, epoch_idx: int, start_step: int = 0):
        for batch_idx, batch in enumerate(
            original_batches(self, epoch_idx, start_step), start_step
        ):
            if self.order == "random" and (epoch_idx, batch_idx) == (epoch, step):
                raise _Stop
            yield batch

    folder.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(BatchLoader, "batches", failing_batches)
        with pytest.raises(_Stop):
            resumable_model().fit(ToyDataset(), recorder=ToyRecorder(folder))


@pytest.mark.slow
@pytest.mark.parametrize("at", [(0, 6), (1, 0), (2, 13)])
def test_resumes_exactly_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_fit, at: tuple[int, int]
) -> None:
    _fail_before_batch(monkeypatch, tmp_path / "run", *at)
    model, history = _resume_fit(tmp_path / "run")
    assert same_weights(model_weights(model), model_weights(reference_fit[0]))
    assert history == reference_fit[1]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "flipped bit of a weight", "flipped bit of a sum"])
def test_damaged_checkpoint_falls_back_to_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_fit, caplog, damage: str
) -> None:
    _fail_before_batch(monkeypatch, tmp_path / "run", 2, 13)
    last = tmp_path / "run" / "checkpoints" / LAST
    content = last.read_bytes()
    if damage == "truncated":
        last.write_bytes(content[:-2000])
    else:
        state = torch.load(last, weights_only=True)
        is_weight = damage == "flipped bit of a weight"
        tensor = (
            next(iter(state["state_dict"].values()))
            if is_weight
            else state[CALLBACK_STATE_KEY][ACCUMULATORS][0]
        )
        value = tensor.numpy().tobytes()[:16]
        assert value in content
        last.write_bytes(content.replace(value, bytes([value[0] ^ 1]) + value[1:]))
        torch.load(last, weights_only=True)  # torch itself notices nothing
    with caplog.at_level(logging.WARNING, logger="qtorch"):
        model, history = _resume_fit(tmp_path / "run")
    assert f"{last} cannot be read" in caplog.text
    assert model.fit_report_["resumed_from"].endswith(PREVIOUS)
    assert same_weights(model_weights(model), model_weights(reference_fit[0]))
    assert history == reference_fit[1]


@pytest.mark.slow
def test_intact_checkpoint_stays_until_there_is_a_newer_one_than_the_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_fit
) -> None:
    _fail_before_batch(monkeypatch, tmp_path / "run", 2, 6)
    last, previous = (tmp_path / "run" / "checkpoints" / name for name in (LAST, PREVIOUS))
    damaged, intact = last.read_bytes()[:-1], previous.read_bytes()
    last.write_bytes(damaged)
    _fail_before_batch(monkeypatch, tmp_path / "run", 2, 6)
    assert previous.read_bytes() == intact
    assert last.read_bytes() != damaged
    model, history = _resume_fit(tmp_path / "run")
    assert model.fit_report_["resumed_from"] == str(last)
    assert same_weights(model_weights(model), model_weights(reference_fit[0]))
    assert history == reference_fit[1]


@pytest.mark.slow
def test_finished_training_is_not_repeated(recorder: ToyRecorder, reference_fit, caplog) -> None:
    resumable_model().fit(ToyDataset(), recorder=recorder)
    history = recorder.history()
    resumed_model = resumable_model()
    resumed_model.fit(ToyDataset(), recorder=recorder)
    assert resumed_model.fit_report_["resumed_from"] is not None
    assert same_weights(model_weights(resumed_model), model_weights(reference_fit[0]))
    # Sent again because a killed process may not have sent them; the values are equal.
    assert recorder.history() == history
    longer_model = resumable_model(trainer={**resumed_model.trainer, "max_epochs": 5})
    assert "threads" not in caplog.text
    torch.set_num_threads(2)
    try:
        longer_model.fit(ToyDataset(), recorder=recorder)
    finally:
        torch.set_num_threads(1)
    assert longer_model.fit_report_["epochs"] == 5
    assert "was written with 1 threads, this training resumes with 2" in caplog.text


@pytest.mark.slow
def test_another_training_in_the_same_run_starts_from_scratch(recorder: ToyRecorder) -> None:
    resumable_model().fit(ToyDataset(), recorder=recorder)
    checkpoint = recorder.checkpoint_dir() / LAST
    content = checkpoint.read_bytes()
    other_model = resumable_model(seed=6)
    other_model.fit(ToyDataset(), recorder=recorder)
    assert other_model.fit_report_["resumed_from"] is None
    assert checkpoint.read_bytes() == content


def test_resume_path_of_another_training_raises(recorder: ToyRecorder, tmp_path: Path) -> None:
    resumable_model().fit(ToyDataset(), recorder=recorder)
    path = recorder.checkpoint_dir() / LAST
    with pytest.raises(ConfigError, match="another training"):
        resumable_model(seed=6).fit(ToyDataset(), resume=path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        resumable_model().fit(ToyDataset(), resume=tmp_path / "nothing.ckpt")
    with pytest.raises(ConfigError, match="no checkpoint"):
        resumable_model().fit(ToyDataset(), resume=tmp_path)


def test_checkpoint_of_an_older_format_is_refused(recorder: ToyRecorder) -> None:
    resumable_model().fit(ToyDataset(), recorder=recorder)
    path = recorder.checkpoint_dir() / LAST
    content = torch.load(path, weights_only=False)
    del content[CALLBACK_STATE_KEY]["format"]  # the first format had no such entry
    torch.save(content, path)
    original_bytes = path.read_bytes()
    for resume in (path, path.parent, "auto"):
        with pytest.raises(ConfigError, match=r"has checkpoint format 1, but .* reads 2, 3, 4"):
            resumable_model().fit(ToyDataset(), resume=resume, recorder=recorder)
    assert path.read_bytes() == original_bytes


def test_checkpoint_of_format_2_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_fit
) -> None:
    folder = tmp_path / "run"
    _fail_before_batch(monkeypatch, folder, 2, 7)
    path = folder / "checkpoints" / LAST
    content = torch.load(path, weights_only=True)
    state = content[CALLBACK_STATE_KEY]
    (member,) = state.pop("members")
    del member["is_stopped"]
    content[CALLBACK_STATE_KEY] = {**state, **member, "format": 2}
    module_state = content[MODULE_STATE_KEY]
    (module_state["told"],) = module_state["told"]
    torch.save(content, path)
    model, history = _resume_fit(folder)
    assert model.fit_report_["resumed_from"] is not None
    assert same_weights(model_weights(model), model_weights(reference_fit[0]))
    assert history == reference_fit[1]


def test_only_last_previous_and_best_checkpoints_are_kept(recorder: ToyRecorder) -> None:
    model, folder = resumable_model(), recorder.checkpoint_dir()
    assert ForkedProcess(lambda: _kill_while_writing(folder)).wait(120) == -signal.SIGKILL
    assert len(list(folder.iterdir())) == 2
    model.fit(ToyDataset(), recorder=recorder)
    names = [LAST, PREVIOUS, BEST, TRAININGS_FILE]
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)
    best = read_checkpoint(folder / BEST)["state_dict"]
    assert all(torch.equal(best[f"network.{k}"], v) for k, v in model_weights(model).items())


def _kill_while_writing(folder: Path) -> None:
    """Leave a complete but unnamed checkpoint and a partial one, as a killed process does."""
    AtomicCheckpointIO().save_checkpoint({"x": 1}, folder / f".new-{BEST}")
    with atomic_write(folder / f".new-{LAST}") as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_full_disk_raises_and_keeps_the_existing_checkpoint(
    recorder: ToyRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumable_model().fit(ToyDataset(), recorder=recorder)
    folder = recorder.checkpoint_dir()
    original_bytes = (folder / LAST).read_bytes()

    def raise_disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", raise_disk_full)
    with pytest.raises(CheckpointError, match="No space left"):
        resumable_model(seed=1).fit(ToyDataset(), recorder=recorder)
    assert (folder / LAST).read_bytes() == original_bytes
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def _send_signals(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    position: tuple[int, int],
    *numbers: signal.Signals,
) -> TrainingInterrupted:
    """Return the error of a training that gets signals before a batch."""
    original_batches = BatchLoader.batches

    def batches_with_signals(self, epoch: int, start_step: int = 0):
        for batch_idx, batch in enumerate(original_batches(self, epoch, start_step), start_step):
            if self.order == "random" and (epoch, batch_idx) == position:
                for number in numbers:
                    os.kill(os.getpid(), number)
            yield batch

    folder.mkdir(exist_ok=True)
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(BatchLoader, "batches", batches_with_signals)
        model = resumable_model()
        with pytest.raises(TrainingInterrupted) as error_info:
            model.fit(ToyDataset(), recorder=ToyRecorder(folder))
    # An epoch has ended: the model is as if the training had ended then.
    report = error_info.value.result.report
    best_epoch = min(range(report["epochs"]), key=model.evals_result_["valid"]["loss"].__getitem__)
    assert report["best_epoch"] == model.fit_report_["best_epoch"] == best_epoch
    assert f"the best weights so far, of epoch {best_epoch}." in str(error_info.value)
    assert model.predict(ToyDataset()).notna().all()
    assert handlers == [signal.getsignal(number) for number in STOP_SIGNALS]
    return error_info.value


@pytest.mark.slow
@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGINT,),
        (signal.SIGTERM,),
        (signal.SIGUSR1,),
        (signal.SIGUSR1, *2 * (signal.SIGTERM,)),
    ],
)
def test_stop_in_the_middle_of_an_epoch_saves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_fit, signals: tuple
) -> None:
    error = _send_signals(monkeypatch, tmp_path / "run", (2, 7), *signals)
    assert received_signals == list(signals)
    assert isinstance(error, KeyboardInterrupt)
    assert "in epoch 2 after batch 8 of 20" in str(error)
    assert "Resume with the same fit in run toy" in str(error)
    assert error.checkpoint == str(tmp_path / "run" / "checkpoints" / LAST)
    model, history = _resume_fit(tmp_path / "run")
    assert same_weights(model_weights(model), model_weights(reference_fit[0]))
    assert history == reference_fit[1]


def test_ctrl_c_in_the_last_step_waits_for_the_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_fit
) -> None:
    error = _send_signals(monkeypatch, tmp_path / "run", (1, 19), signal.SIGINT)
    assert "in epoch 2 after batch 0 of 20" in str(error)
    model, history = _resume_fit(tmp_path / "run")
    assert same_weights(model_weights(model), model_weights(reference_fit[0]))
    assert history == reference_fit[1]


def test_earlier_stop_signal_stops_the_next_training(tmp_path: Path, reference_fit) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with StopSignals(lambda number: None):  # of a command in which the exception was lost
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(TrainingInterrupted, match="in epoch 0 after batch"):
            resumable_model().fit(ToyDataset(), recorder=ToyRecorder(folder))
    model, history = _resume_fit(folder)
    assert same_weights(model_weights(model), model_weights(reference_fit[0]))
    assert history == reference_fit[1]


@pytest.mark.slow
def test_second_ctrl_c_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_fit
) -> None:
    signals = (signal.SIGINT, signal.SIGINT)
    _send_signals(monkeypatch, tmp_path / "run", (2, 7), *signals)
    checkpoint = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    # The last multiple of four, not step 8 of the epoch.
    assert checkpoint[1]["global_step"] == 2 * 20 + 4
    model, history = _resume_fit(tmp_path / "run")
    assert same_weights(model_weights(model), model_weights(reference_fit[0]))
    assert history == reference_fit[1]


def test_interrupted_fit_without_recorder_keeps_its_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reference_fit
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    original_batches = BatchLoader.batches

    def batches_with_signal(self, epoch: int, start_step: int = 0):
        for batch_idx, batch in enumerate(original_batches(self, epoch, start_step), start_step):
            if self.order == "random" and (epoch, batch_idx) == (1, 3):
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(BatchLoader, "batches", batches_with_signal)
        with pytest.raises(TrainingInterrupted, match="resume=") as error_info:
            resumable_model().fit(ToyDataset())
    model = resumable_model()
    model.fit(ToyDataset(), resume=error_info.value.checkpoint)
    assert same_weights(model_weights(model), model_weights(reference_fit[0]))
    folders = {p.name for p in tmp_path.glob("qtorch-fit-*")}
    assert folders == {Path(error_info.value.checkpoint or "").parent.name}
