"""The request that describes a training to its ranks, in files that all of them read."""

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
    """A training for its ranks: network with initial weights, recipe, checkpoint to resume from.

    `generators` are the random generator states of the first rank. The samples are written to files
    beside the request.
    """

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
        """Write request and samples to `folder`; return the request's hash.

        Raises ConfigError for live objects that cannot be pickled.
        """
        try:
            content = cloudpickle.dumps(self)
        except (TypeError, pickle.PicklingError, AttributeError) as error:
            raise ConfigError(
                f"cannot send the training to its ranks: {error}. Define network, callbacks, "
                "loss and factories by configuration, or as objects that can be pickled."
            ) from error
        payload = pickle.dumps((list(sys.path), content))
        (folder / REQUEST).touch(mode=0o600)
        (folder / REQUEST).write_bytes(payload)
        write_samples(samples, folder, local=local)
        return hashlib.sha256(payload).hexdigest()


def read_request(folder: Path, digest: str) -> tuple[RankRequest, list[Samples | None]]:
    """Read the request with this hash, and its samples as memory maps.

    Modules are imported from the parent's `sys.path`.
    """
    payload = (folder / REQUEST).read_bytes()
    if hashlib.sha256(payload).hexdigest() != digest:
        raise ConfigError(f"{folder / REQUEST} is not the request that this rank was started with.")
    path, content = pickle.loads(payload)
    sys.path[:] = path
    request: RankRequest = pickle.loads(content)
    init(**{k: v for k, v in asdict(request.session).items() if v})
    return request, read_samples(folder)
