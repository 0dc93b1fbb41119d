"""The model that trains a network with Lightning: fit, predict, finetune, save, load."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import pandas as pd
import torch
from torch import nn

from qtorch.core.configured import plain_value
from qtorch.core.errors import ConfigError, DataError, NotFittedError, unknown_name
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.runtime import resolve_device
from qtorch.core.serial import State
from qtorch.core.session import session
from qtorch.data.sample_set import Samples
from qtorch.data.samples import samples_of
from qtorch.model.base import ModelFT
from qtorch.model.fitting import Fitted, Recipe, fit_network
from qtorch.model.network_config import build_network, complete_network, network_config
from qtorch.model.scoring import evaluation_size, score_series
from qtorch.model.trainer_options import device_name, trainer_options
from qtorch.tracking.current import current_recorder

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
    `inner_steps` are not used, `monitor` is a metric that it logs.

    `loss`, `optimizer`, `scheduler`: see `qtorch.model.factories`.
    `batch`: `size`, `order` ("random", or "day" for whole days, `days_per_batch` at once),
    `eval_size` (samples a batch where nothing is learnt; by default more on a GPU).
    `trainer`: any argument of pl.Trainer.
    `monitor`: the metric whose best epoch's weights are kept: "loss", "ic", "rank_ic" of the
    valid segment, or a full name. `early_stop`: None, a patience in epochs, or a mapping
    (`patience`, `monitor`, `mode`, `min_delta`).
    `checkpoint`: `every_n_steps` (also within an epoch, at each multiple of it), `dir`,
    `enabled`. They lie in the recorder's run, else in a temporary folder.
    `callbacks`: Lightning's, by configuration or live.
    `inner_steps`: batches to one training_step of Lightning; the numbers do not depend on it.
    `compile`: True or the arguments of torch.compile.
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
        inner_steps: int | Literal["auto"] = "auto",
        compile: bool | Mapping[str, Any] = False,
        seed: int | None = None,
    ) -> None:
        self.network = network
        self.loss, self.optimizer, self.scheduler = loss, optimizer, scheduler
        self.batch = _merged("batch", batch, BATCH)
        self.trainer = dict(trainer or {})
        self.monitor, self.early_stop = monitor, early_stop
        self.checkpoint = _merged("checkpoint", checkpoint, CHECKPOINT)
        self.callbacks = list(callbacks or ())
        self.inner_steps, self.compile, self.seed = inner_steps, compile, seed
        trainer_options(self.trainer, ())  # a wrong name is said now, not after the data are read
        self.network_: nn.Module | None = None
        self.network_config_: dict[str, Any] | None = None
        self.num_features_: int | None = None
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
        as one that never was: bit for bit on the CPU with one number of threads.

        Ctrl-C stops after the step, keeps a checkpoint and raises TrainingInterrupted (a
        KeyboardInterrupt); a second one ends at once. Raises DataError where there is nothing to
        learn from, ConfigError for what cannot be meant.
        """
        self._learn(dataset, reweighter, recorder, resume, self.trainer, self.optimizer, None)

    def finetune(
        self,
        dataset: Any,
        reweighter: Any = None,
        *,
        recorder: Recorder | None = None,
        resume: str | Path | None = "auto",
        trainer: Mapping[str, Any] | None = None,
        optimizer: Any = None,
    ) -> None:
        """Train on from the fitted weights, with a new optimizer.

        `trainer` and `optimizer` stand in for the model's own; `trainer` argument by argument.
        Raises NotFittedError before `fit`.
        """
        fitted = self._fitted()
        arguments = {**self.trainer, **(trainer or {})}
        chosen = self.optimizer if optimizer is None else optimizer
        self._learn(dataset, reweighter, recorder, resume, arguments, chosen, fitted)

    def _learn(
        self,
        dataset: Any,
        reweighter: Any,
        recorder: Recorder | None,
        resume: str | Path | None,
        trainer: Mapping[str, Any],
        optimizer: Any,
        fitted: nn.Module | None,
    ) -> None:
        recipe = self._recipe(trainer, optimizer)
        device = resolve_device(device_name(recipe.trainer))
        train = samples_of(dataset, "train", data_key="learn").reweighted(reweighter)
        valid = None
        if "valid" in getattr(dataset, "segments", ("train", "valid")):
            valid = samples_of(dataset, "valid", data_key="learn").reweighted(reweighter)
        _check_labels(train, valid)
        spec = complete_network(self.network, train) if fitted is None else fitted
        if fitted is not None:
            self._check_features(train)
        result = fit_network(
            lambda: build_network(spec),
            train,
            valid,
            recipe,
            device=device,
            recorder=current_recorder() if recorder is None else recorder,
            resume=resume,
            start="fresh" if fitted is None else _weights_digest(fitted),
        )
        if fitted is None:
            self.network_config_ = spec if isinstance(spec, dict) else None
        self.num_features_ = train.num_features
        self.seed_ = recipe.seed
        self._take(result)

    def _take(self, result: Fitted) -> None:
        self.network_ = result.network.eval()
        self.fit_report_ = result.report
        self.evals_result_ = {}
        for epoch in result.history:
            for key, value in epoch.items():
                segment, _, name = key.partition("/")
                group = self.evals_result_.setdefault(segment if name else "train", {})
                group.setdefault(name or segment, []).append(value)

    def _recipe(self, trainer: Mapping[str, Any], optimizer: Any) -> Recipe:
        seed = self.seed if self.seed is not None else session().seed
        if seed is None:
            seed = int(torch.randint(2**31 - 1, ()))
        checkpoint = dict(self.checkpoint)
        if trainer.get("enable_checkpointing") is False:
            checkpoint["enabled"] = False
        return Recipe(
            loss=self.loss,
            optimizer=optimizer,
            scheduler=self.scheduler,
            batch=self.batch,
            trainer=trainer_options(trainer, self.callbacks),
            monitor=self.monitor,
            early_stop=self.early_stop,
            checkpoint=checkpoint,
            inner_steps=self.inner_steps,
            compile=dict(self.compile) if isinstance(self.compile, Mapping) else self.compile,
            seed=seed,
        )

    # -- scoring -------------------------------------------------------------------------------

    def predict(self, dataset: Any, segment: str | slice = "test") -> pd.Series:
        """Scores of a segment: float32 Series "score" by (datetime, instrument), each sample once.

        Of several outputs the first is given. Raises NotFittedError before `fit`, DataError where
        the dataset has another number of features than the one that was learnt from.
        """
        network = self._fitted()
        samples = samples_of(dataset, segment, data_key="infer")
        self._check_features(samples)
        device = resolve_device(device_name(trainer_options(self.trainer, ())))
        size = evaluation_size(self.batch, device)
        return score_series(network, samples, device=device, batch_size=size)

    def _fitted(self) -> nn.Module:
        if self.network_ is None:
            raise NotFittedError(
                f"this {type(self).__name__} has no weights yet: call fit(dataset) first, or load "
                "a fitted one."
            )
        return self.network_

    def _check_features(self, samples: Samples) -> None:
        if self.num_features_ not in (None, samples.num_features):
            raise DataError(
                f"the dataset has {samples.num_features} features, the model learnt from "
                f"{self.num_features_}."
            )

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
        state: dict[str, Any] = {"model": self.to_config(), "fitted": None}
        if self.network_ is None:
            return State(state)
        state["fitted"] = {
            "network": self.network_config_ or network_config(self.network),
            "num_features": self.num_features_,
            "seed": self.seed_,
            "evals_result": _json_numbers(self.evals_result_),
            "fit_report": _json_numbers(self.fit_report_),
        }
        weights = self.network_.state_dict()
        return State(state, {k: v.detach().cpu().clone() for k, v in weights.items()})

    @classmethod
    def from_state(cls, state: State) -> Self:
        """The model again. Names in it pass the trust rule."""
        built = init_instance_by_config(state.config["model"], stored=True)
        if not isinstance(built, cls):
            raise TypeError(f"the state is of a {type(built).__qualname__}, not a {cls.__name__}.")
        fitted = state.config["fitted"]
        if fitted is not None:
            built.network_ = build_network(fitted["network"], stored=True).eval()
            built.network_.load_state_dict(state.tensors)
            built.network_config_ = fitted["network"]
            built.num_features_, built.seed_ = fitted["num_features"], fitted["seed"]
            built.evals_result_ = _floats(fitted["evals_result"])
            built.fit_report_ = fitted["fit_report"]
        return built


def _merged(
    what: str, given: Mapping[str, Any] | None, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    for name in given or {}:
        if name not in defaults:
            raise ConfigError(unknown_name(f"option of {what}", name, defaults))
    return {**defaults, **(given or {})}


def _check_labels(train: Samples, valid: Samples | None) -> None:
    for name, samples in (("train", train), ("valid", valid)):
        if samples is None:
            continue
        if not len(samples):
            raise DataError(f"the segment {name!r} holds no sample.")
        if samples.target is None:
            raise DataError(f"the samples of {name!r} have no label to learn from.")
        if bool(samples.target.isnan().all()):
            raise DataError(f"the label is NaN in all {len(samples)} samples of {name!r}.")


def _weights_digest(network: nn.Module) -> str:
    hashed = hashlib.sha256()
    for name, value in network.state_dict().items():
        hashed.update(name.encode())
        hashed.update(
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return hashed.hexdigest()[:32]


def _json_numbers(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, Mapping):
        return {k: _json_numbers(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_numbers(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _floats(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _floats(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_floats(v) for v in value]
    return math.nan if value is None else value
