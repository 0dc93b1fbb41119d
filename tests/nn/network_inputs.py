"""Networks and what they are fed, for the contract that all of them keep."""

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
# Padding of the day batch: the last day has three instruments, the first is full.
COUNTS = (N, 5, 3)


def _networks() -> list[type[Network]]:
    found = set()
    for module in pkgutil.iter_modules(qtorch.nn.__path__):
        for _, thing in inspect.getmembers(importlib.import_module(f"qtorch.nn.{module.name}")):
            if inspect.isclass(thing) and issubclass(thing, Network) and thing is not Network:
                found.add(thing)
    found = {cls for cls in found if not inspect.isabstract(cls)}
    return sorted(found, key=lambda c: c.__name__)


NETWORKS = _networks()


def build(cls: type[Network], seed: int = 0, **arguments: Any) -> Network:
    """A network as a dataset would complete it."""
    known = {
        "d_feat": F * T if cls.inputs == "flat" else F,
        "step_len": T,
        "num_instruments": NUM_INSTRUMENTS,
        "num_days": NUM_DAYS,
        "num_concepts": NUM_CONCEPTS,
        "num_states": NUM_STATES,
        "n_steps": 3,  # of TabNet, whose five are slow to trace
    }
    takes = inspect.signature(cls).parameters
    torch.manual_seed(seed)
    return cls(**{k: v for k, v in known.items() if k in takes}, **arguments)


def feed(cls: type[Network], *, size: int | None = None, seed: int = 1) -> dict[str, Tensor]:
    """The arguments of `forward` by name; `size` samples (one day of so many) instead of usual."""
    g = torch.Generator().manual_seed(seed)
    form = (G, N) if cls.cross_section else (N,)
    if size is not None:
        form = (1, size) if cls.cross_section else (size,)
    x = torch.randn(*form, T, F, generator=g)
    given = {"x": x.transpose(-1, -2).flatten(-2) if cls.inputs == "flat" else x}
    if cls.cross_section:
        counts = torch.tensor(COUNTS if size is None else [size])
        given["mask"] = torch.arange(form[1]) < counts[:, None]
    extras = {
        "instrument": torch.stack(
            [torch.randperm(NUM_INSTRUMENTS, generator=g)[: form[-1]] for _ in range(form[0])]
        )
        if cls.cross_section
        else torch.randint(NUM_INSTRUMENTS, form, generator=g),
        "date": torch.arange(5, 5 + form[0])[:, None].expand(form)
        if cls.cross_section
        else torch.randint(NUM_DAYS, form, generator=g),
        "errors": torch.rand(*form, T, NUM_STATES, generator=g),
        "concept": (torch.rand(*form, NUM_CONCEPTS, generator=g) > 0.5).float(),
    }
    return {**given, **{name: extras[name] for name in cls.extras}}


def real(cls: type[Network], score: Tensor, given: dict[str, Tensor]) -> Tensor:
    """The scores of samples, without those of padding."""
    return score[given["mask"]] if cls.cross_section else score
