"""The small parts of a training by themselves."""

# ruff: noqa: NPY002 - the global generator is what is tested

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import MLFlowLogger
from toy_training import ToyDataset, ToyRecorder, resumable_model

from qtorch import R
from qtorch.core.errors import ConfigError
from qtorch.data.batches import BatchLoader
from qtorch.model.checkpoint import (
    KEEPER,
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    CheckpointError,
    newest_checkpoint,
    read_checkpoint,
    save_rotating,
)
from qtorch.model.factories import explained, loss_of, optimizer_factory, scheduler_plan
from qtorch.model.generators import generator_states, preserved_generators, restore_generators
from qtorch.model.recorder_logger import RecorderLogger
from qtorch.model.step_loader import StepLoader
from qtorch.model.tally import Tally, weighted_mean
from qtorch.model.trainer_options import (
    check_monitor,
    early_stopping,
    limited,
    monitored,
    trainer_options,
)
from qtorch.tracking.mlflow_store import store_at


def _draws() -> list[float]:
    drawn = [torch.rand(()).item(), random.random(), random.gauss(0, 1)]
    return [*drawn, np.random.rand(), np.random.randn()]


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    random.gauss(0, 1)
    np.random.randn()
    torch.save(generator_states(), tmp_path / "states.pt")
    expected = _draws()
    restore_generators(torch.load(tmp_path / "states.pt", weights_only=True))
    assert _draws() == expected


def test_generators_are_given_back() -> None:
    states = generator_states()
    with preserved_generators():
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        _draws()
    after = _draws()
    restore_generators(states)
    assert _draws() == after


def _loader(**options) -> StepLoader:
    samples = ToyDataset(num_days=10).samples("train", data_key="learn")
    return StepLoader(BatchLoader(samples, batch_size=10, seed=1), lambda: 0, **options)


def flat(parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [batch for part in parts for batch in part]


def _rows(loader: StepLoader) -> list[list[torch.Tensor]]:
    return [[b.instrument + 1000 * b.date for b in steps] for steps in loader]


def test_steps_hold_the_epochs_batches_in_their_order() -> None:
    single = [b for part in _rows(_loader()) for b in part]
    for inner_steps, cut in ((4, None), (100, None), (4, 3)):
        loader = _loader(inner_steps=inner_steps, cut_every=cut)
        parts = _rows(loader)
        assert len(parts) == len(loader)
        assert all(torch.equal(a, b) for a, b in zip(flat(parts), single, strict=True))
    ends = np.cumsum([len(part) for part in _rows(_loader(inner_steps=4, cut_every=3))])
    assert set(range(3, len(single), 3)) <= set(ends)


def test_an_epoch_left_in_the_middle_of_a_step_goes_on_there() -> None:
    whole = [b for part in _rows(_loader()) for b in part]
    loader = _loader(inner_steps=4)
    seen: list[torch.Tensor] = []
    for number, steps in enumerate(loader):
        for batch in steps:
            seen.append(batch.instrument + 1000 * batch.date)
            if number == 1 and len(seen) == 6:
                break
        if len(seen) == 6:
            break
    again = _loader(inner_steps=4)
    again.load_state_dict(loader.state_dict())
    parts = _rows(again)
    assert len(parts) == len(loader) - 2  # Lightning has counted the step that was left
    seen += flat(parts)
    assert all(torch.equal(a, b) for a, b in zip(seen, whole, strict=True))
    assert len(_rows(again)) == len(loader)  # the next epoch is whole


def test_tally_is_a_weighted_mean_in_float64() -> None:
    tally = Tally()
    for _ in range(1000):
        tally.add(torch.tensor(0.1) * 3, 3)
        tally.add(torch.tensor(0.0), torch.tensor(1.0))
    assert weighted_mean(*tally.sums().tolist()) == pytest.approx(0.1 * 3 / 4, rel=1e-7)
    other = Tally()
    other.load(tally.state(), torch.device("cpu"))
    assert torch.equal(other.sums(), tally.sums())


def test_checkpoints_rotate_and_damage_is_passed_over(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    for number in range(3):
        content = {KEEPER: {"number": number}}
        save_rotating(lambda path, c=content: io.save_checkpoint(c, path), tmp_path)
    assert read_checkpoint(tmp_path / LAST)[KEEPER]["number"] == 2
    assert read_checkpoint(tmp_path / PREVIOUS)[KEEPER]["number"] == 1
    (tmp_path / LAST).write_bytes(b"nothing")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0].name == PREVIOUS
    (tmp_path / LAST).unlink()  # a crash between the two renames
    assert newest_checkpoint(tmp_path) is not None
    torch.save({"weights": 1}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="no checkpoint that a fit of qtorch"):
        read_checkpoint(tmp_path / "foreign.ckpt")


def test_the_logger_sends_and_ends_nothing(recorder: ToyRecorder) -> None:
    logger = RecorderLogger(recorder)  # type: ignore[arg-type]
    logger.log_metrics({"a": torch.tensor(1.5), "epoch": 3}, step=7)
    logger.log_metrics({"epoch": 3}, step=8)
    logger.finalize("success")
    assert recorder.logged == [("a", 7, 1.5)]
    assert not hasattr(recorder, "end_run")


def test_monitors_and_limits() -> None:
    assert monitored("loss") == ("valid/loss", "min")
    assert monitored("rank_ic") == ("valid/rank_ic", "max")
    assert monitored("val_rmse") == ("val_rmse", "min")
    assert early_stopping(None, "ic")[1:] == ("valid/ic", "max")
    stopper, name, mode = early_stopping({"patience": 4, "monitor": "ic"}, "loss")
    assert stopper is not None
    assert (stopper.patience, name, mode) == (4, "valid/ic", "max")
    assert [limited(10, limit) for limit in (None, 3, 30, 0.5, 1.0)] == [10, 3, 10, 5, 10]
    options = trainer_options({"max_epochs": 3, "gradient_clip_val": 2}, ())
    assert options.rest == {"max_epochs": 3}
    assert options.clip_value == 2.0


def test_a_metric_that_nothing_gives_is_named() -> None:
    check_monitor("valid/ic", "train/loss")
    with pytest.raises(ConfigError, match=r"metric to monitor 'icc'. Did you mean 'ic'"):
        check_monitor("icc")


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_epochs", "abc"), ("max_epochs", 2.5), ("gradient_clip_val", "x"), ("max_steps", True)],
)
def test_a_word_in_a_numbers_place_is_named(name, value) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.{name} is .*; expected a .*number"):
        trainer_options({name: value}, ())


def test_what_an_optimizer_refuses_is_told_with_what_was_given() -> None:
    factory = explained(optimizer_factory({"_target_": "torch.optim.SGD", "lr": "abc"}))
    with pytest.raises(ConfigError, match=r"the optimizer SGD does not take {'lr': 'abc'}"):
        factory([torch.nn.Parameter(torch.zeros(1))])


def test_factories() -> None:
    parameter = [torch.nn.Parameter(torch.zeros(1))]
    for spec, rate in (
        (None, 1e-3),
        ("sgd", 1e-3),
        ({"_target_": "torch.optim.AdamW", "lr": 0.5}, 0.5),
        (lambda p: torch.optim.Adam(p, lr=0.25), 0.25),
    ):
        assert optimizer_factory(spec)(parameter).param_groups[0]["lr"] == rate
    plan = scheduler_plan({"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 2})
    assert plan is not None
    assert plan.factory(optimizer_factory(None)(parameter)).step_size == 2
    assert loss_of({"_target_": "qtorch.metrics.loss.Huber", "delta": 2.0}).delta == 2.0
    for wrong in (3, {"lr": 3}):
        with pytest.raises(ConfigError):
            optimizer_factory(wrong)
    with pytest.raises(ConfigError, match="interval"):
        scheduler_plan({"scheduler": lambda o: None, "interval": "day"})


@pytest.mark.slow
def test_lightnings_mlflow_logger_makes_no_second_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    named = {"_target_": "pytorch_lightning.loggers.MLFlowLogger"}
    with R.uri_context(uri):
        with R.start(experiment_name="other"):
            other = R.get_recorder().id
        with R.start(experiment_name="one"):
            run = R.get_recorder()
            own = MLFlowLogger(run_id=other, tracking_uri=uri)
            loggers = [named, MLFlowLogger("one", tracking_uri=uri), own]
            trainer = {"max_epochs": 2, "accelerator": "cpu", "logger": loggers}
            resumable_model(trainer=trainer).fit(ToyDataset(), recorder=run)
            assert R.get_recorder(recorder_id=run.id).status == "RUNNING"
        kept = R.get_recorder(recorder_id=other)
        assert set(R.list_experiments()) == {"Default", "one", "other"}
        assert set(R.list_recorders(experiment_name="one")) == {run.id}
    points = store_at(uri).client.get_metric_history(run.id, "valid/loss")
    assert [p.step for p in points] == [0, 1]
    assert set(kept.logged("valid/loss")) == {0, 1}  # a run of its own is the user's wish
