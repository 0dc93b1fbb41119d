"""Where an argument belongs that LightningModel itself does not take."""

from __future__ import annotations

import inspect

import pytorch_lightning as pl
import torch

import qtorch.nn

BATCH_NAMES = {"batch_size": "size", "drop_last": "drop_last", "eval_batch_size": "eval_size"}
TRAINER_NAMES = {"epochs": "max_epochs", "n_epochs": "max_epochs", "num_epochs": "max_epochs"}
OPTIMIZER_NAMES = {"learning_rate": "lr"}


def suggest_place(name: str) -> str | None:
    """Return how LightningModel takes an argument of its parts, such as `optimizer={'lr': ...}`.

    None for a name that no part has: the optimizer, the trainer, the batches and the network.
    """
    optimizer_names = set(inspect.signature(torch.optim.Adam).parameters) - {"params"}
    trainer_names = set(inspect.signature(pl.Trainer).parameters)
    for part, spellings, names in (
        ("batch", BATCH_NAMES, set()),
        ("optimizer", OPTIMIZER_NAMES, optimizer_names),
        ("trainer", TRAINER_NAMES, trainer_names),
    ):
        own_name = spellings.get(name, name)
        if name in spellings or name in names:
            return f"{part}={{{own_name!r}: ...}}"
    network = next((n for n in ("LSTM", *sorted(dir(qtorch.nn))) if _takes(n, name)), None)
    if network is None:
        return None
    return f"network={{'_target_': 'qtorch.nn.{network}', {name!r}: ...}}"


def _takes(network: str, argument: str) -> bool:
    """Whether a class of qtorch.nn has an argument."""
    target = getattr(qtorch.nn, network, None)
    if not isinstance(target, type) or not issubclass(target, torch.nn.Module):
        return False
    return argument in inspect.signature(target).parameters
