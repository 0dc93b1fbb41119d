"""LightningModel: a network that is trained with Lightning (fit, predict, finetune, save, load)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import pandas as pd
import torch
from torch import Tensor, nn

from qtorch.core.configured import plain_value
from qtorch.core.errors import (
    ConfigError,
    DataError,
    NotFittedError,
    check_count,
    check_name,
)
from qtorch.core.names import import_path
from qtorch.core.plain import resolve_config
from qtorch.core.runtime import reuse_freed_memory
from qtorch.core.serial import State
from qtorch.core.session import session
from qtorch.data.dataset.batches import ORDERS
from qtorch.data.dataset.qlib_dataset import check_disjoint_days, get_samples
from qtorch.data.dataset.samples import Samples, require_segment
from qtorch.metrics.loss import BaseLoss
from qtorch.model.base import ModelFT
from qtorch.model.devices.numerics import check_matmul_precision, numerical_settings
from qtorch.model.devices.ranks import check_devices
from qtorch.model.devices.step_graph import GraphMode, check_cuda_graph
from qtorch.model.finetune import (
    FineTuning,
    InitialWeights,
    StatisticsMode,
    apply_statistics,
    check_initial_run,
    check_weights_source,
    check_weights_target,
    get_statistics,
    weights_digest,
    write_weights_file,
)
from qtorch.model.fit import fit_network
from qtorch.model.fleet.current import current_fleet
from qtorch.model.fleet.fleet import fit_as_member
from qtorch.model.input_schema import (
    InputSchema,
    check_cross_section,
    check_labels,
    has_valid_segment,
    load_training_samples,
)
from qtorch.model.loop.day_label import build_day_label
from qtorch.model.loop.factories import (
    build_loss,
    check_optimizer,
    component_list,
    with_learning_rate,
)
from qtorch.model.loop.interruption import TrainingInterrupted
from qtorch.model.loop.module import get_module_class
from qtorch.model.loop.options import (
    build_early_stopping,
    check_arguments,
    check_callbacks,
    check_monitor,
    check_valid_segment,
    check_validation,
    resolve_inner_steps,
    trainer_device,
    trainer_options,
)
from qtorch.model.loop.schedules import check_schedule
from qtorch.model.loop.scoring import evaluation_batch_size, get_readout, score_series
from qtorch.model.loop.training import quiet_lightning
from qtorch.model.network_config import (
    build_network,
    check_network_sizes,
    class_to_config,
    complete_network_config,
    is_lightning_module,
    network_config,
)
from qtorch.model.nonfinite import check_scores, check_weights
from qtorch.model.recipe import FitInputs, FitResult, Recipe
from qtorch.model.state import extract_tensors, insert_tensors, replace_nonfinite, restore_nan
from qtorch.tracking.recorder import current_recorder, tag_lineage
from qtorch.tracking.run_description import describe_run, is_unnamed

if TYPE_CHECKING:
    from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

# Prefixes of tensors that are not weights of the network. No module name can contain "@".
STATISTICS_PREFIX, OPTIMIZER_PREFIX = "@statistics.", "@optimizer."
BATCH_DEFAULTS: dict[str, Any] = {
    "size": 800,
    "order": "random",
    "days_per_batch": 1,
    "eval_size": None,
    "drop_last": False,
}
CHECKPOINT_DEFAULTS: dict[str, Any] = {"every_n_steps": None, "dir": None, "enabled": True}


class LightningModel(ModelFT):
    """A network, the settings of its training and, after `fit`, its weights.

    `network`: a configuration (`{"_target_": "qtorch.nn.LSTM", "hidden_size": 64}`), a dotted name,
    a bare name in qtorch.nn, a class at the top level of a module or notebook, or a live module,
    which is copied. `d_feat` (and `step_len` and `num_outputs` if the network has them) are filled
    in from the dataset. Any `torch.nn.Module`
    works: it receives `x [B, T, F]` (or what its `inputs` declares) and returns `[B]` or `[B, Q]`.
    A `LightningModule` uses its own training loop: its `training_step` and `validation_step` take a
    `Batch`, and its `predict_step` returns the scores of a batch; `loss`, `optimizer`, `scheduler`
    and `inner_steps` are ignored, and `monitor` is a metric that it logs (otherwise ConfigError).

    `loss`, `optimizer`: see `qtorch.model.loop.factories`; `scheduler`: see
    `qtorch.model.loop.schedules`.
    `batch`: `size`, `order` ("random", or "day" for batches of `days_per_batch` whole days),
    `eval_size` (batch size for validation and prediction; the default is larger on a GPU),
    `drop_last` (leave out a smaller last batch in training. Without it, a network with batch norms
    shares the samples of the last two batches equally if the last one has a single sample).
    `trainer`: any argument of pl.Trainer. If `devices` (2, [0, 1], -1) times `num_nodes` is above
    one, `fit` starts a process for each device. A batch has the same total size as on one device
    and is shared among them, so that the number of devices changes the time and not the result
    (except for dropout masks and batch norms; for the loss and metrics of a LightningModule see
    `qtorch.model.loop.user_module`). `strategy` is Lightning's: "ddp", or `qtorch.model.Sharded`,
    which shards the weights (trainer=fsdp).
    `monitor`: the metric that selects the best epoch, whose weights are kept: "loss", "ic" or
    "rank_ic" of the valid segment, or a full name.
    `early_stop`: None, a patience in epochs, or a mapping (`patience`, `monitor`, `mode`,
    `min_delta`).
    `checkpoint`: `every_n_steps` (also save within an epoch, at each multiple of it), `dir`,
    `enabled`. Checkpoints are saved in the recorder's run, or in a temporary folder if there is no
    recorder.
    `callbacks`: Lightning callbacks, configured or live: a list, or a mapping of names to them.
    `module`: a subclass of `qtorch.model.ScoreModule` for networks with a training step of their
    own, as a name or a configuration with its additional arguments.
    `day_label`: `drop_extreme` (fraction) and `zscore` of each training day's labels; needs day
    batches.
    `inner_steps`: batches per Lightning training_step; the numbers do not depend on it.
    `compile`: True or the arguments of torch.compile.
    `cuda_graph`: "auto" records the training step on a GPU as a CUDA graph, whose replay takes less
    of the host's time, compares it with ordinary steps before the first one, and keeps to those if
    it differs or is not possible (a line in the log says why, and `fit_report_` whether it was
    used). True raises ConfigError instead, and accepts a network and a loss of the user's own: what
    they do on the host must be the same in each step.
    `matmul_precision`: "highest", "high" or "medium" of torch.set_float32_matmul_precision, in fits
    and predictions. On a GPU "high" computes matrix products and cuDNN's layers with TensorFloat-32
    and "highest" neither of them. None leaves torch's settings unchanged.
    `init_from`: "run:RUN_ID" (in the current tracking store): `fit` starts from that run's weights
    wherever name and shape match. The run may have another architecture (GATs or HIST start from an
    LSTM or GRU, as in their papers). Features are matched by name, and tags record the source run.
    "run:RUN_ID/NAME" uses the model that was saved there as NAME. "file:PATH" starts from a file of
    weights by name (`torch.save(network.state_dict(), PATH)`, as of Qlib's LSTM, or safetensors);
    its features are those of the dataset, in the same order.
    `allow_nonfinite`: accept NaN and infinite weights after a training, and return NaN and infinite
    scores, instead of raising DataError. It can also be set later, as an attribute.
    `seed`: seed of initial weights, dropout and sample order; None uses the session's seed, or a
    random one.

    After `fit`: `network_`, `evals_result_` ({"train": {"loss": [...]}, "valid": {...}}),
    `fit_report_` (epochs, seconds, samples per second, ...), `seed_`.
    """

    def __init__(
        self,
        network: str | Mapping[str, Any] | type[nn.Module] | nn.Module,
        loss: Any = "mse",
        optimizer: Any = None,
        scheduler: Any = None,
        *,
        batch: Mapping[str, Any] | None = None,
        trainer: Mapping[str, Any] | None = None,
        monitor: str = "loss",
        early_stop: int | Mapping[str, Any] | None = None,
        checkpoint: Mapping[str, Any] | None = None,
        callbacks: Sequence[Any] | Mapping[str, Any] = (),
        module: Any = None,
        day_label: Mapping[str, Any] | None = None,
        inner_steps: int | Literal["auto"] = "auto",
        compile: bool | Mapping[str, Any] = False,
        cuda_graph: GraphMode = False,
        matmul_precision: str | None = None,
        init_from: str | None = None,
        allow_nonfinite: bool = False,
        seed: int | None = None,
    ) -> None:
        self.network = class_to_config(network) if isinstance(network, type) else network
        self.loss, self.optimizer, self.scheduler = loss, optimizer, scheduler
        self.batch = _merge_options("batch", batch, BATCH_DEFAULTS)
        if trainer is not None and not isinstance(trainer, Mapping):
            raise ConfigError(f"trainer is {trainer!r}; expected arguments of pl.Trainer by name.")
        self.trainer = dict(trainer or {})
        self.monitor, self.early_stop = monitor, early_stop
        self.checkpoint = _merge_options("checkpoint", checkpoint, CHECKPOINT_DEFAULTS)
        self.callbacks = component_list(callbacks)
        self.module, self.day_label = module, day_label
        self.inner_steps, self.compile, self.seed = inner_steps, compile, seed
        check_cuda_graph(cuda_graph)
        check_matmul_precision(matmul_precision)
        self.cuda_graph, self.matmul_precision = cuda_graph, matmul_precision
        check_initial_run(init_from)
        self.init_from, self.allow_nonfinite = init_from, allow_nonfinite
        # Fail now on a wrong name, not after loading data.
        check_validation(early_stop, monitor, trainer_options(self.trainer, ()))
        self.network_: nn.Module | None = None
        self.network_config_: dict[str, Any] | None = None
        self.input_schema_: InputSchema | None = None
        self.statistics_: State | None = None
        self.optimizer_state_: dict[str, Any] | None = None
        self._source_recorder: Recorder | None = None
        self.evals_result_: dict[str, dict[str, list[float]]] = {}
        self.fit_report_: dict[str, Any] = {}
        self.seed_: int | None = None

    @classmethod
    def suggest_place(cls, name: str) -> str | None:
        from qtorch.model.argument_hints import suggest_place  # imports all networks

        return suggest_place(name)

    # -- training ------------------------------------------------------------------------------

    def fit(
        self,
        dataset: Any,
        reweighter: Any = None,
        *,
        recorder: Recorder | None = None,
        resume: str | Path | None = "auto",
        evals_result: dict[str, Any] | None = None,
        save_path: str | Path | None = None,
        verbose: bool = True,
    ) -> None:
        """Train on the segments "train" and "valid" and keep the weights of the best epoch.

        Metrics are logged to the recorder once an epoch; checkpoints are saved in its run.
        `evals_result` gets the lists "train" and "valid" of a score per epoch, as by Qlib's
        networks: the monitored metric, or the negative of one that is better if lower. The scores
        of "train" are negative losses if the monitored metric is one of validation alone. (All
        metrics are in `evals_result_`.) `save_path` is a file for the network's weights of the best
        epoch, by name as of `torch.save(network.state_dict(), save_path)`. `verbose=False` shows no
        progress bar.

        `resume="auto"` resumes from the run's last checkpoint if it belongs to the same training
        and otherwise starts from scratch; a path resumes from that checkpoint (ConfigError if it
        belongs to another training); None starts from scratch.

        A resumed training ends with the same weights and metrics as an uninterrupted one, however
        it was killed: bit-identical on the CPU with the same number of threads and devices. A
        warning tells if either number differs; with another number of devices, the epoch continues
        with its unused samples. A user's LightningModule resumes in the same way if its state is in
        its `state_dict`, its torchmetrics or its `on_save_checkpoint`; its `on_train_batch_end`
        runs after a checkpoint is saved.

        Ctrl-C stops after the current step, saves a checkpoint and raises TrainingInterrupted (a
        KeyboardInterrupt), whose message says how to resume; the model then has the best weights so
        far, if there was a validation. A second Ctrl-C stops at once. Raises
        DataError if there is nothing to learn from or a weight ends as NaN or infinite, and
        ConfigError for invalid settings (such as an `init_from` whose run does not exist or has no
        matching weight; the message lists the shapes).
        """
        run = current_recorder() if recorder is None else recorder
        weights_file = None if save_path is None else check_weights_target(save_path)
        bar = {} if verbose else {"trainer": {**self.trainer, "enable_progress_bar": False}}
        inputs = self._prepare_fit(dataset, reweighter, run, **bar)
        with _keep_best_weights(inputs.store_result):
            result = fit_as_member(inputs, run, resume) or fit_network(
                inputs.make_network,
                inputs.train,
                inputs.valid,
                inputs.recipe,
                device=inputs.device,
                recorder=run,
                resume=resume,
                start=inputs.start,
            )
        inputs.store_result(result)
        if evals_result is not None:
            _, metric, mode = build_early_stopping(self.early_stop, self.monitor)
            evals_result.update(_list_scores(self.evals_result_, metric, mode))
        if weights_file is not None:
            write_weights_file(self._require_network(), weights_file)

    def _prepare_fit(
        self, dataset: Any, reweighter: Any, run: Recorder | None, **overrides: Any
    ) -> FitInputs:
        """Check the settings and the data of a fit, and return what it trains on."""
        self.check_settings()
        recipe = self._build_recipe(**overrides)
        for name, number in recipe.trainer.limits.items():
            if number == 0:
                log.warning("trainer.%s=0 trains nothing: the weights stay as they are.", name)
        device = trainer_device(recipe.trainer)
        describe_run(run, self, dataset)
        initial = None if self.init_from is None else InitialWeights.load(self.init_from, run)
        load = partial(self._load_samples, dataset, reweighter, recipe, initial)
        if initial is None and (fleet := current_fleet()) is not None:
            train, valid = fleet.share_samples(dataset, reweighter, load)
        else:
            train, valid = load()
        loss, num_outputs = build_loss(self.loss), None
        if isinstance(loss, BaseLoss):
            num_outputs = loss.num_outputs(len(train.label_names))
        config = complete_network_config(self.network, train, num_outputs)

        def make_network() -> nn.Module:
            network = build_network(config)
            return network if initial is None else initial.apply(network)

        def store_result(result: FitResult) -> None:
            self.network_config_ = config if isinstance(config, dict) else None
            self.input_schema_ = InputSchema.from_samples(train)
            if initial is not None:
                result.report["init_from"] = initial.description
            self._store_result(result, recipe, dataset)

        self.network_config_ = None
        start = "fresh" if initial is None else initial.digest
        return FitInputs(make_network, train, valid, recipe, device, start, store_result)

    def check_settings(self, *, check_device: bool = True) -> None:
        """Raise ConfigError for settings that no training can use, before there are data.

        `check_device`: this machine is the one that trains, so that it must have the trainer's
        accelerator and devices, and the file of `init_from`.
        """
        options = trainer_options(self.trainer, self.callbacks)
        check_validation(self.early_stop, self.monitor, options)
        check_name("order", self.batch["order"], ORDERS)
        resolve_inner_steps(self.inner_steps, options, 1)
        self._check_counts()
        if check_device:
            trainer_device(options)
            check_weights_source(self.init_from)
            has_checkpoints = self._has_checkpoints(self.trainer)
            check_devices(options, self.batch, self.module, has_checkpoints=has_checkpoints)
        with quiet_lightning(), numerical_settings(options, None):
            check_arguments(options, check_device=check_device)
        if is_lightning_module(self.network):
            return  # it has its own loss and optimizer, and logs what it is judged by
        build_loss(self.loss)
        optimizer = check_optimizer(self.optimizer)
        check_schedule(self.scheduler, optimizer, **options.limits)
        build_day_label(self.day_label)
        get_module_class(self.module)
        check_monitor(build_early_stopping(self.early_stop, self.monitor)[1])
        check_callbacks(options)

    def check_segment_names(self, names: Collection[str]) -> None:
        require_segment("train", names, f"on which {type(self).__name__} is trained")
        check_valid_segment(self.early_stop, self.monitor, names)

    def _check_counts(self) -> None:
        for name in ("size", "days_per_batch", "eval_size"):
            if name != "eval_size" or self.batch[name] is not None:
                check_count(f"batch.{name}", self.batch[name])
        if self.checkpoint["every_n_steps"] is not None:
            check_count("checkpoint.every_n_steps", self.checkpoint["every_n_steps"])
        for name, value in {
            "batch.drop_last": self.batch["drop_last"],
            "checkpoint.enabled": self.checkpoint["enabled"],
            "compile": self.compile,
        }.items():
            if not isinstance(value, bool) and not (name == "compile" and isinstance(value, dict)):
                raise ConfigError(f"{name} is {value!r}; expected true or false.")
        check_network_sizes(self.network)

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
        statistics: StatisticsMode | None = None,
    ) -> None:
        """Continue training from the fitted weights.

        `trainer` (argument by argument), `optimizer`, `scheduler`, `early_stop`, `max_epochs` and
        `lr` override the model's own settings. `train`, `frozen`, `layer_decay`, `unfreeze_every`,
        `lora` and `keep_optimizer` select which parameters are trained and at which rates, see
        `FineTuning`. `statistics` selects the statistics that the dataset's processors and the
        batch norms normalize with: "keep" uses those that the model was trained with, "refit" those
        of the new data, "adapt" the mean of both; None leaves the dataset unchanged. If the model
        was loaded from a run, the recorder's tags name that run.

        Raises NotFittedError before `fit`, and DataError, which lists the differences, if the data
        do not match the fitted model (features are matched by name).
        """
        network = self._require_network()
        tuning = FineTuning(
            train=resolve_config(train),
            frozen=resolve_config(frozen),
            layer_decay=layer_decay,
            unfreeze_every=unfreeze_every,
            lora=resolve_config(lora),
            keep_optimizer=keep_optimizer,
            statistics=statistics,
        )
        tuning.check(network)
        state = tuning.optimizer_state(network, self.optimizer_state_, self.fit_report_)
        epochs = {} if max_epochs is None else {"max_epochs": max_epochs}
        trainer, optimizer, scheduler = map(resolve_config, (trainer, optimizer, scheduler))
        recipe = self._build_recipe(
            trainer={**self.trainer, **(trainer or {}), **epochs},
            optimizer=with_learning_rate(self.optimizer if optimizer is None else optimizer, lr),
            scheduler=self.scheduler if scheduler is None else scheduler,
            early_stop=self.early_stop if early_stop is None else resolve_config(early_stop),
        )
        if self.input_schema_ is not None and statistics in ("keep", "adapt"):
            # Check before the processors do: they would only report the first unknown column.
            self.input_schema_.match_features(get_samples(dataset, "train"))
        apply_statistics(dataset, self.statistics_, statistics)
        run = current_recorder() if recorder is None else recorder
        if is_unnamed(run):
            describe_run(run, self, dataset)
        if run is not None and self._source_recorder is not None:
            tag_lineage(run, self._source_recorder)
        device = trainer_device(recipe.trainer)
        samples = self._load_samples(dataset, reweighter, recipe, self.input_schema_)
        with _keep_best_weights(lambda result: self._store_result(result, recipe, dataset)):
            result = fit_network(
                partial(build_network, network),
                *samples,
                recipe,
                device=device,
                recorder=run,
                resume=resume,
                start=weights_digest(network),
                tuning=tuning,
                optimizer_state=state,
            )
        self._store_result(result, recipe, dataset)

    def _load_samples(
        self,
        dataset: Any,
        reweighter: Any,
        recipe: Recipe,
        schema: InputSchema | InitialWeights | None,
    ) -> tuple[Samples, Samples | None]:
        """Return the samples of "train" and "valid" with the features of the earlier weights.

        Raises DataError for samples that cannot be trained on.
        """
        train, valid = load_training_samples(dataset, "train", reweighter), None
        if has_valid_segment(dataset):
            valid = load_training_samples(dataset, "valid", reweighter)
            check_disjoint_days(dataset, train, valid)
        check_labels(train, valid)
        monitored_metric = build_early_stopping(recipe.early_stop, recipe.monitor)[1]
        check_cross_section(train, valid, monitor=monitored_metric, day_label=recipe.day_label)
        if schema is not None:
            train = schema.match_features(train)
            valid = None if valid is None else schema.match_features(valid)
        return train, valid

    def _store_result(self, result: FitResult, recipe: Recipe, dataset: Any) -> None:
        if not self.allow_nonfinite:
            check_weights(result.network)
        self.statistics_, self.seed_ = get_statistics(dataset), recipe.seed
        self.network_ = result.network.eval()
        self.optimizer_state_ = result.optimizer_state
        self.fit_report_ = result.report
        self.evals_result_ = {}
        for point in result.history:
            for key, value in point.items():
                segment, _, name = key.partition("/")
                if key in result.validation_names:
                    segment, name = "valid", key.removeprefix("valid/")
                elif not name:
                    segment, name = "train", key
                self.evals_result_.setdefault(segment, {}).setdefault(name, []).append(value)

    def _has_checkpoints(self, trainer: Mapping[str, Any]) -> bool:
        return bool(self.checkpoint["enabled"]) and trainer.get("enable_checkpointing") is not False

    def _build_recipe(self, **overrides: Any) -> Recipe:
        """Return the training settings, with the overrides of a fine-tuning."""
        trainer = overrides.get("trainer", self.trainer)
        options = trainer_options(trainer, self.callbacks)
        early_stop = overrides.get("early_stop", self.early_stop)
        check_validation(early_stop, self.monitor, options)
        seed = self.seed if self.seed is not None else session().seed
        if seed is None:
            seed = int(torch.randint(2**31 - 1, ()))
        checkpoint = {**self.checkpoint, "enabled": self._has_checkpoints(trainer)}
        return Recipe(
            loss=self.loss,
            module=self.module,
            day_label=self.day_label,
            optimizer=overrides.get("optimizer", self.optimizer),
            scheduler=overrides.get("scheduler", self.scheduler),
            batch=self.batch,
            trainer=options,
            monitor=self.monitor,
            early_stop=early_stop,
            checkpoint=checkpoint,
            inner_steps=self.inner_steps,
            compile=dict(self.compile) if isinstance(self.compile, Mapping) else self.compile,
            seed=seed,
            matmul_precision=self.matmul_precision,
            cuda_graph=self.cuda_graph,
        )

    # -- scoring -------------------------------------------------------------------------------

    def predict(
        self, dataset: Any, segment: str | slice = "test", *, batch_size: int | None = None
    ) -> pd.Series:
        """Return the scores of a segment, each sample once.

        The result is a float32 Series "score", indexed by (datetime, instrument). With several
        outputs, the score is the loss's readout, by default the first output. Raises NotFittedError
        before `fit`, and DataError if the dataset's features do not match those of the training,
        or if a weight or a score is NaN or infinite, unless `allow_nonfinite` is set. `batch_size`
        counts more than `eval_size` of the model's batches.
        """
        network = self._require_network()
        if not self.allow_nonfinite:
            check_weights(network)
        samples = get_samples(dataset, segment, data_key="infer")
        if self.input_schema_ is not None:
            samples = self.input_schema_.match_features(samples)
        options = trainer_options(self.trainer, ())
        with reuse_freed_memory(), numerical_settings(options, self.matmul_precision):
            device = trainer_device(options)
            samples = get_module_class(self.module).prepare_prediction(
                network, samples.to(device), partial(self._load_labeled_samples, dataset)
            )
            scores = score_series(
                network,
                samples,
                device=device,
                batch_size=batch_size or evaluation_batch_size(self.batch, device),
                readout=get_readout(build_loss(self.loss)),
            )
        if not self.allow_nonfinite:
            check_scores(scores)
        return scores

    def _load_labeled_samples(self, dataset: Any, dates: slice) -> Samples:
        """Return all samples of the dates that have a label, with labels as in training."""
        samples = get_samples(dataset, dates, data_key="learn", purge=False)
        return samples if self.input_schema_ is None else self.input_schema_.match_features(samples)

    def _require_network(self) -> nn.Module:
        if self.network_ is None:
            raise NotFittedError(
                f"this {type(self).__name__} has no weights yet: call fit(dataset) first, or load "
                "a fitted model."
            )
        return self.network_

    # -- saving --------------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """Return the configuration that builds this model, unfitted."""
        arguments = {**self._arguments, "network": network_config(self.network)}
        config = {k: plain_value(v, f"LightningModel.{k}") for k, v in arguments.items()}
        return {"_target_": import_path(type(self)), **config}

    def to_state(self) -> State:
        """Return configuration, metrics and weights as JSON and tensors, without pickle.

        Raises ConfigError if an argument is a live object that no configuration describes.
        """
        state: dict[str, Any] = {"model": self.to_config(), "fitted": None}
        if self.network_ is None:
            return State(state)
        input_schema, statistics = self.input_schema_, self.statistics_
        state["fitted"] = {
            "network": self.network_config_ or network_config(self.network),
            "learnt": None if input_schema is None else input_schema.to_dict(),
            "statistics": None if statistics is None else statistics.config,
            "seed": self.seed_,
            "evals_result": replace_nonfinite(self.evals_result_),
            "fit_report": replace_nonfinite(self.fit_report_),
        }
        tensors = {k: v.detach().cpu().clone() for k, v in self.network_.state_dict().items()}
        if statistics is not None:
            tensors |= {STATISTICS_PREFIX + k: v for k, v in statistics.tensors.items()}
        if self.optimizer_state_ is not None:
            state["fitted"]["optimizer"] = extract_tensors(
                self.optimizer_state_, OPTIMIZER_PREFIX, tensors
            )
        return State(state, tensors)

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Build a model from its saved state. Names in it must be trusted."""
        model = cls._from_stored_config(state.config["model"])
        if state.config["fitted"] is not None:
            model._load_fitted_state(state.config["fitted"], state.tensors)
        return model

    def _load_fitted_state(self, fitted: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.network_ = build_network(fitted["network"]).eval()
        self.network_.load_state_dict({k: v for k, v in tensors.items() if k[0] != "@"})
        self.network_config_, self.seed_ = fitted["network"], fitted["seed"]
        # States saved by older versions have neither.
        input_schema, statistics = fitted.get("learnt"), fitted.get("statistics")
        self.input_schema_ = None if input_schema is None else InputSchema.from_dict(input_schema)
        if statistics is not None:
            statistics_tensors = {
                k.removeprefix(STATISTICS_PREFIX): v
                for k, v in tensors.items()
                if k.startswith(STATISTICS_PREFIX)
            }
            self.statistics_ = State(statistics, statistics_tensors)
        if fitted.get("optimizer") is not None:
            self.optimizer_state_ = insert_tensors(fitted["optimizer"], tensors)
        self.evals_result_ = restore_nan(fitted["evals_result"])
        self.fit_report_ = fitted["fit_report"]

    def on_load(self, recorder: Recorder) -> None:
        """Remember the run that this model was loaded from; fine-tuning names it in its tags."""
        self._source_recorder = recorder


def _list_scores(
    curves: Mapping[str, Mapping[str, list[float]]], metric: str, mode: str
) -> dict[str, list[float]]:
    """Return the monitored metric of "train" and "valid" per epoch, so that higher is better.

    Where a segment has no such metric, it is the loss.
    """
    name, sign = metric.removeprefix("valid/"), -1.0 if mode == "min" else 1.0
    scores = {}
    for segment in ("train", "valid"):
        values = curves.get(segment, {})
        if name in values:
            scores[segment] = [sign * value for value in values[name]]
        else:
            scores[segment] = [-value for value in values.get("loss", [])]
    return scores


@contextmanager
def _keep_best_weights(store_result: Callable[[FitResult], None]) -> Iterator[None]:
    """Give an interrupted training's best weights to its model before the interruption goes on."""
    try:
        yield
    except TrainingInterrupted as stop:
        if stop.result is not None:
            try:
                store_result(stop.result)
            except DataError as error:
                log.warning("the weights so far are not kept: %s", error)
            else:
                epoch = stop.result.report["best_epoch"]
                stop.args = (f"{stop} The model has the best weights so far, of epoch {epoch}.",)
        raise


def _merge_options(argument: str, options: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    if options is not None and not isinstance(options, Mapping):
        names = ", ".join(defaults)
        raise ConfigError(f"{argument} is {options!r}; expected a mapping of {names}.")
    for name in options or {}:
        check_name(f"option of {argument}", name, defaults)
    return {**defaults, **(options or {})}
