"""Tests of what users of Lightning expect: callbacks, loggers, cut epochs, optimizers, tails."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning import callbacks as lightning_callbacks
from pytorch_lightning.loggers import CSVLogger
from toy_training import ADAM, ToyDataset, ToyRecorder, fit_model, make_model, model_weights
from user_networks import UserModule

from qtorch.core.errors import ConfigError
from qtorch.data.dataset.batch import Batch
from qtorch.data.dataset.batches import BatchLoader, ShardedLoader
from qtorch.model.loop import options
from qtorch.model.loop.checkpoint import CALLBACK_STATE_KEY, LAST, read_checkpoint
from qtorch.model.loop.factories import component_list, optimizer_factory
from qtorch.model.loop.schedules import TrainingLength, WarmupCosine, complete_plan, scheduler_plan
from qtorch.model.loop.training import quiet_lightning

LIGHTNING = "pytorch_lightning.callbacks"


class Watch(pl.Callback):
    """Record the batches, losses and weights of a training."""

    def __init__(self) -> None:
        self.batches: list[list[torch.Tensor]] = []
        self.losses: list[float] = []
        self.steps = 0

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.batches.append([])

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(batch, Batch)
        self.batches[-1].append(batch.date * 1000 + batch.instrument)
        self.losses.append(float(outputs["loss"]))
        self.steps = trainer.global_step


@pytest.mark.parametrize(
    ("trainer", "num_batches", "num_steps"),
    [
        ({"limit_train_batches": 2}, 2, 1),
        ({"overfit_batches": 2}, 2, 1),
        ({"overfit_batches": 0.4}, 6, 2),
        ({"fast_dev_run": 2}, 2, 1),
        ({"fast_dev_run": True}, 1, 1),
        ({"max_steps": 3}, 12, 3),
        ({"max_steps": 3, "limit_train_batches": 5}, 5, 3),
    ],
)
@pytest.mark.parametrize("is_user_module", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_cut_epochs_end_with_a_step(
    dataset: ToyDataset, trainer, num_batches, num_steps, is_user_module
) -> None:
    watch = Watch()
    network = UserModule(4) if is_user_module else None
    trainer = {**trainer, "accumulate_grad_batches": 4}
    monitor = "own_valid_loss" if is_user_module else "loss"
    fit_model(dataset, network, epochs=1, callbacks=[watch], trainer=trainer, monitor=monitor)
    if "max_steps" not in trainer:
        assert watch.steps == num_steps
    else:
        assert watch.steps == min(num_steps, math.ceil(num_batches / 4))
    assert len(watch.batches[0]) == num_batches
    assert all(math.isfinite(loss) for loss in watch.losses)


def test_time_limit_ends_a_training_without_validation(dataset: ToyDataset) -> None:
    trainer = {"max_time": {"seconds": 0}, "accumulate_grad_batches": 4}
    model = fit_model(dataset, early_stop=3, trainer=trainer)
    assert model.fit_report_["epochs"] <= 1


def test_max_steps_before_the_first_validation(dataset: ToyDataset) -> None:
    model = fit_model(dataset, early_stop=3, trainer={"max_steps": 2})
    assert len(model.evals_result_["train"]["loss"]) == 1


def test_overfit_batches_are_the_same_in_every_epoch(dataset: ToyDataset) -> None:
    watch = Watch()
    fit_model(dataset, epochs=3, callbacks=[watch], trainer={"overfit_batches": 2})
    epochs = [torch.cat(batches).sort().values for batches in watch.batches]
    assert len(epochs) == 3
    assert all(torch.equal(epochs[0], epoch) for epoch in epochs)


@pytest.mark.parametrize(
    "callback",
    [
        lightning_callbacks.TQDMProgressBar(),
        lightning_callbacks.RichProgressBar(),
        lightning_callbacks.LearningRateMonitor(),
        lightning_callbacks.DeviceStatsMonitor(cpu_stats=False),
        lightning_callbacks.ModelSummary(),
        lightning_callbacks.RichModelSummary(),
        lightning_callbacks.ThroughputMonitor(batch_size_fn=lambda batch: len(batch.x)),
        lightning_callbacks.Timer(duration="00:01:00:00"),
        lightning_callbacks.LambdaCallback(),
        lightning_callbacks.EarlyStopping("valid/loss"),
    ],
    ids=lambda callback: type(callback).__name__,
)
@pytest.mark.parametrize("has_recorder", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_callbacks_work_with_and_without_a_run_and_a_terminal(
    dataset: ToyDataset, recorder: ToyRecorder, monkeypatch, tmp_path, callback, has_recorder
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: has_recorder)
    trainer = {"enable_progress_bar": True} if has_recorder else {}
    model = make_model(callbacks=[callback], epochs=1, trainer=trainer)
    if not has_recorder:
        del model.trainer["enable_progress_bar"]
    model.fit(dataset, recorder=recorder if has_recorder else None)
    assert math.isfinite(model.evals_result_["valid"]["loss"][0])
    if has_recorder and isinstance(callback, lightning_callbacks.LearningRateMonitor):
        assert any(key == "lr-Adam" for key, *_ in recorder.points)
    if has_recorder and isinstance(callback, lightning_callbacks.ThroughputMonitor):
        assert any("samples" in key for key, *_ in recorder.points)


@pytest.mark.parametrize("has_recorder", [False, True])
def test_files_of_model_checkpoint_stay(
    dataset: ToyDataset, recorder: ToyRecorder, tmp_path, monkeypatch, has_recorder
) -> None:
    monkeypatch.chdir(tmp_path)
    callback = lightning_callbacks.ModelCheckpoint(monitor="valid/loss")
    run = recorder if has_recorder else None
    fit_model(dataset, callbacks=[callback], checkpoint={}, recorder=run)
    assert Path(callback.best_model_path).is_file()
    weights = torch.load(callback.best_model_path, weights_only=True)["state_dict"]
    assert weights


def test_reports_that_the_user_asked_for_are_shown(
    dataset: ToyDataset, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pytorch_lightning"), "propagate", True)
    summary = lightning_callbacks.ModelSummary()
    with caplog.at_level(logging.INFO):
        fit_model(dataset, epochs=1, trainer={"profiler": "simple"}, callbacks=[summary])
    assert "Profiler Report" in caplog.text
    assert "Trainable params" in caplog.text
    assert "available" not in caplog.text  # Lightning's greetings


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ModelPruning", "prune network_ after the fit"),
        ("StochasticWeightAveraging", "EMAWeightAveraging"),
        ("BatchSizeFinder", "batch.size"),
        ("LearningRateFinder", "in a sweep"),
    ],
)
def test_callbacks_that_cannot_work_are_refused_by_name(name: str, text: str) -> None:
    arguments = {
        "ModelPruning": {"pruning_fn": "l1_unstructured"},
        "StochasticWeightAveraging": {"swa_lrs": 0.1},
    }.get(name, {})
    config = {"_target_": f"{LIGHTNING}.{name}", **arguments}
    with pytest.raises(ConfigError, match=rf"(?s){name}.*{text}"):
        make_model(trainer={"callbacks": [config]})


@pytest.mark.parametrize(
    ("callback", "text"),
    [
        (lightning_callbacks.GradientAccumulationScheduler({0: 2}), "accumulate_grad_batches"),
        (lightning_callbacks.BackboneFinetuning(), "unfreeze_every"),
        (lightning_callbacks.EarlyStopping("val_loss"), "valid/loss"),
        (lightning_callbacks.ModelCheckpoint(monitor="valid_loss"), "valid/loss"),
    ],
)
def test_callbacks_for_user_modules_are_refused_before_training(
    dataset: ToyDataset, callback, text
) -> None:
    watch = Watch()
    with pytest.raises(ConfigError, match=text):
        fit_model(dataset, callbacks=[watch, callback])
    assert not watch.batches


def test_components_are_lists_or_named_mappings(dataset: ToyDataset) -> None:
    lambda_callback = {"_target_": f"{LIGHTNING}.LambdaCallback"}
    named = {
        "first": lambda_callback,
        "none": None,
        "bar": {"class": "LearningRateMonitor", "module_path": LIGHTNING},
    }
    for callbacks in (named, OmegaConf.create(named)):
        assert len(make_model(callbacks=callbacks).callbacks) == 2
        fit_model(dataset, epochs=1, trainer={"callbacks": callbacks})
    assert component_list(None) == component_list(False) == []
    assert component_list(f"{LIGHTNING}.Timer") == [f"{LIGHTNING}.Timer"]
    assert component_list([None, lambda_callback]) == [lambda_callback]


def test_omegaconf_containers_are_taken_everywhere(dataset: ToyDataset, tmp_path: Path) -> None:
    arguments = {
        "network": {"_target_": "qtorch.nn.MLP", "layers": [8]},
        "loss": {"mse": 1.0, "mae": 0.5},
        "optimizer": ADAM,
        "scheduler": {"scheduler": {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1}},
        "batch": {"size": 64},
        "early_stop": {"patience": 2},
        "checkpoint": {"enabled": False},
        "compile": False,
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": [0],
            "callbacks": [{"_target_": f"{LIGHTNING}.LambdaCallback"}],
            "logger": [
                {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": str(tmp_path)}
            ],
        },
    }
    plain = fit_model(dataset, **arguments)
    model = fit_model(
        dataset,
        **{k: OmegaConf.create(v) if isinstance(v, dict) else v for k, v in arguments.items()},
    )
    assert model.evals_result_ == plain.evals_result_
    assert model.to_config() == plain.to_config()
    model.finetune(
        dataset,
        trainer=OmegaConf.create({"max_epochs": 1}),
        optimizer=OmegaConf.create(ADAM),
        train=OmegaConf.create(["*"]),
    )


def test_optimizers_in_all_forms_of_a_configuration() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    for spec in (
        {"class": "SGD", "module_path": "torch.optim", "kwargs": {"lr": 0.5}},
        {"class": "torch.optim.SGD", "kwargs": {"lr": 0.5}},
        {"_target_": "torch.optim.SGD", "lr": 0.5},
        OmegaConf.create({"_target_": "torch.optim.SGD", "lr": 0.5}),
    ):
        optimizer = optimizer_factory(spec)(parameters)
        assert isinstance(optimizer, torch.optim.SGD)
        assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer_factory("torch.optim.SGD")(parameters).param_groups[0]["lr"] == 1e-3
    optimizer = optimizer_factory({"lr": 0.25})(parameters)
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_parameter_groups_by_name(dataset: ToyDataset) -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4), torch.nn.Linear(4, 1))
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.1}
    groups = {"*.bias": {"lr": 0.0}, "2.*": {"weight_decay": 0.5}}
    model = fit_model(dataset, network, epochs=1, optimizer={"optimizer": sgd, "groups": groups})
    states = [
        (group["lr"], group["weight_decay"], len(group["params"]))
        for group in model.optimizer_state_["param_groups"]
    ]
    assert states == [(0.1, 0, 1), (0.0, 0, 2), (0.1, 0.5, 1)]
    assert torch.equal(model_weights(model)["1.bias"], network[1].bias)
    model.finetune(dataset, lr=0.2, max_epochs=1)
    assert model.optimizer_state_["param_groups"][0]["lr"] == 0.2
    with pytest.raises(ConfigError, match=r"'head\.\*' matches no parameter"):
        fit_model(dataset, optimizer={"groups": {"head.*": {}}})


# -- loggers ---------------------------------------------------------------------------------------


def test_true_is_the_default_logger_of_lightning(
    dataset: ToyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit_model(dataset, trainer={"logger": True})
    (folder,) = (tmp_path / "lightning_logs").iterdir()  # of TensorBoard, else CSV
    assert {f.name.split(".")[0] for f in folder.iterdir()} & {"metrics", "events"}
    fit_model(dataset, trainer={"logger": False})
    fit_model(dataset)
    assert len(list((tmp_path / "lightning_logs").iterdir())) == 1
    recorder = ToyRecorder(tmp_path)
    fit_model(dataset, trainer={"logger": True}, recorder=recorder)
    assert len(list((tmp_path / "lightning_logs").iterdir())) == 1  # the run has the metrics
    assert ("valid/loss", 1) in recorder.history()


@pytest.mark.parametrize("is_user_module", [False, True])
def test_csv_logger_is_written_after_each_epoch(
    dataset: ToyDataset, tmp_path: Path, is_user_module: bool
) -> None:
    class CountRows(pl.Callback):
        def __init__(self) -> None:
            self.counts: list[int] = []

        def on_train_batch_start(self, *_: Any) -> None:
            text = "".join(p.read_text() for p in tmp_path.rglob("metrics.csv"))
            self.counts.append(len(text.splitlines()))

    network = UserModule(4) if is_user_module else None
    monitor = "own_valid_loss" if is_user_module else "loss"
    trainer = {"logger": CSVLogger(tmp_path), "limit_train_batches": 1}
    count = CountRows()
    fit_model(dataset, network, epochs=4, callbacks=[count], trainer=trainer, monitor=monitor)
    assert len(count.counts) == 4
    assert count.counts == sorted(set(count.counts))  # more rows in every epoch


def test_user_module_finds_what_a_mlflow_logger_has(
    dataset: ToyDataset, recorder: ToyRecorder
) -> None:
    class Module(UserModule):
        def on_train_epoch_end(self) -> None:
            logger = self.logger
            logger.experiment.set_tag(logger.run_id, "note", "own")
            assert self.trainer.log_dir == logger.log_dir == logger.save_dir

    for run in (recorder, None):  # without a run the calls are ignored
        model = make_model(Module(4), epochs=1, monitor="own_valid_loss", checkpoint={})
        model.fit(dataset, recorder=run)
    assert recorder.params == {"d_feat": 4, "lr": 0.05, "dropout": 0.2}


def test_client_of_the_store_is_the_experiment(dataset: ToyDataset, recorder: ToyRecorder) -> None:
    class Module(UserModule):
        def on_train_start(self) -> None:
            self.logger.experiment.calls.append(self.logger.run_id)

    recorder.client = type("Client", (), {"calls": []})()  # type: ignore[attr-defined]
    fit_model(dataset, Module(4), epochs=1, monitor="own_valid_loss", recorder=recorder)
    assert recorder.client.calls == ["toy"]  # type: ignore[attr-defined]


def test_nan_metrics_of_a_user_module_are_reported(dataset: ToyDataset, caplog) -> None:
    class Module(UserModule):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self.log("val_loss", torch.tensor(math.nan), batch_size=1)

    with caplog.at_level(logging.WARNING, logger="qtorch"):
        model = fit_model(dataset, Module(4), epochs=1)
    assert "val_loss is NaN" in caplog.text
    assert model.fit_report_["best_epoch"] is None


def test_missing_package_of_a_logger_is_a_configuration_error(dataset: ToyDataset) -> None:
    config = {"_target_": "pytorch_lightning.loggers.CometLogger"}
    with pytest.raises(ConfigError, match=r"trainer\.logger"):
        fit_model(dataset, trainer={"logger": config})


def test_two_trainings_of_a_run_have_their_own_curves(
    dataset: ToyDataset, recorder: ToyRecorder
) -> None:
    model = fit_model(dataset, recorder=recorder, checkpoint={})
    first = model.evals_result_["valid"]["loss"]
    model.finetune(dataset, recorder=recorder, max_epochs=3)
    second = model.evals_result_["valid"]["loss"]
    other = fit_model(dataset, recorder=recorder, checkpoint={}, seed=4)
    curves: dict[str, list[float]] = {}
    for (key, _), value in recorder.history().items():
        curves.setdefault(key, []).append(value)
    assert curves["valid/loss"] == first
    assert curves["finetune/valid/loss"] == second
    assert curves["fit_2/valid/loss"] == other.evals_result_["valid"]["loss"]
    # So has each its checkpoints, from which it alone is resumed.
    folder = recorder.checkpoint_dir()
    states = [
        read_checkpoint(folder / name / LAST)[CALLBACK_STATE_KEY]
        for name in ("", "finetune", "fit_2")
    ]
    assert len({state["identity"] for state in states}) == 3
    # The same training again keeps its name.
    fit_model(dataset, recorder=recorder, checkpoint={}, seed=4)
    assert not any(key.startswith("fit_3") for key, _ in recorder.history())


# -- optimizers and schedules ----------------------------------------------------------------------


def test_lbfgs_matches_torch_on_the_whole_data(dataset: ToyDataset) -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 1))
    config = {"_target_": "torch.optim.LBFGS", "lr": 0.5, "max_iter": 4}
    samples = dataset.samples("train", data_key="learn")
    arguments = {"optimizer": config, "batch": {"size": len(samples)}, "epochs": 1}
    model = fit_model(dataset, network, **arguments)
    order = BatchLoader(samples, batch_size=len(samples), seed=3)
    optimizer = torch.optim.LBFGS(network.parameters(), lr=0.5, max_iter=4)
    for epoch in range(1):  # of two, the better one is kept
        (batch,) = order.batches(epoch)

        def closure(batch: Batch = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (network(batch.x) - batch.y).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    for name, weights in network.state_dict().items():
        torch.testing.assert_close(model_weights(model)[name], weights, rtol=1e-4, atol=1e-5)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021) over plain gradient descent."""

    def __init__(self, parameters: Any, lr: float, rho: float = 0.5) -> None:
        super().__init__(parameters, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is not None
        group = self.param_groups[0]
        parameters = group["params"]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        moves = [group["rho"] / norm * p.grad for p in parameters]
        for parameter, move in zip(parameters, moves, strict=True):
            parameter.add_(move)
        self.zero_grad()
        closure()
        for parameter, move in zip(parameters, moves, strict=True):
            parameter.sub_(move)
            parameter.sub_(group["lr"] * parameter.grad)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("has_step_hooks", [False, True])
def test_sam_matches_a_hand_written_loop(
    dataset: ToyDataset, accumulate: int, has_step_hooks: bool
) -> None:
    class StepHook(pl.Callback):
        def on_after_backward(self, *_: Any) -> None:
            """Make the module call Lightning's hooks."""

    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 1))
    model = fit_model(
        dataset,
        network,
        epochs=1,
        optimizer=lambda p: SAM(p, lr=0.1),
        trainer={"accumulate_grad_batches": accumulate},
        callbacks=[StepHook()] if has_step_hooks else [],
    )
    samples = dataset.samples("train", data_key="learn")
    batches = list(BatchLoader(samples, batch_size=64, seed=3).batches(0))
    optimizer = SAM(network.parameters(), lr=0.1)
    for begin in range(0, len(batches), accumulate):
        part = batches[begin : begin + accumulate]

        def closure(part: list[Batch] = part) -> None:
            with torch.enable_grad():
                for batch in part:
                    ((network(batch.x) - batch.y).square().mean() / accumulate).backward()

        optimizer.zero_grad()
        closure()
        optimizer.step(closure)
    for name, weights in network.state_dict().items():
        torch.testing.assert_close(model_weights(model)[name], weights, rtol=1e-4, atol=1e-6)


def test_optimizer_with_an_optional_closure_trains_as_without(dataset: ToyDataset) -> None:
    class OwnAdam(torch.optim.Adam):
        """An optimizer of another package."""

    OwnAdam.__module__ = "other_package"
    first = fit_model(dataset, optimizer=lambda p: OwnAdam(p, lr=0.01))
    second = fit_model(dataset, optimizer=ADAM)
    assert first.evals_result_ == second.evals_result_


def test_lbfgs_on_batches_warns(dataset: ToyDataset, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="qtorch"):
        fit_model(dataset, optimizer="lbfgs", epochs=1, trainer={"limit_train_batches": 3})
    assert caplog.text.count("LBFGS takes the difference") == 1


@pytest.mark.parametrize(
    "scheduler",
    [
        {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.01},
        {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": "total_steps"},
        {"class": "qtorch.model.WarmupCosine", "kwargs": {"warmup": 0.1}},
    ],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_schedule_covers_all_steps_of_the_training(
    dataset: ToyDataset, scheduler, accumulate
) -> None:
    class Rates(pl.Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            self.values.append(optimizer.param_groups[0]["lr"])

    rates = Rates()
    trainer = {"accumulate_grad_batches": accumulate}
    fit_model(dataset, epochs=3, scheduler=scheduler, trainer=trainer, callbacks=[rates])
    total = 3 * math.ceil(
        math.ceil(len(dataset.samples("train", data_key="learn")) / 64) / accumulate
    )
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    factories: list[Any] = [
        lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=total),
        lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total),
        lambda: WarmupCosine(optimizer, total, warmup=0.1),
    ]
    name = scheduler.get("_target_", scheduler.get("class")).rpartition(".")[2]
    own = factories[["OneCycleLR", "CosineAnnealingLR", "WarmupCosine"].index(name)]()
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        own.step()
    assert rates.values == pytest.approx(expected)


def test_length_of_a_training() -> None:
    assert TrainingLength(5, 4, -1).total_steps == 20
    assert TrainingLength(5, 4, 7).total_steps == 7
    assert TrainingLength(5, -1, 7).total_epochs == 2
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": "max_epochs"}
    plan = complete_plan(scheduler_plan(cosine), TrainingLength(5, 4, -1))
    assert plan is not None
    assert (plan.interval, plan.factory(optimizer).T_max) == ("epoch", 4)
    onecycle = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.1}
    by_epoch = complete_plan(
        scheduler_plan({"scheduler": onecycle, "interval": "epoch"}), TrainingLength(5, 4, -1)
    )
    assert by_epoch is not None
    assert by_epoch.factory(optimizer).total_steps == 4
    without_momentum = torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ConfigError, match="OneCycleLR does not accept"):
        by_epoch.factory(without_momentum)
    with pytest.raises(ConfigError, match="max_epochs"):
        complete_plan(scheduler_plan(onecycle), TrainingLength(5, -1, -1))


def test_warmup_and_cosine_are_the_closed_form() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = WarmupCosine(optimizer, total_steps=10, warmup=4, final=0.1)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[7] == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half of the cosine
    assert rates[10] == pytest.approx(0.2)


# -- the last batch --------------------------------------------------------------------------------


class BatchNormNetwork(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x[:, -1]))[:, 0]


@pytest.mark.parametrize("batch", [{}, {"drop_last": True}])
def test_tail_of_one_sample_trains_with_batch_norm(dataset: ToyDataset, batch) -> None:
    num_samples = len(dataset.samples("train", data_key="learn"))
    size = next(s for s in range(20, num_samples) if num_samples % s == 1)
    watch = Watch()
    fit_model(
        dataset, BatchNormNetwork(), epochs=1, batch={"size": size, **batch}, callbacks=[watch]
    )
    sizes = [len(b) for b in watch.batches[0]]
    if batch:
        assert sizes == [size] * (num_samples // size)
    else:
        assert sizes[:-2] == [size] * (num_samples // size - 1)
        assert sum(sizes) == num_samples
        assert sizes[-2] - sizes[-1] in (0, 1)


@pytest.mark.parametrize("size", [30, 31, 32])
def test_small_tail_shares_the_samples_of_two_batches(dataset: ToyDataset, size: int) -> None:
    samples = dataset.samples("valid", data_key="learn")
    loader = BatchLoader(samples, batch_size=size, min_tail=size)
    parts = [batch.date * 1000 + batch.instrument for batch in loader.batches(2)]
    whole = [
        batch.date * 1000 + batch.instrument
        for batch in BatchLoader(samples, batch_size=size).batches(2)
    ]
    assert torch.equal(torch.cat(parts), torch.cat(whole))
    assert len(parts) == len(whole)
    assert len(parts[-1]) >= size // 2
    shares = [
        ShardedLoader(samples, batch_size=size, min_tail=size, rank=rank, world_size=2)
        for rank in range(2)
    ]
    for step, batches in enumerate(zip(*(s.batches(2) for s in shares), strict=True)):
        rows = torch.cat([b.date * 1000 + b.instrument for b in batches])
        assert torch.equal(rows, parts[step])


def test_lightning_judges_equal_trainer_arguments_once(monkeypatch) -> None:
    trainers: list[Any] = []
    original_plugins = options._plugins

    def count_trainer(*arguments: Any) -> list[Any]:
        trainers.append(arguments)
        return original_plugins(*arguments)

    monkeypatch.setattr(options, "_plugins", count_trainer)
    for log_every_n_steps in (937, 937, 938):
        make_model(trainer={"log_every_n_steps": log_every_n_steps}).check_settings()
    assert len(trainers) == 2


def test_a_silence_of_lightning_within_another_changes_no_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("pytorch_lightning", "lightning_fabric", "pytorch_lightning.callbacks")
    loggers = [logging.getLogger(name) for name in names]
    initial_levels = [logger.level for logger in loggers]
    with quiet_lightning():
        changes: list[int] = []
        monkeypatch.setattr(logging.Logger, "setLevel", lambda self, level: changes.append(level))
        with quiet_lightning():  # a change of a level clears the caches of all loggers
            pass
        monkeypatch.undo()
        assert changes == []
        assert loggers[2].level == logging.INFO
    assert [logger.level for logger in loggers] == initial_levels
