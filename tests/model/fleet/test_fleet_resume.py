"""A fleet that is killed continues where its last complete epoch ended."""

from __future__ import annotations

import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_process import ForkedProcess
from toy_training import ToyDataset, ToyRecorder, make_model, model_weights, same_weights

from qtorch.model import TrainingInterrupted, fit_fleet
from qtorch.model.fleet.checkpoint import FOLDER
from qtorch.model.fleet.training import FleetTraining
from qtorch.model.lightning_model import LightningModel
from qtorch.model.loop.checkpoint import LAST, PREVIOUS

pytestmark = pytest.mark.slow

NUM_MEMBERS = 8
NETWORK = {"_target_": "qtorch.nn.LSTM", "hidden_size": 8, "dropout": 0.3}


def make_members() -> list[LightningModel]:
    """Return members with schedules, dropout and early stops, of which the last ends first."""
    schedule = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": "max_epochs"}
    return [
        make_model(
            NETWORK,
            epochs=5 if k < NUM_MEMBERS - 1 else 2,
            seed=k // 2,
            optimizer={"lr": 0.003 * (1 + k % 2)},
            scheduler=schedule if k % 2 else None,
            early_stop=3,
            checkpoint={"enabled": True},
        )
        for k in range(NUM_MEMBERS)
    ]


def make_recorders(folder: Path) -> list[Any]:
    recorders = []
    for k in range(NUM_MEMBERS):
        (folder / str(k)).mkdir(parents=True, exist_ok=True)
        recorder = ToyRecorder(folder / str(k))
        recorder.id = f"run {k}"
        recorders.append(recorder)
    return recorders


def train(folder: str, kill_step: int = -1, signal_number: int = signal.SIGKILL) -> None:
    """Train the fleet in a folder; send this process a signal at its `kill_step`-th step."""
    torch.set_num_threads(1)
    step, train_step = 0, FleetTraining._train_step

    def counting_step(self: FleetTraining, batch: Any) -> Any:
        nonlocal step
        if step == kill_step:
            os.kill(os.getpid(), signal_number)
        step += 1
        return train_step(self, batch)

    FleetTraining._train_step = counting_step  # type: ignore[method-assign]
    models = make_members()

    def save(number: int) -> None:
        torch.save(models[number].network_.state_dict(), Path(folder, f"{number}.pt"))

    # A fit that ended before a kill is not repeated, as a finished run is not.
    todo = [k for k in range(NUM_MEMBERS) if not Path(folder, f"{k}.pt").exists()]
    recorders = make_recorders(Path(folder))
    fit_fleet(
        [models[k] for k in todo],
        ToyDataset(),
        recorders=[recorders[k] for k in todo],
        on_fitted=lambda place: save(todo[place]),
    )


def train_in_process(*arguments: Any) -> int:
    """Train in another process; return its exit code."""
    return ForkedProcess(partial(train, *arguments)).wait()


@pytest.fixture(scope="module")
def whole_fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole_fleet")
    assert train_in_process(str(folder)) == 0
    return folder


def assert_equal_results(folder: Path, whole_fleet: Path) -> None:
    for k in range(NUM_MEMBERS):
        weights, expected = (torch.load(f / f"{k}.pt") for f in (folder, whole_fleet))
        assert same_weights(weights, expected), k
        history = ToyRecorder(folder / str(k)).history()
        assert history == ToyRecorder(whole_fleet / str(k)).history()


def test_killed_fleets_end_as_whole_fleets(tmp_path: Path, whole_fleet: Path) -> None:
    """QTORCH_FLEET_KILLS: how many fleets are killed, each at a random step."""
    draws = random.Random(1)
    for kill in range(int(os.environ.get("QTORCH_FLEET_KILLS", "3"))):
        folder = tmp_path / str(kill)
        folder.mkdir()
        assert train_in_process(str(folder), draws.randrange(80)) == -signal.SIGKILL
        assert train_in_process(str(folder)) == 0
        assert_equal_results(folder, whole_fleet)


def test_interrupted_fleet_is_resumed_by_the_same_call(tmp_path: Path) -> None:
    dataset = ToyDataset()
    whole, first, second = make_members(), make_members(), make_members()
    fit_fleet(whole, dataset)
    original_round, num_rounds = FleetTraining.run_round, 0

    def stop_in_third_round(self: FleetTraining, is_stop_requested: Any) -> bool:
        nonlocal num_rounds
        num_rounds += 1
        return original_round(self, is_stop_requested if num_rounds < 3 else lambda: True)

    FleetTraining.run_round = stop_in_third_round  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            fit_fleet(first, dataset, recorders=make_recorders(tmp_path))
    finally:
        FleetTraining.run_round = original_round  # type: ignore[method-assign]
    assert first[0].network_ is None
    assert first[-1].network_ is not None  # it had ended after two rounds
    fit_fleet(second[:-1], dataset, recorders=make_recorders(tmp_path)[:-1])
    for a, b in zip(whole[:-1], second[:-1], strict=True):
        assert same_weights(model_weights(a), model_weights(b))
        assert a.evals_result_ == b.evals_result_
        assert b.fit_report_["resumed_from"].endswith(f"{FOLDER}/{LAST}")


def stop_fleet(folder: Path, dataset: ToyDataset) -> list[Any]:
    """Train two epochs of a fleet of five; return its recorders."""
    recorders, rounds = make_recorders(folder), 0
    original_round = FleetTraining.run_round

    def two_rounds(self: FleetTraining, is_stop_requested: Any) -> bool:
        nonlocal rounds
        rounds += 1
        return rounds <= 2 and original_round(self, is_stop_requested)

    FleetTraining.run_round = two_rounds  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            fit_fleet(make_members(), dataset, recorders=recorders)
    finally:
        FleetTraining.run_round = original_round  # type: ignore[method-assign]
    return recorders


def test_a_member_is_resumed_alone(tmp_path: Path) -> None:
    dataset, whole = ToyDataset(), make_members()
    fit_fleet(whole, dataset)
    recorders = stop_fleet(tmp_path, dataset)
    model = make_members()[3]
    model.fit(dataset, recorder=recorders[3])
    assert model.fit_report_["resumed_from"] is not None
    assert model.fit_report_["epochs"] == whole[3].fit_report_["epochs"]
    for name, weight in model_weights(whole[3]).items():
        assert torch.allclose(model_weights(model)[name], weight, atol=1e-5)


def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset, whole = ToyDataset(), make_members()
    fit_fleet(whole, dataset)
    recorders = stop_fleet(tmp_path, dataset)
    path = recorders[0].checkpoint_dir() / FOLDER / LAST
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    models = make_members()[:7]
    fit_fleet(models, dataset, recorders=recorders[:7])
    assert "cannot be read as a checkpoint" in caplog.text
    assert models[0].fit_report_["resumed_from"].endswith(PREVIOUS)
    for name, weight in model_weights(whole[0]).items():
        assert torch.allclose(model_weights(models[0])[name], weight, atol=1e-5)


def test_checkpoint_of_another_training_is_not_used(tmp_path: Path) -> None:
    dataset = ToyDataset()
    recorders = stop_fleet(tmp_path, dataset)
    models = make_members()[:2]
    for model in models:
        model.batch["size"] = 50
    fit_fleet(models, dataset, recorders=recorders[:2])
    assert all(m.fit_report_["resumed_from"] is None for m in models)


def test_error_of_an_interrupted_member_says_how_to_resume(tmp_path: Path) -> None:
    from qtorch.model.fleet.fleet import Fleet

    dataset, recorders = ToyDataset(), make_recorders(tmp_path)
    models, errors = make_members()[:2], []

    def fit(k: int) -> None:
        try:
            models[k].fit(dataset, recorder=recorders[k])
        except TrainingInterrupted as stop:
            errors.append(stop)
            raise

    original_round = FleetTraining.run_round
    rounds = iter([True, False])
    FleetTraining.run_round = lambda self, ask: next(rounds) and original_round(self, ask)  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            Fleet().run([lambda k=k: fit(k) for k in (0, 1)])
    finally:
        FleetTraining.run_round = original_round  # type: ignore[method-assign]
    assert len(errors) == 2
    assert "interrupted in epoch 1" in str(errors[0])
    assert Path(errors[0].checkpoint).is_dir()


def fit_two_members(folder: Path, epochs: int, **changes: Any) -> list[LightningModel]:
    models = [
        make_model(NETWORK, epochs=epochs, seed=seed, checkpoint={"enabled": True}, **changes)
        for seed in range(2)
    ]
    fit_fleet(models, ToyDataset(), recorders=make_recorders(folder)[:2])
    return models


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ((2, None), (4, None)),  # epochs, patience
        ((6, 0), (6, 2)),
        ((2, None), (2, None)),  # whose process was killed after the training
        ((3, None), (2, None)),
    ],
    ids=["more epochs", "more patience", "as long", "shorter"],
)
def test_longer_fleet_is_as_if_there_had_been_no_end(tmp_path: Path, short, long) -> None:
    """A shorter one ends where it is."""
    options = {"optimizer": {"lr": 0.03}, "monitor": "loss"}
    shorter = fit_two_members(tmp_path / "run", short[0], early_stop=short[1], **options)
    longer = fit_two_members(tmp_path / "run", long[0], early_stop=long[1], **options)
    whole = fit_two_members(tmp_path / "whole", long[0], early_stop=long[1], **options)
    for k, (model, expected) in enumerate(zip(longer, whole, strict=True)):
        if short[0] > long[0]:
            expected = shorter[k]
        assert same_weights(model_weights(model), model_weights(expected))
        assert model.evals_result_ == expected.evals_result_
        assert Path(model.fit_report_["resumed_from"]).name == LAST
    if short[1] is not None:
        epochs = [[m.fit_report_["epochs"] for m in models] for models in (shorter, longer)]
        assert epochs[0] < epochs[1]


def test_a_fleet_of_no_epochs_keeps_the_initial_weights(tmp_path: Path) -> None:
    models = fit_two_members(tmp_path, 0, early_stop=None)
    for model in models:
        single = make_model(NETWORK, epochs=0, seed=model.seed, early_stop=None)
        single.fit(ToyDataset())
        assert same_weights(model_weights(model), model_weights(single))
