"""The model that trains a network with Lightning: fit, predict, finetune, save, load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import pandas as pd
import torch
from torch import nn

from qtorch.core.configured import plain_value
from qtorch.core.errors import ConfigError, NotFittedError, unknown_name
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.runtime import resolve_device
from qtorch.core.serial import State
from qtorch.core.session import session
from qtorch.data.foreign_segments import check_apart
from qtorch.data.sample_set import Samples
from qtorch.data.samples import samples_of
from qtorch.metrics.loss import Loss
from qtorch.model.base import ModelFT
from qtorch.model.error_memory import recalling
from qtorch.model.factories import loss_of, with_rate
from qtorch.model.feeding import readout_of
from qtorch.model.finetuning import FineTuning, Statistics
from qtorch.model.fitting import Fitted, Recipe, fit_network
from qtorch.model.initial import Initial, check_init_from
from qtorch.model.matching import LearntFrom, check_cross_section, check_labels
from qtorch.model.model_state import state_of, take_state, weights_digest
from qtorch.model.network_config import build_network, complete_network, network_config
from qtorch.model.scoring import evaluation_size, score_series
from qtorch.model.statistics import apply_statistics, fitted_statistics
from qtorch.model.trainer_options import device_name, early_stopping, trainer_options
from qtorch.nn.tra import TRA
from qtorch.tracking.current import current_recorder
from qtorch.tracking.lineage import tag_lineage

if TYPE_CHECKING:
    from qtorch.tracking.recorder import Recorder

BATCH: dict[str, Any] = {"size": 800, "order": "random", "days_per_batch": 1, "eval_size": None}
CHECKPOINT: dict[str, Any] = {"every_n_steps": None, "dir": None, "enabled": True}


class LightningModel(ModelFT):
    """A network, how to train it, and after `fit` its weights.

    `network`: a configuration (`{"_target_": "qtorch.nn.LSTM", "hidden_size": 64}`), a dotted
    name, a bare name of qtorch.nn, or a live module, which is copied. `d_feat` (and `step_len`,
    `num_outputs`, where it takes them) are filled from the dataset. Any `torch.nn.Module` will
    do: it is given `x [B, T, F]` (or what its `inputs` declares) and returns `[B]` or `[B, Q]`.
    A `LightningModule` trains itself: its `training_step` and `validation_step` take a `Batch`,
    its `predict_step` returns the scores of one; `loss`, `optimizer`, `scheduler` and
    `inner_steps` are not used, `monitor` is a metric that it logs (ConfigError where it does not).

    `loss`, `optimizer`, `scheduler`: see `qtorch.model.factories`.
    `batch`: `size`, `order` ("random", or "day" for whole days, `days_per_batch` at once),
    `eval_size` (samples a batch where nothing is learnt; by default more on a GPU).
    `trainer`: any argument of pl.Trainer. With `devices` (2, [0, 1], -1) and `num_nodes` above one
    `fit` starts a process for each device; a batch stays as large as on one device and is shared,
    so that their number changes the time and not the result (but for dropout's draws and batch
    norms; for a LightningModule's own loss and metrics see `qtorch.model.own_share`). `strategy`
    is Lightning's: "ddp", or `qtorch.model.sharding.Sharded`, which shards the weights
    (trainer=fsdp).
    `monitor`: the metric whose best epoch's weights are kept: "loss", "ic", "rank_ic" of the
    valid segment, or a full name. `early_stop`: None, a patience in epochs, or a mapping
    (`patience`, `monitor`, `mode`, `min_delta`).
    `checkpoint`: `every_n_steps` (also within an epoch, at each multiple of it), `dir`,
    `enabled`. They lie in the recorder's run, else in a temporary folder.
    `callbacks`: Lightning's, by configuration or live.
    `module`: what trains the network where its training step is another one: a subclass of
    `qtorch.model.ScoreModule` by name, or a configuration with its further arguments.
    `day_label`: `drop_extreme` (share) and `zscore` of each training day's labels; for day
    batches.
    `inner_steps`: batches to one training_step of Lightning; the numbers do not depend on it.
    `compile`: True or the arguments of torch.compile.
    `init_from`: "run:RUN_ID" (of the tracking store in force): `fit` begins with the weights that
    the network shares by name and shape with that run's, which may be of another architecture
    (GATs or HIST from an LSTM or GRU, as their papers do it); its tags name the run. Features are
    matched by name. "run:RUN_ID/NAME" takes the model that was saved there as NAME.
    `seed`: of the weights, dropout and order; None is the session's, or one that is drawn.

    After `fit`: `network_`, `evals_result_` ({"train": {"loss": [...]}, "valid": {...}}),
    `fit_report_` (epochs, seconds, samples a second, ...), `seed_`.
    """

    def __init__(
        self,
        network: str | Mapping[str, Any] | nn.Module,
        loss: Any = "mse",
        optimizer: Any = None,
        scheduler: Any = None,
        *,
        batch: Mapping[str, Any] | None = None,
        trainer: Mapping[str, Any] | None = None,
        monitor: str = "loss",
        early_stop: int | Mapping[str, Any] | None = None,
        checkpoint: Mapping[str, Any] | None = None,
        callbacks: Sequence[Any] = (),
        module: Any = None,
        day_label: Mapping[str, Any] | None = None,
        inner_steps: int | Literal["auto"] = "auto",
        compile: bool | Mapping[str, Any] = False,
        init_from: str | None = None,
        seed: int | None = None,
    ) -> None:
        self.network = network
        self.loss, self.optimizer, self.scheduler = loss, optimizer, scheduler
        self.batch = _merged("batch", batch, BATCH)
        self.trainer = dict(trainer or {})
        self.monitor, self.early_stop = monitor, early_stop
        self.checkpoint = _merged("checkpoint", checkpoint, CHECKPOINT)
        self.callbacks = list(callbacks or ())
        self.module, self.day_label = module, day_label
        self.inner_steps, self.compile, self.seed = inner_steps, compile, seed
        check_init_from(init_from)
        self.init_from = init_from
        trainer_options(self.trainer, ())  # a wrong name is said now, not after the data are read
        self.network_: nn.Module | None = None
        self.network_config_: dict[str, Any] | None = None
        self.learnt_: LearntFrom | None = None
        self.statistics_: State | None = None
        self.optimizer_state_: dict[str, Any] | None = None
        self._loaded_from: Recorder | None = None
        self.evals_result_: dict[str, dict[str, list[float]]] = {}
        self.fit_report_: dict[str, Any] = {}
        self.seed_: int | None = None

    # -- learning ------------------------------------------------------------------------------

    def fit(
        self,
        dataset: Any,
        reweighter: Any = None,
        *,
        recorder: Recorder | None = None,
        resume: str | Path | None = "auto",
    ) -> None:
        """Train on the segments train and valid; the weights of the best epoch stay.

        Metrics go to the recorder by epoch, checkpoints into its run. `resume="auto"` goes on
        from the run's last checkpoint where that is of this very training (else starts anew), a
        path from that checkpoint (ConfigError if it is of another training), None starts anew.
        A training that is resumed, killed however it was, ends with the same weights and metrics
        as one that never was: bit for bit on the CPU with one number of threads and of devices.
        Another number of either is announced; of devices, it goes on with what of the epoch is
        not yet used. A user's own LightningModule resumes so where its state is in its
        `state_dict`, its torchmetrics or its `on_save_checkpoint`; its `on_train_batch_end` comes
        after a checkpoint.

        Ctrl-C stops after the step, keeps a checkpoint and raises TrainingInterrupted (a
        KeyboardInterrupt); a second one ends at once. Raises DataError where there is nothing to
        learn from, ConfigError for what cannot be meant (an `init_from` without such a run or
        without a weight that fits: it names the shapes).
        """
        self._learn(dataset, reweighter, recorder, resume, self._recipe())

    def finetune(
        self,
        dataset: Any,
        reweighter: Any = None,
        *,
        recorder: Recorder | None = None,
        resume: str | Path | None = "auto",
        trainer: Mapping[str, Any] | None = None,
        optimizer: Any = None,
        scheduler: Any = None,
        early_stop: int | Mapping[str, Any] | None = None,
        max_epochs: int | None = None,
        lr: float | None = None,
        train: str | Sequence[str] = "all",
        frozen: Sequence[str] = (),
        layer_decay: float = 1.0,
        unfreeze_every: int | None = None,
        lora: Mapping[str, Any] | None = None,
        keep_optimizer: bool = False,
        statistics: Statistics | None = None,
    ) -> None:
        """Train on from the fitted weights.

        `trainer` (argument by argument), `optimizer`, `scheduler`, `early_stop`, `max_epochs` and
        `lr` stand in for the model's own. What learns on, and how fast: `train`, `frozen`,
        `layer_decay`, `unfreeze_every`, `lora`, `keep_optimizer`, see `FineTuning`.
        `statistics`: what the dataset's processors and batch norms normalise by: "keep" as when
        the weights were learnt, "refit" of the new data, "adapt" half of each; None leaves the
        dataset as it is given. Where the model was loaded from a run, the recorder's tags name it.

        Raises NotFittedError before `fit`, DataError that lists the differences where the data
        do not fit the weights (features are matched by name).
        """
        fitted = self._fitted()
        tuning = FineTuning(
            train=train,
            frozen=frozen,
            layer_decay=layer_decay,
            unfreeze_every=unfreeze_every,
            lora=lora,
            keep_optimizer=keep_optimizer,
            statistics=statistics,
        )
        tuning.check(fitted)
        state = tuning.optimizer_state(fitted, self.optimizer_state_, self.fit_report_)
        epochs = {} if max_epochs is None else {"max_epochs": max_epochs}
        recipe = self._recipe(
            trainer={**self.trainer, **(trainer or {}), **epochs},
            optimizer=with_rate(self.optimizer if optimizer is None else optimizer, lr),
            scheduler=self.scheduler if scheduler is None else scheduler,
            early_stop=self.early_stop if early_stop is None else early_stop,
        )
        if self.learnt_ is not None and statistics in ("keep", "adapt"):
            # Before processors meet columns that they do not know, and can tell but one of them.
            self.learnt_.matched(samples_of(dataset, "train"))
        apply_statistics(dataset, self.statistics_, statistics)
        run = current_recorder() if recorder is None else recorder
        if run is not None and self._loaded_from is not None:
            tag_lineage(run, self._loaded_from)
        self._learn(dataset, reweighter, run, resume, recipe, fitted, tuning, state)

    def _learn(
        self,
        dataset: Any,
        reweighter: Any,
        recorder: Recorder | None,
        resume: str | Path | None,
        recipe: Recipe,
        fitted: nn.Module | None = None,
        tuning: FineTuning | None = None,
        optimizer_state: dict[str, Any] | None = None,
    ) -> None:
        device = resolve_device(device_name(recipe.trainer))
        run = current_recorder() if recorder is None else recorder
        initial = None
        if fitted is None and self.init_from is not None:
            initial = Initial.of(self.init_from, run)
        train = self._samples(dataset, "train", reweighter)
        valid = None
        if "valid" in getattr(dataset, "segments", ("train", "valid")):
            valid = self._samples(dataset, "valid", reweighter)
            check_apart(dataset, train, valid)
        check_labels(train, valid)
        watched = early_stopping(recipe.early_stop, recipe.monitor)[1]
        check_cross_section(train, valid, monitor=watched, day_label=recipe.day_label)
        known = initial if fitted is None else self.learnt_
        if known is not None:
            train, valid = known.matched(train), None if valid is None else known.matched(valid)
        if fitted is None:
            loss = loss_of(self.loss)
            outputs = loss.num_outputs(len(train.label_names)) if isinstance(loss, Loss) else None
            self.network_config_ = None
            spec = complete_network(self.network, train, outputs)
            start = "fresh" if initial is None else initial.digest
        else:
            spec, start = fitted, weights_digest(fitted)

        def make_network() -> nn.Module:
            return build_network(spec) if initial is None else initial.into(build_network(spec))

        result = fit_network(
            make_network,
            train,
            valid,
            recipe,
            device=device,
            recorder=run,
            resume=resume,
            start=start,
            tuning=tuning,
            optimizer_state=optimizer_state,
        )
        if fitted is None:
            self.network_config_ = spec if isinstance(spec, dict) else None
            self.learnt_ = LearntFrom.of(train)
        if initial is not None:
            result.report["init_from"] = initial.described
        self.statistics_ = fitted_statistics(dataset)
        self.seed_ = recipe.seed
        self._take(result)

    def _samples(self, dataset: Any, segment: str, reweighter: Any) -> Samples:
        if callable(getattr(reweighter, "bind", None)):
            reweighter.bind(dataset)
        return samples_of(dataset, segment, data_key="learn").reweighted(reweighter)

    def _take(self, result: Fitted) -> None:
        self.network_ = result.network.eval()
        self.optimizer_state_ = result.optimizer_state
        self.fit_report_ = result.report
        self.evals_result_ = {}
        for epoch in result.history:
            for key, value in epoch.items():
                segment, _, name = key.partition("/")
                group = self.evals_result_.setdefault(segment if name else "train", {})
                group.setdefault(name or segment, []).append(value)

    def _recipe(self, **changes: Any) -> Recipe:
        """The model's arguments, with those of a fine-tuning in their place."""
        trainer = changes.get("trainer", self.trainer)
        seed = self.seed if self.seed is not None else session().seed
        if seed is None:
            seed = int(torch.randint(2**31 - 1, ()))
        checkpoint = dict(self.checkpoint)
        if trainer.get("enable_checkpointing") is False:
            checkpoint["enabled"] = False
        return Recipe(
            loss=self.loss,
            module=self.module,
            day_label=self.day_label,
            optimizer=changes.get("optimizer", self.optimizer),
            scheduler=changes.get("scheduler", self.scheduler),
            batch=self.batch,
            trainer=trainer_options(trainer, self.callbacks),
            monitor=self.monitor,
            early_stop=changes.get("early_stop", self.early_stop),
            checkpoint=checkpoint,
            inner_steps=self.inner_steps,
            compile=dict(self.compile) if isinstance(self.compile, Mapping) else self.compile,
            seed=seed,
        )

    # -- scoring -------------------------------------------------------------------------------

    def predict(self, dataset: Any, segment: str | slice = "test") -> pd.Series:
        """Scores of a segment: float32 Series "score" by (datetime, instrument), each sample once.

        Of several outputs the first is given, or what the loss makes of them. Raises
        NotFittedError before `fit`, DataError where the dataset has another number of features
        than the one that was learnt from.
        """
        network = self._fitted()
        samples = samples_of(dataset, segment, data_key="infer")
        if self.learnt_ is not None:
            samples = self.learnt_.matched(samples)
        device = resolve_device(device_name(trainer_options(self.trainer, ())))
        size = evaluation_size(self.batch, device)
        if isinstance(network, TRA):
            samples = recalling(network, samples.to(device), partial(self._past, dataset))
        return score_series(
            network,
            samples,
            device=device,
            batch_size=size,
            readout=readout_of(loss_of(self.loss)),
        )

    def _past(self, dataset: Any, dates: slice) -> Samples:
        """All samples of some dates that have a label, as they were learnt from."""
        found = samples_of(dataset, dates, data_key="learn", purge=False)
        return found if self.learnt_ is None else self.learnt_.matched(found)

    def _fitted(self) -> nn.Module:
        if self.network_ is None:
            raise NotFittedError(
                f"this {type(self).__name__} has no weights yet: call fit(dataset) first, or load "
                "a fitted one."
            )
        return self.network_

    # -- saving --------------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """The mapping that builds this model, unfitted."""
        arguments = {**self._arguments, "network": network_config(self.network)}
        config = {k: plain_value(v, f"LightningModel.{k}") for k, v in arguments.items()}
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}", **config}

    def to_state(self) -> State:
        """Configuration, figures and weights: JSON and tensors, no pickle.

        Raises ConfigError where an argument is a live object that no configuration describes.
        """
        return state_of(self)

    @classmethod
    def from_state(cls, state: State) -> Self:
        """The model again. Names in it pass the trust rule."""
        built = init_instance_by_config(state.config["model"], stored=True)
        if not isinstance(built, cls):
            raise TypeError(f"the state is of a {type(built).__qualname__}, not a {cls.__name__}.")
        take_state(built, state)
        return built

    def loaded_from(self, recorder: Recorder) -> None:
        """Remember the run whose artifact this model is: a fine-tuning's run names it."""
        self._loaded_from = recorder


def _merged(
    what: str, given: Mapping[str, Any] | None, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    for name in given or {}:
        if name not in defaults:
            raise ConfigError(unknown_name(f"option of {what}", name, defaults))
    return {**defaults, **(given or {})}
