"""All networks and suitable inputs, for the tests that every network must pass."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import torch
from torch import Tensor

import qtorch.nn
from qtorch.nn.network import Network

G, N, T, F = 3, 7, 6, 4
NUM_INSTRUMENTS, NUM_DAYS, NUM_CONCEPTS, NUM_STATES = 11, 20, 5, 3
# Numbers of instruments on the days of a batch; the other rows are padding.
COUNTS = (N, 5, 3)


def _find_networks() -> list[type[Network]]:
    networks = {
        value
        for module in pkgutil.walk_packages(qtorch.nn.__path__, "qtorch.nn.")
        for value in vars(importlib.import_module(module.name)).values()
        if inspect.isclass(value) and issubclass(value, Network) and not inspect.isabstract(value)
    }
    return sorted(networks - {Network}, key=lambda c: c.__name__)


NETWORKS = _find_networks()


def build_network(cls: type[Network], seed: int = 0, **arguments: Any) -> Network:
    """Create a network, with the arguments that a dataset would fill in."""
    dataset_arguments = {
        "d_feat": F * T if cls.inputs == "flat" else F,
        "step_len": T,
        "num_instruments": NUM_INSTRUMENTS,
        "num_days": NUM_DAYS,
        "num_concepts": NUM_CONCEPTS,
        "num_states": NUM_STATES,
        "n_steps": 3,  # of TabNet; its default of five is slow to trace
    }
    parameters = inspect.signature(cls).parameters
    torch.manual_seed(seed)
    return cls(**{k: v for k, v in dataset_arguments.items() if k in parameters}, **arguments)


def build_inputs(
    cls: type[Network], *, size: int | None = None, seed: int = 1
) -> dict[str, Tensor]:
    """Return the arguments of `forward` by name.

    `size` is the number of samples, in a single day for cross-sectional networks (None: N samples,
    or G days of up to N).
    """
    g = torch.Generator().manual_seed(seed)
    shape = (G, N) if cls.cross_section else (N,)
    if size is not None:
        shape = (1, size) if cls.cross_section else (size,)
    x = torch.randn(*shape, T, F, generator=g)
    inputs = {"x": x.transpose(-1, -2).flatten(-2) if cls.inputs == "flat" else x}
    if cls.cross_section:
        counts = torch.tensor(COUNTS if size is None else [size])
        inputs["mask"] = torch.arange(shape[1]) < counts[:, None]
    extras = {
        "instrument": torch.stack(
            [torch.randperm(NUM_INSTRUMENTS, generator=g)[: shape[-1]] for _ in range(shape[0])]
        )
        if cls.cross_section
        else torch.randint(NUM_INSTRUMENTS, shape, generator=g),
        "date": torch.arange(5, 5 + shape[0])[:, None].expand(shape)
        if cls.cross_section
        else torch.randint(NUM_DAYS, shape, generator=g),
        "errors": torch.rand(*shape, T, NUM_STATES, generator=g),
        "concept": (torch.rand(*shape, NUM_CONCEPTS, generator=g) > 0.5).float(),
    }
    return {**inputs, **{name: extras[name] for name in cls.extras}}


def drop_padding(cls: type[Network], score: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Return the scores of the samples, without those of padding."""
    return score[inputs["mask"]] if cls.cross_section else score
