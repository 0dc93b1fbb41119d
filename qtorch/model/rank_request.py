"""What the ranks of a training are asked to do, in files that all of them read."""

from __future__ import annotations

import hashlib
import pickle
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cloudpickle
from torch import nn

from qtorch.core.errors import ConfigError
from qtorch.core.session import Session, init
from qtorch.data.sample_set import Samples
from qtorch.data.shared_samples import read_samples, write_samples
from qtorch.model.finetuning import FineTuning
from qtorch.model.training import Recipe

REQUEST, RESULT = "request.pkl", "result.pkl"


@dataclass
class RankRequest:
    """A training as its ranks take it up: network with its first weights, recipe, where it goes
    on from; `generators` are those of the first rank. The samples lie beside."""

    network: nn.Module
    recipe: Recipe
    tuning: FineTuning | None
    optimizer_state: dict[str, Any] | None
    generators: dict[str, Any]
    identity: str
    folder: str | None
    checkpoint: str | None
    run_id: str | None
    uri: str | None
    size: int
    num_local: int
    address: str
    port: int
    log_level: int
    session: Session

    def write(self, folder: Path, samples: list[Samples | None], *, local: bool) -> str:
        """Write request and samples into `folder`; the request's hash.

        Raises ConfigError for live objects that no other process could have.
        """
        try:
            content = cloudpickle.dumps(self)
        except (TypeError, pickle.PicklingError, AttributeError) as error:
            raise ConfigError(
                f"the training cannot be handed to its ranks: {error}. Give network, callbacks, "
                "loss and factories by configuration, or as objects that can be pickled."
            ) from error
        whole = pickle.dumps((list(sys.path), content))
        (folder / REQUEST).touch(mode=0o600)
        (folder / REQUEST).write_bytes(whole)
        write_samples(samples, folder, local=local)
        return hashlib.sha256(whole).hexdigest()


def read_request(folder: Path, digest: str) -> tuple[RankRequest, list[Samples | None]]:
    """The request of this hash, and the samples, mapped. Modules are looked for where the parent
    found them."""
    whole = (folder / REQUEST).read_bytes()
    if hashlib.sha256(whole).hexdigest() != digest:
        raise ConfigError(f"{folder / REQUEST} is not the request that this rank was started for.")
    path, content = pickle.loads(whole)
    sys.path[:] = path
    found: RankRequest = pickle.loads(content)
    init(**{k: v for k, v in asdict(found.session).items() if v})
    return found, read_samples(folder)
