"""Initial weights from another run's network, which may have another architecture."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from qtorch.core.errors import ConfigError, LoadObjectError
from qtorch.data.sample_set import Samples
from qtorch.model.matching import InputSchema
from qtorch.model.model_state import weights_digest
from qtorch.nn.layers import layer_groups
from qtorch.tracking.errors import NotInStoreError
from qtorch.tracking.lineage import tag_lineage
from qtorch.tracking.manager import MANAGER

if TYPE_CHECKING:
    from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

RUN_PREFIX, DEFAULT_ARTIFACT = "run:", "params.pkl"
EXPECTED_FORMAT = "expected 'run:RUN_ID', or 'run:RUN_ID/NAME' for a model saved under another name"


def check_initial_run(init_from: Any) -> None:
    """Raise ConfigError unless `init_from` is None or names a run."""
    if init_from is None:
        return
    if not isinstance(init_from, str):
        raise ConfigError(
            f"init_from is a {type(init_from).__name__}; {EXPECTED_FORMAT} "
            "(f'run:{recorder.id}'), because a task must be plain data."
        )
    if (
        not init_from.startswith(RUN_PREFIX)
        or not init_from.removeprefix(RUN_PREFIX).partition("/")[0]
    ):
        raise ConfigError(f"init_from is {init_from!r}; {EXPECTED_FORMAT}.")


@dataclass
class InitialWeights:
    """The fitted network of an earlier run, whose weights initialize another network."""

    source: str
    network: nn.Module
    input_schema: InputSchema | None
    copied_names: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, init_from: str, run: Recorder | None) -> Self:
        """Load the fitted network that `init_from` names, and tag `run` with its source.

        Raises ConfigError if the run or the object does not exist, or if the object has no network.
        """
        run_id, _, name = init_from.removeprefix(RUN_PREFIX).partition("/")
        name = name or DEFAULT_ARTIFACT
        try:
            recorder = MANAGER.recorder(run_id)
        except NotInStoreError as error:
            raise ConfigError(f"init_from={init_from!r}: {error}") from error
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
        return cls(init_from, network, getattr(model, "input_schema_", None))

    def match_features(self, samples: Samples) -> Samples:
        """Return the samples with the features that the weights were trained on, matched by name.

        Windows may have another length, as far as the weights allow it. Raises DataError, which
        lists the differences.
        """
        return (
            samples
            if self.input_schema is None
            else self.input_schema.match_features(samples, any_steps=True)
        )

    def apply(self, network: nn.Module) -> nn.Module:
        """Copy the weights whose name and shape match into `network`, and return it."""
        try:
            self.copied_names = copy_shared_weights(network, self.network)
        except ConfigError as error:
            raise ConfigError(f"init_from={self.source!r}: {error}") from error
        other_modules = sorted(
            {n.partition(".")[0] for n in network.state_dict()}
            - _top_level_names(self.copied_names)
        )
        log.info(
            "copied %d weights from %s; newly initialized: %s",
            len(self.copied_names),
            self.source,
            other_modules or "none",
        )
        return network

    @property
    def digest(self) -> str:
        """A hash of the source weights."""
        return weights_digest(self.network)

    @property
    def description(self) -> dict[str, Any]:
        """The source run and the copied weights, for the fit report."""
        return {"from": self.source, "weights": self.copied_names}


def copy_shared_weights(network: nn.Module, earlier: nn.Module) -> list[str]:
    """Copy the weights that a network shares by name and shape with another architecture.

    Returns their names. Weights that only one of the two networks has are not changed, nor is an
    output head of another width (other labels). Raises ConfigError, which lists the shapes, if any
    other weight of the same name differs in shape, or if no weight is shared: a half-initialized
    network is not what the user wants.
    """
    own, weights = network.state_dict(), earlier.state_dict()
    heads = {name for model in (network, earlier) for name in layer_groups(model)[-1]}
    shared_names = [n for n, w in weights.items() if n in own and own[n].shape == w.shape]
    mismatches = [n for n, w in weights.items() if n in own and own[n].shape != w.shape]
    errors = [n for n in mismatches if n not in heads]
    names = f"a {type(network).__name__} and the run's {type(earlier).__name__}"
    if errors:
        shapes = ", ".join(
            f"{n} {list(own[n].shape)} and {list(weights[n].shape)}" for n in errors[:6]
        )
        suffix = f", ... ({len(errors)} in all)" if len(errors) > 6 else ""
        raise ConfigError(
            f"{names} differ in the shapes of {shapes}{suffix}. Give both the same hidden_size, "
            "base_model and features."
        )
    if not set(shared_names) - heads:
        raise ConfigError(
            f"{names} share no weight except the head's: the first has {_format_shapes(own)}, the "
            f"second {_format_shapes(weights)}."
        )
    network.load_state_dict({**own, **{n: weights[n] for n in shared_names}})
    return shared_names


def _format_shapes(weights: Mapping[str, Tensor]) -> str:
    text = ", ".join(f"{n} {list(w.shape)}" for n, w in list(weights.items())[:6])
    return text + (f", ... ({len(weights)} in all)" if len(weights) > 6 else "")


def _top_level_names(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}
