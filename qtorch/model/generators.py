"""The state of every random generator that a training may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def generator_states(*, every_device: bool = True) -> dict[str, Any]:
    """The states of torch (CPU and CUDA), numpy and Python, as tensors and plain values.

    Plain, so that a checkpoint that holds them loads without running any code. `every_device`
    False takes that of the current CUDA device alone: asking the others would set them up.
    """
    numpy: Any = np.random.get_state()  # noqa: NPY002 - the global one, which others draw from
    name, keys, position, has_gauss, gauss = numpy
    version, numbers, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": _cuda_states(every_device),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(numbers), next_gauss],
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Put every generator where `generator_states` found it."""
    torch.set_rng_state(states["torch"].cpu())
    cuda = [s.cpu() for s in states["cuda"]] if torch.cuda.is_available() else []
    if len(cuda) == 1:
        torch.cuda.set_rng_state(cuda[0])
    elif len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    name, keys, position, has_gauss, gauss = states["numpy"]
    state = (name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss)
    np.random.set_state(state)  # noqa: NPY002 - as above
    version, numbers, next_gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), next_gauss))


def _cuda_states(every_device: bool) -> list[torch.Tensor]:
    if not torch.cuda.is_available():
        return []
    return torch.cuda.get_rng_state_all() if every_device else [torch.cuda.get_rng_state()]


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Inside the block generators may be seeded and drawn from; afterwards they are as before."""
    before = generator_states()
    try:
        yield
    finally:
        restore_generators(before)
