"""Fine-tuning: what is trained and how fast, initial weights of a run, and statistics."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import pytorch_lightning as pl
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qtorch.core.errors import ConfigError, DataError, LoadObjectError, check_name, join_names
from qtorch.core.files import atomic_write
from qtorch.core.serial import State
from qtorch.core.session import resolve_path
from qtorch.data.dataset.samples import Samples
from qtorch.model.input_schema import InputSchema
from qtorch.model.loop.factories import OptimizerFactory
from qtorch.nn.layers import layer_groups
from qtorch.nn.lora import LoRA
from qtorch.nn.network import Network
from qtorch.tracking.manager import find_run
from qtorch.tracking.recorder import tag_lineage
from qtorch.tracking.store_types import NotInStoreError

if TYPE_CHECKING:
    from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

StatisticsMode = Literal["keep", "refit", "adapt"]
STATISTICS: tuple[str, ...] = ("keep", "refit", "adapt")
ADAPT_WEIGHT = 0.5  # weight of the new data's statistics with statistics="adapt"
LORA_OPTIONS = ("rank", "alpha", "targets", "trained")
RUN_PREFIX, FILE_PREFIX, DEFAULT_ARTIFACT = "run:", "file:", "params.pkl"
EXPECTED_FORMAT = (
    "expected 'run:RUN_ID', 'run:RUN_ID/NAME' for a model saved under another name, or 'file:PATH' "
    "for a file of weights"
)
EXPECTED_FILE = (
    "expected the weights of a network, by name: torch.save(network.state_dict(), PATH), or a "
    ".safetensors file"
)


@dataclass(frozen=True)
class FineTuning:
    """Which parameters are trained in a fine-tuning, and how.

    `train`: "all", "head" (the last layer), or patterns of parameter names (`["fc_out.*"]`).
    `frozen`: patterns of parameters that are not trained.
    `layer_decay`: each layer's learning rate is this fraction of the one above it; the head has the
    full rate.
    `unfreeze_every`: train only the head at first, and unfreeze one more layer every so many
    epochs.
    `lora`: `rank`, `alpha`, `targets`, `trained` (see `qtorch.nn.LoRA`); the low-rank products are
    merged into the weights at the end.
    `keep_optimizer`: start from the optimizer state of the previous training; it must belong to the
    whole network and nothing else.
    `statistics`: batch norm statistics: "keep" normalizes with the running statistics and leaves
    them unchanged, "refit" resets them, "adapt" continues updating them; None means "adapt".
    """

    train: str | Sequence[str] = "all"
    frozen: Sequence[str] = ()
    layer_decay: float = 1.0
    unfreeze_every: int | None = None
    lora: Mapping[str, Any] | None = None
    keep_optimizer: bool = False
    statistics: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay is {self.layer_decay}; expected above 0, at most 1.")
        if self.unfreeze_every is not None and self.unfreeze_every < 1:
            raise ConfigError(
                f"unfreeze_every is {self.unfreeze_every}; expected at least 1 epoch."
            )
        if self.statistics is not None:
            check_name("statistics", self.statistics, STATISTICS)
        for name in self.lora or {}:
            check_name("option of lora", name, LORA_OPTIONS)
        is_partial = self.lora is not None or self.train != "all" or bool(self.frozen)
        if self.lora is not None and (self.train != "all" or self.unfreeze_every or self.frozen):
            raise ConfigError(
                "lora defines which weights are trained: remove train, frozen and unfreeze_every."
            )
        if self.keep_optimizer and (is_partial or self.layer_decay != 1):
            raise ConfigError(
                "keep_optimizer only works when all weights are trained at one rate: "
                "remove keep_optimizer, or lora, train, frozen and layer_decay."
            )

    @property
    def description(self) -> dict[str, Any]:
        """`train` and the options that are set, for the fit report and the identity of a fit."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {
            name: value
            for name, (value, default) in values.items()
            if name == "train" or value not in (default, [])
        }

    # -- before and after ----------------------------------------------------------------------

    def check(self, network: nn.Module) -> None:
        """Raise ConfigError if fine-tuning options are set for a user's LightningModule."""
        if isinstance(network, pl.LightningModule) and self != FineTuning():
            raise ConfigError(
                "a LightningModule with its own training loop decides what is trained: remove "
                f"{', '.join(self.description)}."
            )

    def optimizer_state(
        self, network: nn.Module, state: dict[str, Any] | None, report: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Return the optimizer state to start from, or None for a new optimizer.

        `state` is what the training of `report` has left. Raises ConfigError if it contains more
        than the network's parameters.
        """
        if not self.keep_optimizer:
            return None
        if state is None:
            raise ConfigError("keep_optimizer: this model was saved without optimizer state.")
        kind = type(network).__name__
        # Options that gave the earlier optimizer a subset or groups of the parameters.
        defaults = {"train": "all", "frozen": (), "layer_decay": 1.0, "lora": None}
        tuning = report.get("tuning") or {}
        if options := [k for k, v in defaults.items() if tuning.get(k, v) != v]:
            raise ConfigError(
                f"keep_optimizer: this {kind} was last trained with {', '.join(options)}, so its "
                "optimizer state does not match this training: remove keep_optimizer."
            )
        num_tensors = sum(len(group["params"]) for group in state["param_groups"])
        num_parameters = len(list(network.parameters()))
        if num_tensors > num_parameters:
            raise ConfigError(
                f"keep_optimizer: the optimizer of this {kind} has updated {num_tensors} tensors, "
                f"but only {num_parameters} belong to the network. The others (a decoder, an "
                "adversary, gates) are created again by each training: remove keep_optimizer."
            )
        return state

    def prepare_network(self, network: nn.Module) -> nn.Module:
        """Mark the trainable parameters of the network; with `lora`, wrap it."""
        if self.statistics == "refit":
            for norm in _batch_norms(network):
                norm.reset_running_stats()
        if self.lora is not None:
            options = {"trained": layer_groups(network)[-1], **self.lora}
            try:
                return LoRA(network, **options)
            except ValueError as error:
                raise ConfigError(f"lora: {error}") from error
        trainable_names = self._trainable_names(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in trainable_names)
        return network

    def finalize_network(self, network: nn.Module) -> nn.Module:
        """Return the network for prediction: LoRA merged, nothing frozen."""
        return network.merge() if isinstance(network, LoRA) else network.requires_grad_(True)

    def _trainable_names(self, network: nn.Module) -> set[str]:
        names = [name for name, _ in network.named_parameters()]
        if self.train == "all":
            trainable = set(names)
        elif self.train == "head":
            trainable = set(layer_groups(network)[-1])
        else:
            patterns = [self.train] if isinstance(self.train, str) else list(self.train)
            trainable = _match_patterns(names, patterns, "train")
        trainable -= _match_patterns(names, self.frozen, "frozen")
        if not trainable:
            raise ConfigError("nothing to train: every parameter is frozen.")
        return trainable

    # -- rates and callbacks -------------------------------------------------------------------

    def scale_layer_rates(self, factory: OptimizerFactory, network: nn.Module) -> OptimizerFactory:
        """Return an optimizer factory with a rate for each layer, if `layer_decay` is set."""
        if self.layer_decay == 1:
            return factory
        own = dict(network.named_parameters())
        layers = [[own[name] for name in names] for names in reversed(layer_groups(network))]

        def build(parameters: Iterable[nn.Parameter]) -> Optimizer:
            remaining = {id(p): p for p in parameters}
            groups: list[Any] = []
            for depth, layer in enumerate(layers):
                trainable = [remaining.pop(id(p)) for p in layer if id(p) in remaining]
                groups.append({"params": trainable, "rate_factor": self.layer_decay**depth})
            # Auxiliary parameters of the training module are not part of any layer.
            groups.append({"params": list(remaining.values()), "rate_factor": 1.0})
            optimizer = factory([group for group in groups if group["params"]])
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * group.pop("rate_factor")
            return optimizer

        return build

    def callbacks(self, network: nn.Module) -> list[pl.Callback]:
        """Return the callbacks that act during training."""
        active: list[pl.Callback] = []
        if self.unfreeze_every is not None:
            names = self._trainable_names(network)
            active.append(GradualUnfreezing(network, names, self.unfreeze_every))
        if self.statistics == "keep":
            active.append(FrozenBatchNorms())
        return active


class GradualUnfreezing(pl.Callback):
    """Unfreeze layers from the head down, one more every so many epochs.

    Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018.
    """

    def __init__(self, network: nn.Module, trainable_names: set[str], every: int) -> None:
        parameters = dict(network.named_parameters())
        layers = [
            [parameters[n] for n in names if n in trainable_names]
            for names in layer_groups(network)
        ]
        self.layers = [layer for layer in reversed(layers) if layer]
        self.every = every

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze and unfreeze by the epoch number alone, so that a resumed training agrees."""
        num_trainable = 1 + trainer.current_epoch // self.every
        for depth, layer in enumerate(self.layers):
            for parameter in layer:
                parameter.requires_grad_(depth < num_trainable)


class FrozenBatchNorms(pl.Callback):
    """Keep batch norms in evaluation mode: they use their running statistics unchanged."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for norm in _batch_norms(pl_module):
            norm.eval()


def _batch_norms(network: nn.Module) -> list[Any]:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return [m for m in network.modules() if isinstance(m, kinds)]


def _match_patterns(names: Sequence[str], patterns: Sequence[str], option: str) -> set[str]:
    """Return the names that match a pattern; raise ConfigError for a pattern without a match."""
    matches: set[str] = set()
    for pattern in patterns:
        new_matches = {name for name in names if fnmatch(name, pattern)}
        if not new_matches:
            raise ConfigError(
                f"{option}: {pattern!r} matches no parameter; the names are {list(names)}."
            )
        matches |= new_matches
    return matches


def check_initial_run(init_from: Any) -> None:
    """Raise ConfigError unless `init_from` is None or names a run or a file."""
    if init_from is None:
        return
    if not isinstance(init_from, str):
        raise ConfigError(
            f"init_from is a {type(init_from).__name__}; {EXPECTED_FORMAT} "
            "(f'run:{recorder.id}'), because a task must be plain data."
        )
    run, path = (init_from.removeprefix(p) for p in (RUN_PREFIX, FILE_PREFIX))
    if not (run != init_from and run.partition("/")[0]) and path in ("", init_from):
        raise ConfigError(f"init_from is {init_from!r}; {EXPECTED_FORMAT}.")


def check_weights_source(init_from: str | None) -> None:
    """Raise ConfigError if `init_from` names a file or a run that this machine does not have."""
    if init_from is None:
        return
    if init_from.startswith(FILE_PREFIX):
        _find_weights_file(init_from.removeprefix(FILE_PREFIX))
    else:
        _find_initial_run(init_from)


def _find_initial_run(init_from: str) -> Recorder:
    run_id = init_from.removeprefix(RUN_PREFIX).partition("/")[0]
    try:
        return find_run(run_id)
    except NotInStoreError as error:
        raise ConfigError(f"init_from={init_from!r}: {error}") from error


def _find_weights_file(path: str) -> Path:
    file = resolve_path(path)
    if not file.is_file():
        raise ConfigError(
            f"init_from='file:{path}': there is no file {file}. Correct the path (a relative one "
            "starts in the folder of the command), or leave init_from out to start from random "
            "weights."
        )
    return file


@dataclass
class InitialWeights:
    """The weights of an earlier run or of a file, which initialize another network.

    `network` is that of the run; a file has weights without a network.
    """

    source: str
    weights: Mapping[str, Tensor]
    network: nn.Module | None = None
    input_schema: InputSchema | None = None
    copied_names: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, init_from: str, run: Recorder | None) -> Self:
        """Load the weights that `init_from` names, and tag `run` with an earlier run.

        Raises ConfigError if the run, the object or the file does not exist, or has no weights.
        """
        if init_from.startswith(FILE_PREFIX):
            return cls(init_from, load_weights_file(init_from.removeprefix(FILE_PREFIX)))
        name = init_from.removeprefix(RUN_PREFIX).partition("/")[2] or DEFAULT_ARTIFACT
        recorder = _find_initial_run(init_from)
        try:
            model = recorder.load_object(name)
        except LoadObjectError as error:
            raise ConfigError(
                f"init_from={init_from!r}: cannot load a model from the run (status "
                f"{recorder.status}): {error}"
            ) from error
        network = getattr(model, "network_", None)
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"init_from={init_from!r}: {name!r} is a {type(model).__name__}, which has no "
                "fitted network."
            )
        if run is not None:
            tag_lineage(run, recorder)
        schema = getattr(model, "input_schema_", None)
        return cls(init_from, network.state_dict(), network, schema)

    def match_features(self, samples: Samples) -> Samples:
        """Return the samples with the features that the weights were trained on, matched by name.

        Windows may have another length, as far as the weights allow it. Raises DataError, which
        lists the differences.
        """
        if self.input_schema is None:
            return samples
        return self.input_schema.match_features(samples, any_steps=True)

    def apply(self, network: nn.Module) -> nn.Module:
        """Copy the weights whose name and shape match into `network`, and return it."""
        try:
            earlier = self.weights if self.network is None else self.network
            self.copied_names = copy_shared_weights(network, earlier)
        except ConfigError as error:
            raise ConfigError(f"init_from={self.source!r}: {error}") from error
        all_modules, copied_modules = (
            {name.partition(".")[0] for name in names}
            for names in (network.state_dict(), self.copied_names)
        )
        log.info(
            "copied %d weights from %s; newly initialized: %s",
            len(self.copied_names),
            self.source,
            sorted(all_modules - copied_modules) or "none",
        )
        return network

    @property
    def digest(self) -> str:
        """A hash of the source weights."""
        return _state_digest(self.weights)

    @property
    def description(self) -> dict[str, Any]:
        """The source and the copied weights, for the fit report."""
        return {"from": self.source, "weights": self.copied_names}


def load_weights_file(path: str) -> dict[str, Tensor]:
    """Load the weights of a file by name: torch's format without other objects, or safetensors.

    Raises ConfigError, which says what was expected, for anything else.
    """
    file = _find_weights_file(path)
    try:
        if file.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise errors of many kinds
        raise ConfigError(
            f"init_from='file:{path}': {type(error).__name__}: {str(error).partition(chr(10))[0]} "
            f"({EXPECTED_FILE})"
        ) from error
    is_state = isinstance(content, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )
    if not is_state or not content:
        parts = list(content)[:6] if isinstance(content, Mapping) else type(content).__name__
        raise ConfigError(f"init_from='file:{path}' contains {parts}: {EXPECTED_FILE}.")
    return dict(content)


def check_weights_target(path: str | Path) -> Path:
    """Return the full path of a file for weights, and create its folder.

    Raises ConfigError, before a training, if it cannot be a file.
    """
    file = resolve_path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"save_path={str(path)!r}: its folder cannot be created: {error}."
        ) from error
    if file.is_dir():
        raise ConfigError(f"save_path={str(path)!r} is a folder; expected the path of a file.")
    return file


def write_weights_file(network: nn.Module, file: Path) -> None:
    """Write the weights by name in torch's format, on the CPU; `load_weights_file` reads them."""
    weights = {name: value.detach().cpu() for name, value in network.state_dict().items()}
    with atomic_write(file) as partial:
        torch.save(weights, partial)


def copy_shared_weights(network: nn.Module, earlier: nn.Module | Mapping[str, Tensor]) -> list[str]:
    """Copy the weights that a network shares by name and shape with another architecture.

    `earlier` is a network or the weights of one. Returns the names of what was copied. Weights that
    only one of the two networks has are not changed, nor is an output head of another width (other
    labels). The recurrent weights of an LSTM or GRU are those of the network's `recurrent_layer`.
    Raises ConfigError, which lists the shapes, if any other weight of the same name differs in
    shape, or if no weight is shared: a half-initialized network is not what the user wants.
    """
    own, heads = network.state_dict(), set(layer_groups(network)[-1])
    if isinstance(earlier, nn.Module):
        weights, title = earlier.state_dict(), f"the run's {type(earlier).__name__}"
        heads |= set(layer_groups(earlier)[-1])
    else:
        weights, title = dict(earlier), "the file's weights"
    if isinstance(network, Network):
        old, new = Network.recurrent_layer, network.recurrent_layer
        weights = {_rename_layer(name, old, new): value for name, value in weights.items()}
    shared_names = [n for n, w in weights.items() if n in own and own[n].shape == w.shape]
    mismatches = [n for n, w in weights.items() if n in own and own[n].shape != w.shape]
    errors = [n for n in mismatches if n not in heads]
    names = f"a {type(network).__name__} and {title}"
    if errors:
        shapes = [f"{n} {list(own[n].shape)} and {list(weights[n].shape)}" for n in errors]
        raise ConfigError(
            f"{names} differ in the shapes of {join_names(shapes, 6)}. Give both the same "
            "hidden_size, base_model and features."
        )
    if not set(shared_names) - heads:
        raise ConfigError(
            f"{names} share no weight except the head's: the first has {_format_shapes(own)}, the "
            f"second {_format_shapes(weights)}."
        )
    network.load_state_dict({**own, **{n: weights[n] for n in shared_names}})
    return shared_names


def _rename_layer(name: str, old: str, new: str) -> str:
    """Return the name of a weight whose first layer has another name."""
    layer, dot, rest = name.partition(".")
    return f"{new}{dot}{rest}" if layer == old else name


def _format_shapes(weights: Mapping[str, Tensor]) -> str:
    return join_names([f"{n} {list(w.shape)}" for n, w in weights.items()], 6)


def weights_digest(network: nn.Module) -> str:
    """Return a hash of a network's weights."""
    return _state_digest(network.state_dict())


def _state_digest(weights: Mapping[str, Tensor]) -> str:
    sha256 = hashlib.sha256()
    for name, value in weights.items():
        sha256.update(name.encode())
        flat = value.detach().cpu().contiguous().view(-1)
        sha256.update(flat.view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()[:32]


def get_statistics(dataset: Any) -> State | None:
    """Return the fitted state of the processors of a dataset's handler, or None if it has none."""
    handler: Any = getattr(dataset, "handler", None)
    if not callable(getattr(handler, "get_fitted_state", None)):
        return None
    state: State = handler.get_fitted_state()
    return State(state.config, {k: v.detach().cpu().clone() for k, v in state.tensors.items()})


def apply_statistics(dataset: Any, model_statistics: State | None, mode: str | None) -> None:
    """Normalize a dataset with the statistics of a fitted model.

    "keep" uses the model's statistics, "refit" and None the dataset's own (of its train segment),
    "adapt" the mean of both. This changes the state of the dataset's handler. Raises ConfigError if
    the two handlers' processors differ.
    """
    if mode is None or mode == "refit":
        return
    check_name("statistics", mode, STATISTICS)
    handler: Any = getattr(dataset, "handler", None)
    if model_statistics is None or not callable(getattr(handler, "load_fitted_state", None)):
        owner = "the model" if model_statistics is None else "the dataset"
        raise ConfigError(
            f"statistics={mode!r}: {owner} has no processors with fitted statistics; omit "
            "statistics, or use a DatasetH with a DataHandlerLP."
        )
    if mode == "adapt":
        dataset.view()  # fits the processors on this dataset's train segment
        model_statistics = interpolate_statistics(model_statistics, handler.get_fitted_state())
    handler.load_fitted_state(model_statistics)


def interpolate_statistics(old: State, new: State) -> State:
    """Return the mean of two states, column by column.

    Columns are matched by name, because their order may differ.
    """
    has_no_state = [[p is None for p in state.config["processors"]] for state in (old, new)]
    if has_no_state[0] != has_no_state[1] or set(old.tensors) != set(new.tensors):
        raise ConfigError("statistics='adapt': the dataset's processors differ from the model's.")
    tensors = {}
    for name, old_value in old.tensors.items():
        index = int(name.split(".")[1])  # processors.K.NAME
        column_order = _column_order(*(s.config["processors"][index] for s in (old, new)))
        new_value = new.tensors[name].to(old_value)
        new_value = new_value if column_order is None else new_value[column_order]
        if new_value.shape != old_value.shape:
            raise ConfigError("statistics='adapt': the dataset's columns differ from the model's.")
        tensors[name] = torch.lerp(old_value, new_value, ADAPT_WEIGHT)
    return State(old.config, tensors)


def _column_order(old: dict[str, Any], new: dict[str, Any]) -> list[int] | None:
    """Return the position of each old column in the new processor, or None without column names."""
    if "columns" not in old or "columns" not in new:
        return None
    positions = {(str(g), str(n)): k for k, (g, n) in enumerate(new["columns"])}
    old_columns = [(str(g), str(n)) for g, n in old["columns"]]
    missing = [n for g, n in old_columns if (g, n) not in positions]
    extra = [n for g, n in positions if (g, n) not in set(old_columns)]
    if missing or extra:
        differences = [
            f"{label} {', '.join(names[:8])}"
            for label, names in (("missing:", missing), ("additional:", extra))
            if names
        ]
        raise DataError(
            "statistics='adapt': the dataset's columns differ from the model's: "
            f"{'; '.join(differences)}."
        )
    return [positions[column] for column in old_columns]
