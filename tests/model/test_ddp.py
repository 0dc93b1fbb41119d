"""A training on two devices matches one device: weights, metrics, errors, interruptions."""

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
from forked_ranks import DDP, FAULT_VARIABLE, is_running
from torch import Tensor
from toy_training import ToyDataset, ToyRecorder, resumable_model
from user_networks import LastStep, UserModule

import qtorch.model.devices.ranks
from qtorch.core.errors import ConfigError
from qtorch.data.dataset.batch import Batch
from qtorch.model.devices.rank_process import build_rank_variables, start_rank
from qtorch.model.devices.ranks import RankError
from qtorch.model.lightning_model import LightningModel
from qtorch.model.loop.checkpoint import LAST
from qtorch.model.loop.curves import TRAININGS_FILE
from qtorch.model.loop.interruption import TrainingInterrupted
from qtorch.process.child import Child
from qtorch.process.heartbeat import listen


class PositionReweighter:
    """Weight samples by position, so that no two batches have the same weight."""

    def reweight(self, data):
        return np.linspace(0.1, 2.0, len(data))


def _fit_on_one_and_two_devices(
    dataset: Any, reweighter: Any = None, **changes: Any
) -> list[LightningModel]:
    models = []
    for devices in ({"accelerator": "cpu"}, DDP):
        # Use float64 because Adam amplifies the last bit of gradients near zero: in float32 the
        # default network (two layers of 64) differs by up to 9.5e-7 after 24 steps.
        trainer = {"max_epochs": 2, "gradient_clip_val": 1.0, "precision": "64-true"}
        trainer |= changes.get("trainer", {})
        arguments = {
            "network": {"_target_": "qtorch.nn.LSTM", "hidden_size": 8},
            **changes,
            "trainer": {**trainer, "enable_progress_bar": False, **devices},
        }
        model = resumable_model(**arguments)
        model.fit(dataset, reweighter)
        models.append(model)
    return models


def _max_weight_difference(first_model: LightningModel, second_model: LightningModel) -> float:
    first_weights, second_weights = (
        first_model.network_.state_dict(),
        second_model.network_.state_dict(),
    )
    return max(
        float((first_weights[k].double() - second_weights[k].double()).abs().max())
        for k in first_weights
    )


def _assert_same_results(
    first_model: LightningModel, second_model: LightningModel, dataset: Any
) -> None:
    assert _max_weight_difference(first_model, second_model) < 1e-6
    assert first_model.evals_result_.keys() == second_model.evals_result_.keys()
    for segment, values in first_model.evals_result_.items():
        for name, history in values.items():
            np.testing.assert_allclose(
                history, second_model.evals_result_[segment][name], atol=1e-6, err_msg=name
            )
    assert first_model.fit_report_["best_epoch"] == second_model.fit_report_["best_epoch"]
    first_scores, second_scores = first_model.predict(dataset), second_model.predict(dataset)
    assert first_scores.index.equals(second_scores.index)
    np.testing.assert_allclose(first_scores, second_scores, atol=1e-5)


SGD = {"_target_": "torch.optim.SGD", "lr": 0.05, "momentum": 0.9}
COMBINED_LOSS = {"mse": 1.0, "ic": 0.5}
CASES = {
    "random": {"batch": {"size": 80}},
    "as-shipped": {  # as in conf/, except for a smaller network: 24 steps
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
        "loss": COMBINED_LOSS,
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
        "trainer": {"precision": "32-true"},  # its cosine similarities are always float32
        "module": "qtorch.model.IGMTFModule",
    },
}


def test_rank_variables_replace_those_of_notebooks_and_launchers(monkeypatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://of_a_notebook")  # importing matplotlib would fail
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")  # set by another launcher
    variables = build_rank_variables(1, 0, 2, threads=3, is_single_node=False)
    assert variables["MPLBACKEND"] == "Agg"
    assert (variables["RANK"], variables["LOCAL_RANK"], variables["WORLD_SIZE"]) == ("1", "0", "2")
    assert (variables["OMP_NUM_THREADS"], "TORCHELASTIC_RUN_ID" in variables) == ("3", False)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_devices_match_one_device(rank_processes, case: str) -> None:
    changes = dict(CASES[case])
    reweighter = PositionReweighter() if changes.pop("weighted", False) else None
    dataset = ToyDataset()
    _assert_same_results(*_fit_on_one_and_two_devices(dataset, reweighter, **changes), dataset)


class SevenSamples(ToyDataset):
    """A dataset with seven training samples on two days of different size."""

    def samples(self, segment, *, data_key="infer", purge=False):
        segment_samples = super().samples(segment, data_key=data_key, purge=purge)
        if segment != "train":
            return segment_samples
        keep = torch.nonzero(segment_samples.date <= segment_samples.date[0] + 1)[:, 0][
            [0, 1, 2, 3, 4, -2, -1]
        ]
        segment_samples.date, segment_samples.instrument = (
            segment_samples.date[keep],
            segment_samples.instrument[keep],
        )
        segment_samples.target, segment_samples.raw_label = (
            segment_samples.target[keep],
            segment_samples.raw_label[keep],
        )
        if segment_samples._storage_index is not None:
            segment_samples._storage_index = (
                segment_samples._storage_index[0][keep],
                segment_samples._storage_index[1][keep],
            )
        segment_samples._cached_table = None
        segment_samples._set_days()
        return segment_samples


@pytest.mark.slow
@pytest.mark.parametrize("batch", [{"size": 3}, {"size": 7}, {"order": "day", "days_per_batch": 2}])
def test_seven_samples_on_two_devices(rank_processes, batch: dict[str, Any]) -> None:
    dataset = SevenSamples()
    assert len(dataset.samples("train")) == 7
    pair = _fit_on_one_and_two_devices(dataset, batch=batch, trainer={"max_epochs": 8})
    _assert_same_results(*pair, dataset)


class UserModuleByDay(UserModule):
    """A user module whose loss is a mean over days; its scheduler monitors its own metric."""

    def day_losses(self, batch: Batch) -> Tensor:
        error = self.net(batch.x[:, :, -1])[..., 0] - batch.y[..., 0].nan_to_num()
        return (error.square() * batch.mask).sum(1) / batch.mask.sum(1)

    def batch_weight(self, batch: Batch) -> int:
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
    [(UserModule, {"size": 81}), (UserModuleByDay, {"order": "day", "days_per_batch": 3})],
)
def test_user_module_on_two_devices_matches_one_device(
    rank_processes, kind: type[UserModule], batch: dict[str, Any]
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
    _assert_same_results(*fits, ToyDataset())
    assert (fits[1].fit_report_["epochs"], fits[1].fit_report_["devices"]) == (4, 2)
    assert isinstance(fits[1].network_, kind)


@pytest.mark.slow
def test_user_module_skips_a_batch_smaller_than_the_number_of_devices(rank_processes) -> None:
    model = LightningModel(
        UserModule(d_feat=4),
        monitor="own_valid_loss",
        batch={"size": 487},  # leaves one more sample, which two devices cannot share
        trainer={"max_epochs": 1, **DDP},
        seed=1,
    )
    model.fit(ToyDataset())
    assert model.predict(ToyDataset()).notna().all()


@pytest.mark.slow
def test_metrics_and_heartbeats_arrive_once(
    rank_processes, recorder: ToyRecorder, caplog, monkeypatch
) -> None:
    monkeypatch.setattr("qtorch.process.heartbeat.PAUSE_SECONDS", 0.0)
    heartbeats = []
    with (
        listen(lambda stage, details: heartbeats.append((stage, details))),
        caplog.at_level(logging.INFO, logger="qtorch"),
    ):
        model = resumable_model(trainer={"max_epochs": 2, **DDP})
        model.fit(ToyDataset(), recorder=recorder)
    assert len(recorder.points) == len(recorder.history()) == 2 * 5
    assert [r.getMessage()[:8] for r in caplog.records if "train/loss" in r.getMessage()] == [
        "epoch 0:",
        "epoch 1:",
    ]
    assert {"starting ranks", "training"} <= {stage for stage, _ in heartbeats}
    names = sorted(p.name for p in recorder.checkpoint_dir().iterdir())
    assert names == ["best.ckpt", "last.ckpt", "previous.ckpt", TRAININGS_FILE]
    assert all(rank.exit_status.code == 0 for rank in rank_processes)


@pytest.mark.slow
def test_unsynchronized_batch_norms_are_warned_about(rank_processes, caplog) -> None:
    model = resumable_model(network="MLP", trainer={"max_epochs": 1, **DDP})
    model.fit(ToyDataset())
    assert "batch norms of MLP normalize each device's share" in caplog.text
    assert model.predict(ToyDataset()).notna().all()


@pytest.mark.slow
@pytest.mark.parametrize("action", ["raise", "kill"])
def test_failing_rank_stops_all_ranks_with_its_error(
    rank_processes, recorder: ToyRecorder, monkeypatch, caplog, action: str
) -> None:
    monkeypatch.setenv(FAULT_VARIABLE, f"1:1:3:{action}")
    model = resumable_model(trainer={"max_epochs": 4, **DDP})
    error_class = ZeroDivisionError if action == "raise" else RankError
    start_time = time.monotonic()
    with pytest.raises(error_class) as error_info:
        model.fit(ToyDataset(), recorder=recorder)
    assert time.monotonic() - start_time < 15
    if action == "raise":
        assert str(error_info.value) == "a rank divides by zero"
        assert error_info.value.__notes__ == ["in rank 1 of 2"]
        assert "rank 1 of 2 failed" in caplog.text
        assert "forked_ranks.py" in caplog.text  # its traceback
    else:
        assert "rank 1 of 2 was killed by SIGKILL" in str(error_info.value)
    assert not [rank.pid for rank in rank_processes if psutil.pid_exists(rank.pid)]
    assert not list(recorder.checkpoint_dir().glob(".ranks-*"))


@pytest.mark.slow
def test_failing_rank_process_leaves_no_processes_or_files(
    recorder: ToyRecorder, monkeypatch, tmp_path: Path
) -> None:
    pid_file, children = tmp_path / "pid", []

    def start(*args: Any, **kwargs: Any) -> Child:
        children.append(start_rank(*args, **kwargs))
        return children[-1]

    class FailingNetwork(LastStep):
        def forward(self, x: Tensor) -> Tensor:
            if os.environ.get("RANK") == "1":
                pid_file.write_text(str(subprocess.Popen(["sleep", "600"]).pid))
                raise ZeroDivisionError("a rank divides by zero")
            return super().forward(x)

    monkeypatch.setattr(qtorch.model.devices.ranks, "start_rank", start)
    with pytest.raises(ZeroDivisionError) as error_info:
        resumable_model(network=FailingNetwork(4), trainer=DDP).fit(ToyDataset(), recorder=recorder)
    assert error_info.value.__notes__ == ["in rank 1 of 2"]
    deadline = time.monotonic() + 5
    pids = {*(child.pid for child in children), int(pid_file.read_text())}
    assert len(pids) == 3
    while (pids := {p for p in pids if is_running(p)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not pids
    assert not list(recorder.checkpoint_dir().glob(".ranks-*"))


@pytest.mark.slow
def test_ctrl_c_stops_all_ranks_after_the_same_step(
    rank_processes, recorder: ToyRecorder, monkeypatch, caplog
) -> None:
    changes = {"trainer": {"max_epochs": 3, **DDP}}
    reference = resumable_model(**changes)
    reference.fit(ToyDataset())
    with monkeypatch.context() as patch:
        patch.setenv(FAULT_VARIABLE, "1:1:7:stop")
        interrupted_model = resumable_model(**changes)
        with pytest.raises(
            TrainingInterrupted, match=r"in epoch 1 after batch \d+ of 20"
        ) as error_info:
            interrupted_model.fit(ToyDataset(), recorder=recorder)
    assert "has the best weights so far, of epoch 0" in str(error_info.value)
    loss = reference.evals_result_["valid"]["loss"][0]
    assert interrupted_model.evals_result_["valid"]["loss"] == [loss]
    scores = interrupted_model.predict(ToyDataset())
    assert scores.notna().all()
    assert not scores.equals(reference.predict(ToyDataset()))  # of a later epoch
    assert error_info.value.checkpoint == str(recorder.checkpoint_dir() / LAST)
    resumed_model = resumable_model(**changes)
    resumed_model.fit(ToyDataset(), recorder=recorder)
    assert resumed_model.fit_report_["resumed_from"] is not None
    assert _max_weight_difference(reference, resumed_model) == 0
    assert resumed_model.evals_result_ == reference.evals_result_


@pytest.mark.parametrize("name", ["TRA", "ADARNN", "TCTS", "ADD", "TabNet"])
def test_methods_that_cannot_share_a_batch_are_refused(dataset: ToyDataset, name: str) -> None:
    model = LightningModel(
        {"_target_": "qtorch.nn.MLP"},
        module=f"qtorch.model.{name}Module",
        batch={"order": "day", "days_per_batch": 4},
        trainer=DDP,
    )
    with pytest.raises(ConfigError, match=f"{name}Module cannot train on 2 devices: it"):
        model.fit(dataset)


def test_custom_step_must_declare_whether_it_can_be_shared(dataset: ToyDataset) -> None:
    class CustomModule(qtorch.model.ScoreModule):
        def training_sums(self, batch):
            return super().training_sums(batch)

    model = LightningModel("MLP", module=CustomModule, trainer=DDP)
    with pytest.raises(ConfigError, match="CustomModule has its own training step"):
        model.fit(dataset)


@pytest.mark.parametrize(
    ("trainer", "batch", "message"),
    [
        ({"strategy": "ddp_spawn"}, {}, "starts its processes itself"),
        ({"num_nodes": 2}, {}, "torchrun --nnodes 2 --nproc-per-node 2"),
        ({"devices": "many"}, {}, "expected a number of devices"),
        ({"devices": ","}, {}, "trainer.devices is ','; expected a number of devices"),
        ({"num_nodes": 0}, {}, "num_nodes is 0"),
        ({}, {"order": "day"}, "Set batch.days_per_batch to 2 or more"),
        ({}, {"size": 1}, "Set batch.size to 2 or more"),
    ],
)
def test_invalid_device_settings_raise(dataset, trainer, batch, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LightningModel("MLP", batch=batch, trainer={**DDP, **trainer}).fit(dataset)


FSDP_TRAINER = {**DDP, "strategy": {"_target_": "qtorch.model.Sharded"}}


@pytest.mark.slow
def test_sharded_weights_match_one_device(rank_processes, recorder: ToyRecorder) -> None:
    changes = {
        "network": {"_target_": "qtorch.nn.Transformer", "d_model": 8, "nhead": 2, "dropout": 0.0},
        "batch": {"size": 80},
        "optimizer": {**SGD, "lr": 0.003},
    }
    fits = []
    for devices in ({"accelerator": "cpu", "enable_progress_bar": False}, FSDP_TRAINER):
        model = resumable_model(
            **changes, trainer={"max_epochs": 2, "gradient_clip_val": 1.0, **devices}
        )
        model.fit(ToyDataset(), recorder=recorder if devices is FSDP_TRAINER else None)
        fits.append(model)
    _assert_same_results(*fits, ToyDataset())
    assert type(fits[1].network_).__name__ == "Transformer"
    trainer = {"max_epochs": 3, "gradient_clip_val": 1.0}
    reference = resumable_model(**changes, trainer={**trainer, **DDP, "devices": 1})
    reference.fit(ToyDataset())
    resumed_model = resumable_model(**changes, trainer={**trainer, **FSDP_TRAINER})
    resumed_model.fit(ToyDataset(), recorder=recorder)
    assert resumed_model.fit_report_["resumed_from"] is not None
    _assert_same_results(reference, resumed_model, ToyDataset())


@pytest.mark.slow
def test_tensor_parallel_strategy_is_refused(rank_processes) -> None:
    strategy = {"_target_": "pytorch_lightning.strategies.ModelParallelStrategy"}
    with pytest.raises(ConfigError, match=r"over 1 of 2 devices: use .*model\.Sharded"):
        resumable_model(trainer={**DDP, "strategy": strategy}).fit(ToyDataset())


@pytest.mark.slow
def test_gradual_unfreezing_works_on_two_devices(rank_processes) -> None:
    """DDP can average gradients although some weights are not trained yet."""
    fits = []
    for devices in ({"accelerator": "cpu", "enable_progress_bar": False}, DDP):
        trainer = {"max_epochs": 1, "precision": "64-true"}
        model = resumable_model(
            network={"_target_": "qtorch.nn.LSTM", "hidden_size": 8}, trainer={**trainer, **devices}
        )
        model.fit(ToyDataset())
        model.finetune(ToyDataset(), unfreeze_every=1, trainer={"max_epochs": 3})
        fits.append(model)
    _assert_same_results(*fits, ToyDataset())
