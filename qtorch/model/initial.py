"""Weights that a training begins from: those of another run's network, of another architecture."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from qtorch.core.errors import ConfigError, LoadObjectError
from qtorch.data.sample_set import Samples
from qtorch.model.matching import LearntFrom
from qtorch.model.model_state import weights_digest
from qtorch.nn.layers import layer_groups
from qtorch.tracking.earlier import earlier_run
from qtorch.tracking.errors import NotInStoreError
from qtorch.tracking.lineage import tag_lineage

if TYPE_CHECKING:
    from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

RUN, MODEL = "run:", "params.pkl"
FORM = "expected 'run:RUN_ID', or 'run:RUN_ID/NAME' for a model saved under another name"


def check_init_from(given: Any) -> None:
    """Raise ConfigError unless `given` is None or names a run."""
    if given is None:
        return
    if not isinstance(given, str):
        raise ConfigError(
            f"init_from is a {type(given).__name__}; {FORM} (f'run:{{recorder.id}}'): a task must "
            "be plain data."
        )
    if not given.startswith(RUN) or not given.removeprefix(RUN).partition("/")[0]:
        raise ConfigError(f"init_from is {given!r}; {FORM}.")


@dataclass
class Initial:
    """A fitted network of an earlier run, whose weights another network begins with."""

    source: str
    network: nn.Module
    learnt: LearntFrom | None
    taken: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, init_from: str, run: Recorder | None) -> Self:
        """The fitted network that `init_from` names; the tags of `run` name where it comes from.

        Raises ConfigError where there is no such run or object, or where it holds no network.
        """
        run_id, _, name = init_from.removeprefix(RUN).partition("/")
        name = name or MODEL
        try:
            recorder = earlier_run(run_id)
        except NotInStoreError as error:
            raise ConfigError(f"init_from={init_from!r}: {error}") from error
        try:
            model = recorder.load_object(name)
        except LoadObjectError as error:
            raise ConfigError(
                f"init_from={init_from!r}: no model can be read from the run, which is "
                f"{recorder.status}: {error}"
            ) from error
        network = getattr(model, "network_", None)
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"init_from={init_from!r}: {name!r} is a {type(model).__name__}, which holds no "
                "fitted network."
            )
        if run is not None:
            tag_lineage(run, recorder)
        return cls(init_from, network, getattr(model, "learnt_", None))

    def matched(self, samples: Samples) -> Samples:
        """Samples with the features that the weights were learnt on, matched by name. Windows may
        be of another length, as far as the weights allow it.

        Raises DataError that lists the differences.
        """
        return samples if self.learnt is None else self.learnt.matched(samples, any_steps=True)

    def into(self, network: nn.Module) -> nn.Module:
        """`network` with the weights that both have by the same name and shape."""
        try:
            self.taken = warm_weights(network, self.network)
        except ConfigError as error:
            raise ConfigError(f"init_from={self.source!r}: {error}") from error
        fresh = sorted({n.partition(".")[0] for n in network.state_dict()} - _parts(self.taken))
        log.info("%d weights of %s; fresh are %s", len(self.taken), self.source, fresh or "none")
        return network

    @property
    def digest(self) -> str:
        """A hash of the weights that it gives."""
        return weights_digest(self.network)

    @property
    def described(self) -> dict[str, Any]:
        """For the report of the training: the run, and the weights that it gave."""
        return {"from": self.source, "weights": self.taken}


def warm_weights(network: nn.Module, earlier: nn.Module) -> list[str]:
    """Copy the weights that a network shares by name and shape with another architecture's.

    Returns their names. What only one of the two has is left as it is, and so is a head of
    another width (other labels). Raises ConfigError that names the shapes where anything else of
    the same name differs in shape, or where nothing is shared: a network half of whose layers
    began elsewhere is not what was asked for.
    """
    own, weights = network.state_dict(), earlier.state_dict()
    heads = {name for each in (network, earlier) for name in layer_groups(each)[-1]}
    shared = [n for n, w in weights.items() if n in own and own[n].shape == w.shape]
    other = [n for n, w in weights.items() if n in own and own[n].shape != w.shape]
    unfit = [n for n in other if n not in heads]
    names = f"a {type(network).__name__} and the run's {type(earlier).__name__}"
    if unfit:
        pairs = ", ".join(
            f"{n} {list(own[n].shape)} and {list(weights[n].shape)}" for n in unfit[:6]
        )
        more = f", ... ({len(unfit)} in all)" if len(unfit) > 6 else ""
        raise ConfigError(
            f"{names} differ in the shapes of {pairs}{more}. Give both the same hidden_size, "
            "base_model and features."
        )
    if not set(shared) - heads:
        raise ConfigError(
            f"{names} share no weight but the head's: the one has {_shapes(own)}, the other "
            f"{_shapes(weights)}."
        )
    network.load_state_dict({**own, **{n: weights[n] for n in shared}})
    return shared


def _shapes(weights: Mapping[str, Tensor]) -> str:
    shown = ", ".join(f"{n} {list(w.shape)}" for n, w in list(weights.items())[:6])
    return shown + (f", ... ({len(weights)} in all)" if len(weights) > 6 else "")


def _parts(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}
