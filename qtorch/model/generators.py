"""Save and restore the state of every random generator that a training may use."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def get_generator_states(*, every_device: bool = True) -> dict[str, Any]:
    """Return the states of torch (CPU and CUDA), numpy and Python as tensors and plain values.

    Plain values let a checkpoint load without running any code. With `every_device=False` only the
    current CUDA device is included: asking the others would initialize them.
    """
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - other libraries use the global generator
    name, keys, position, has_gauss, gauss = numpy_state
    version, numbers, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": _cuda_states(every_device),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(numbers), next_gauss],
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Restore the states that `get_generator_states` returned."""
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
def preserve_generators() -> Iterator[None]:
    """Context manager that restores the random generators at the end of the block."""
    states = get_generator_states()
    try:
        yield
    finally:
        restore_generators(states)
