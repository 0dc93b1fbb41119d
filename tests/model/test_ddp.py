"""A training on two devices is the training on one: weights, metrics, errors, interruptions."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from forked_ranks import DDP, FATE, is_running
from torch import Tensor
from toy_training import ToyDataset, ToyRecorder, resumable_model
from user_networks import LastStep, OwnModule

import qtorch.model.ranks
from qtorch.core.errors import ConfigError
from qtorch.core.heartbeat import listening
from qtorch.data.batches import Batch
from qtorch.model.checkpoint import LAST
from qtorch.model.interruption import TrainingInterrupted
from qtorch.model.lightning_model import LightningModel
from qtorch.model.rank_process import RankProcess, rank_environment
from qtorch.model.ranks import RankError


class Heavier:
    """Weights by place: no two batches weigh alike."""

    def reweight(self, data):
        return np.linspace(0.1, 2.0, len(data))


def _pair(dataset: Any, reweighter: Any = None, **changes: Any) -> list[LightningModel]:
    found = []
    for devices in ({"accelerator": "cpu"}, DDP):
        # In float64, for Adam makes much of the last bit of a gradient near zero: in float32 the
        # default network (two layers of 64) is apart by up to 9.5e-7 after 24 steps, by the seed.
        trainer = {"max_epochs": 2, "gradient_clip_val": 1.0, "precision": "64-true"}
        trainer |= changes.get("trainer", {})
        given = {
            "network": {"_target_": "qtorch.nn.LSTM", "hidden_size": 8},
            **changes,
            "trainer": {**trainer, "enable_progress_bar": False, **devices},
        }
        model = resumable_model(**given)
        model.fit(dataset, reweighter)
        found.append(model)
    return found


def _apart(one: LightningModel, two: LightningModel) -> float:
    first, second = one.network_.state_dict(), two.network_.state_dict()
    return max(float((first[k].double() - second[k].double()).abs().max()) for k in first)


def _same_numbers(one: LightningModel, two: LightningModel, dataset: Any) -> None:
    assert _apart(one, two) < 1e-6
    assert one.evals_result_.keys() == two.evals_result_.keys()
    for segment, values in one.evals_result_.items():
        for name, history in values.items():
            np.testing.assert_allclose(
                history, two.evals_result_[segment][name], atol=1e-6, err_msg=name
            )
    assert one.fit_report_["best_epoch"] == two.fit_report_["best_epoch"]
    first, second = one.predict(dataset), two.predict(dataset)
    assert first.index.equals(second.index)
    np.testing.assert_allclose(first, second, atol=1e-5)


SGD = {"_target_": "torch.optim.SGD", "lr": 0.05, "momentum": 0.9}
MIXED = {"mse": 1.0, "ic": 0.5}
CASES = {
    "random": {"batch": {"size": 80}},
    "as-shipped": {  # by conf/, but for a smaller network: 24 steps
        "batch": {"size": 41},
        "network": {"_target_": "qtorch.nn.LSTM", "hidden_size": 8, "num_layers": 2},
        "optimizer": None,
        "scheduler": None,
        "trainer": {
            "max_epochs": 1,
            "precision": "32-true",
            "gradient_clip_val": 3.0,
            "gradient_clip_algorithm": "value",
        },
    },
    "random-weighted": {"batch": {"size": 80}, "weighted": True},
    "tail-of-one": {"batch": {"size": 487}, "trainer": {"max_epochs": 10}},
    "in-order-accumulated": {
        "batch": {"order": "sequential", "size": 41},
        "trainer": {"accumulate_grad_batches": 3},
    },
    "own-loss": {"batch": {"size": 80}, "loss": torch.nn.functional.mse_loss},
    "plateau": {
        "batch": {"size": 80},
        "scheduler": {
            "scheduler": {
                "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau",
                "patience": 0,
                "threshold": 10.0,
            },
            "monitor": "loss",
        },
    },
    "day": {"batch": {"order": "day", "days_per_batch": 3}},
    "day-in-order-weighted-sum-of-losses": {
        "batch": {"order": "day_sequential", "days_per_batch": 5},
        "loss": MIXED,
        "weighted": True,
        "trainer": {"max_epochs": 3},
    },
    "cross-section": {
        "batch": {"order": "day", "days_per_batch": 3},
        "network": {"_target_": "qtorch.nn.GATs", "hidden_size": 8},
    },
    "bank": {
        "batch": {"order": "day", "days_per_batch": 3},
        "network": {"_target_": "qtorch.nn.IGMTF", "hidden_size": 8},
        "optimizer": SGD,
        "trainer": {"precision": "32-true"},  # its cosines are float32 in any case
        "module": "qtorch.model.IGMTFModule",
    },
}


def test_a_rank_is_told_its_place_and_none_of_a_notebooks_settings(monkeypatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://of_a_notebook")  # matplotlib's import would fail
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")  # another launcher's
    found = rank_environment(1, 0, 2, 3, local=False)
    assert found["MPLBACKEND"] == "Agg"
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("1", "0", "2")
    assert (found["OMP_NUM_THREADS"], "TORCHELASTIC_RUN_ID" in found) == ("3", False)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_devices_give_the_numbers_of_one(forked, case: str) -> None:
    changes = dict(CASES[case])
    reweighter = Heavier() if changes.pop("weighted", False) else None
    dataset = ToyDataset()
    _same_numbers(*_pair(dataset, reweighter, **changes), dataset)


class Few(ToyDataset):
    """Seven samples to learn from, on two days of unequal length."""

    def samples(self, segment, *, data_key="infer", purge=False):
        found = super().samples(segment, data_key=data_key, purge=purge)
        if segment != "train":
            return found
        keep = torch.nonzero(found.date <= found.date[0] + 1)[:, 0][[0, 1, 2, 3, 4, -2, -1]]
        found.date, found.instrument = found.date[keep], found.instrument[keep]
        found.target, found.raw_label = found.target[keep], found.raw_label[keep]
        if found._place is not None:
            found._place = (found._place[0][keep], found._place[1][keep])
        found._known = None
        found._set_days()
        return found


@pytest.mark.slow
@pytest.mark.parametrize("batch", [{"size": 3}, {"size": 7}, {"order": "day", "days_per_batch": 2}])
def test_seven_samples_on_two_devices(forked, batch: dict[str, Any]) -> None:
    dataset = Few()
    assert len(dataset.samples("train")) == 7
    pair = _pair(dataset, batch=batch, trainer={"max_epochs": 8})
    _same_numbers(*pair, dataset)


class OwnByDay(OwnModule):
    """Learns from whole days, each of which counts alike, at a rate that its own metric lowers."""

    def day_losses(self, batch: Batch) -> Tensor:
        error = self.net(batch.x[:, :, -1])[..., 0] - batch.y[..., 0].nan_to_num()
        return (error.square() * batch.mask).sum(1) / batch.mask.sum(1)

    def weight_of(self, batch: Batch) -> int:
        return len(batch.date)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.day_losses(batch)
        self.log_dict({"own_loss": losses.mean()}, on_step=False, on_epoch=True)
        return losses.mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self.day_losses(batch)
        self.log("own_valid_loss", losses.mean(), batch_size=len(losses))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": "own_valid_loss"},
        }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "batch"),
    [(OwnModule, {"size": 81}), (OwnByDay, {"order": "day", "days_per_batch": 3})],
)
def test_a_module_that_trains_itself_gives_the_numbers_of_one_device(
    forked, kind: type[OwnModule], batch: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    network, fits = kind(d_feat=4, dropout=0.0), []
    for devices in ({"accelerator": "cpu", "enable_progress_bar": False}, DDP):
        model = LightningModel(
            network,
            monitor="own_valid_loss",
            batch=batch,
            trainer={"max_epochs": 4, "accumulate_grad_batches": 2, **devices},
            seed=1,
        )
        model.fit(ToyDataset())
        fits.append(model)
    _same_numbers(*fits, ToyDataset())
    assert (fits[1].fit_report_["epochs"], fits[1].fit_report_["devices"]) == (4, 2)
    assert isinstance(fits[1].network_, kind)


@pytest.mark.slow
def test_a_module_that_trains_itself_is_spared_a_batch_too_small(forked) -> None:
    model = LightningModel(
        OwnModule(d_feat=4),
        monitor="own_valid_loss",
        batch={"size": 487},  # and one sample more, which two devices cannot share
        trainer={"max_epochs": 1, **DDP},
        seed=1,
    )
    model.fit(ToyDataset())
    assert model.predict(ToyDataset()).notna().all()


@pytest.mark.slow
def test_metrics_and_signs_of_life_come_once(
    forked, recorder: ToyRecorder, caplog, monkeypatch
) -> None:
    monkeypatch.setattr("qtorch.core.heartbeat.PAUSE_SECONDS", 0.0)
    heard = []
    with (
        listening(lambda stage, details: heard.append((stage, details))),
        caplog.at_level(logging.INFO, logger="qtorch"),
    ):
        model = resumable_model(trainer={"max_epochs": 2, **DDP})
        model.fit(ToyDataset(), recorder=recorder)
    assert len(recorder.logged) == len(recorder.history()) == 2 * 5
    assert [r.getMessage()[:8] for r in caplog.records if "train/loss" in r.getMessage()] == [
        "epoch 0:",
        "epoch 1:",
    ]
    assert {"starting ranks", "training"} <= {stage for stage, _ in heard}
    names = sorted(p.name for p in recorder.checkpoint_dir().iterdir())
    assert names == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert all(rank.exit_code() == 0 for rank in forked)


@pytest.mark.slow
def test_batch_norms_of_shares_are_warned_of(forked, caplog) -> None:
    model = resumable_model(network="MLP", trainer={"max_epochs": 1, **DDP})
    model.fit(ToyDataset())
    assert "batch norms of MLP see each device's share" in caplog.text
    assert model.predict(ToyDataset()).notna().all()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_rank_that_fails_ends_all_with_its_error(
    forked, recorder: ToyRecorder, monkeypatch, caplog, how: str
) -> None:
    monkeypatch.setenv(FATE, f"1:1:3:{how}")
    model = resumable_model(trainer={"max_epochs": 4, **DDP})
    kind = ZeroDivisionError if how == "raise" else RankError
    begin = time.monotonic()
    with pytest.raises(kind) as caught:
        model.fit(ToyDataset(), recorder=recorder)
    assert time.monotonic() - begin < 15
    if how == "raise":
        assert str(caught.value) == "a rank divides by zero"
        assert caught.value.__notes__ == ["in rank 1 of 2"]
        assert "rank 1 of 2 failed" in caplog.text
        assert "forked_ranks.py" in caplog.text  # its traceback
    else:
        assert "rank 1 of 2 was ended by SIGKILL" in str(caught.value)
    assert not [rank.pid for rank in forked if psutil.pid_exists(rank.pid)]
    assert not list(recorder.checkpoint_dir().glob(".ranks-*"))


@pytest.mark.slow
def test_a_rank_with_a_program_of_its_own_fails_and_leaves_nothing(
    recorder: ToyRecorder, monkeypatch, tmp_path: Path
) -> None:
    told, started = tmp_path / "pid", []

    class Kept(RankProcess):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            started.append(self.pid)

    class Failing(LastStep):
        def forward(self, x: Tensor) -> Tensor:
            if os.environ.get("RANK") == "1":
                told.write_text(str(subprocess.Popen(["sleep", "600"]).pid))
                raise ZeroDivisionError("a rank divides by zero")
            return super().forward(x)

    monkeypatch.setattr(qtorch.model.ranks, "RankProcess", Kept)
    with pytest.raises(ZeroDivisionError) as caught:
        resumable_model(network=Failing(4), trainer=DDP).fit(ToyDataset(), recorder=recorder)
    assert caught.value.__notes__ == ["in rank 1 of 2"]
    end = time.monotonic() + 5
    left = {*started, int(told.read_text())}
    assert len(left) == 3
    while (left := {p for p in left if is_running(p)}) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left
    assert not list(recorder.checkpoint_dir().glob(".ranks-*"))


@pytest.mark.slow
def test_ctrl_c_stops_all_ranks_after_one_step(
    forked, recorder: ToyRecorder, monkeypatch, caplog
) -> None:
    changes = {"trainer": {"max_epochs": 3, **DDP}}
    whole = resumable_model(**changes)
    whole.fit(ToyDataset())
    with monkeypatch.context() as patch:
        patch.setenv(FATE, "1:1:7:stop")
        with pytest.raises(TrainingInterrupted, match=r"in epoch 1 after batch \d+ of 20") as stop:
            resumable_model(**changes).fit(ToyDataset(), recorder=recorder)
    assert stop.value.checkpoint == str(recorder.checkpoint_dir() / LAST)
    again = resumable_model(**changes)
    again.fit(ToyDataset(), recorder=recorder)
    assert again.fit_report_["resumed_from"] is not None
    assert _apart(whole, again) == 0
    assert again.evals_result_ == whole.evals_result_


@pytest.mark.parametrize("name", ["TRA", "ADARNN", "TCTS", "ADD", "TabNet"])
def test_steps_that_cannot_be_shared_are_refused_by_name(dataset: ToyDataset, name: str) -> None:
    model = LightningModel(
        {"_target_": "qtorch.nn.MLP"},
        module=f"qtorch.model.{name}Module",
        batch={"order": "day", "days_per_batch": 4},
        trainer=DDP,
    )
    with pytest.raises(ConfigError, match=f"{name}Module does not train on 2 devices: it"):
        model.fit(dataset)


def test_a_step_of_ones_own_must_say_whether_it_can_be_shared(dataset: ToyDataset) -> None:
    class Mine(qtorch.model.ScoreModule):
        def training_sums(self, batch):
            return super().training_sums(batch)

    model = LightningModel("MLP", module=Mine, trainer=DDP)
    with pytest.raises(ConfigError, match="Mine has a training step of its own"):
        model.fit(dataset)


@pytest.mark.parametrize(
    ("trainer", "batch", "said"),
    [
        ({"strategy": "ddp_spawn"}, {}, "starts its processes itself"),
        ({"num_nodes": 2}, {}, "torchrun --nnodes 2 --nproc-per-node 2"),
        ({"devices": "many"}, {}, "expected a number of devices"),
        ({"num_nodes": 0}, {}, "num_nodes is 0"),
        ({}, {"order": "day"}, "set batch.days_per_batch to 2 or more"),
        ({}, {"size": 1}, "set batch.size to 2 or more"),
    ],
)
def test_what_cannot_be_meant(dataset, trainer, batch, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LightningModel("MLP", batch=batch, trainer={**DDP, **trainer}).fit(dataset)


FSDP = {**DDP, "strategy": {"_target_": "qtorch.model.sharding.Sharded"}}


@pytest.mark.slow
def test_sharded_weights_learn_the_same(forked, recorder: ToyRecorder) -> None:
    changes = {
        "network": {"_target_": "qtorch.nn.Transformer", "d_model": 8, "nhead": 2, "dropout": 0.0},
        "batch": {"size": 80},
        "optimizer": {**SGD, "lr": 0.003},
    }
    fits = []
    for devices in ({"accelerator": "cpu", "enable_progress_bar": False}, FSDP):
        model = resumable_model(
            **changes, trainer={"max_epochs": 2, "gradient_clip_val": 1.0, **devices}
        )
        model.fit(ToyDataset(), recorder=recorder if devices is FSDP else None)
        fits.append(model)
    _same_numbers(*fits, ToyDataset())
    assert type(fits[1].network_).__name__ == "Transformer"
    longer = {"max_epochs": 3, "gradient_clip_val": 1.0}
    whole = resumable_model(**changes, trainer={**longer, **DDP, "devices": 1})
    whole.fit(ToyDataset())
    again = resumable_model(**changes, trainer={**longer, **FSDP})
    again.fit(ToyDataset(), recorder=recorder)
    assert again.fit_report_["resumed_from"] is not None
    _same_numbers(whole, again, ToyDataset())


@pytest.mark.slow
def test_ranks_that_would_not_share_their_weights_are_refused(forked) -> None:
    strategy = {"_target_": "pytorch_lightning.strategies.ModelParallelStrategy"}
    with pytest.raises(ConfigError, match=r"over 1 of 2 devices: use .*sharding\.Sharded"):
        resumable_model(trainer={**DDP, "strategy": strategy}).fit(ToyDataset())


@pytest.mark.slow
def test_layers_that_learn_one_after_the_other(forked) -> None:
    """The averaging of gradients bears weights that do not learn yet."""
    fits = []
    for devices in ({"accelerator": "cpu", "enable_progress_bar": False}, DDP):
        given = {"max_epochs": 1, "precision": "64-true"}
        model = resumable_model(
            network={"_target_": "qtorch.nn.LSTM", "hidden_size": 8}, trainer={**given, **devices}
        )
        model.fit(ToyDataset())
        model.finetune(ToyDataset(), unfreeze_every=1, trainer={"max_epochs": 3})
        fits.append(model)
    _same_numbers(*fits, ToyDataset())
