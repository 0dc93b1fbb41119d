"""The checkpoint of one member of a fleet: its progress, its state, its best weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtorch.model.fleet.member import Member
from qtorch.model.fleet.stack import Layout, MemberStack
from qtorch.model.loop.checkpoint import (
    CALLBACK_STATE_KEY,
    LAST,
    AtomicCheckpointIO,
    newest_checkpoint,
    save_and_rotate,
)

log = logging.getLogger(__name__)

FOLDER = "fleet"  # in the folder of a training's checkpoints
FLEET_FORMAT = 1  # of the entry "fleet"


def save_member(folder: Path, member: Member, stack: MemberStack, best: MemberStack) -> None:
    """Write the state of a member after an epoch; `stack` and `best` have its row alone.

    A checkpoint depends on the member alone, so that it can continue in a fleet with any others, or
    by itself. It is atomic, with a digest, and holds tensors and plain values only.
    """
    content = {
        CALLBACK_STATE_KEY: {"format": FLEET_FORMAT, "identity": member.identity},
        "member": member.state_dict(),
        "stack": {name: t.cpu() for name, t in stack.tensors().items()},
        "best": {name: t.cpu() for name, t in best.tensors().items()},
    }
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    io = AtomicCheckpointIO()
    save_and_rotate(lambda path: io.save_checkpoint(content, path), folder / FOLDER)


def load_member(
    folder: Path, member: Member, layout: Layout, device: torch.device
) -> tuple[MemberStack, MemberStack] | None:
    """Restore a member's progress; return its rows of the stack and of the best weights.

    None if there is no checkpoint of the same training.
    """
    checkpoint = newest_checkpoint(folder / FOLDER)
    if checkpoint is None:
        return None
    path, content = checkpoint
    if content[CALLBACK_STATE_KEY].get("identity") != member.identity:
        log.warning("%s belongs to another training: starting from scratch.", path)
        return None
    log.info("resuming from %s", path)
    member.load_state_dict(content["member"])
    member.resumed_from = str(path)
    return _build_stack(content["stack"], layout, device), _build_stack(
        content["best"], layout, device
    )


def _build_stack(tensors: dict[str, Tensor], layout: Layout, device: torch.device) -> MemberStack:
    values: dict[str, Any] = {name: t.to(device) for name, t in tensors.items()}
    return MemberStack(layout, values["weights"], {}, {}).map_tensors(values)


def has_member_checkpoint(folder: Path | None) -> bool:
    """Whether a training's folder holds the checkpoint of a member of a fleet."""
    return folder is not None and (folder / FOLDER / LAST).is_file()
