"""The checkpoint of a fleet: the state of every running member, and the results of ended ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qtorch.model.fleet.member import Member
from qtorch.model.fleet.stack import MemberStack
from qtorch.model.fleet.training import FleetTraining
from qtorch.model.loop.checkpoint import (
    CALLBACK_STATE_KEY,
    AtomicCheckpointIO,
    get_generator_states,
    newest_checkpoint,
    restore_generators,
    save_and_rotate,
)

log = logging.getLogger(__name__)

FLEET_FORMAT = "fleet-1"  # of the entry under CALLBACK_STATE_KEY
MEMBERS_FOLDER = "members"


class FleetCheckpoints:
    """The folder of a fleet's checkpoints.

    `last.ckpt` (and the one before it) holds the running members after a round; a member that has
    ended is written once, to a file of its own. Files are atomic, with a digest, and hold tensors
    and plain values only. A member is found again by the identity of its training, so that a
    resumed fleet may have other members beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._io = AtomicCheckpointIO()
        (folder / MEMBERS_FOLDER).mkdir(parents=True, exist_ok=True)

    def save(self, training: FleetTraining) -> None:
        """Write the state after a round."""
        stack, best = training.stack, training.best
        content = {
            "members": [m.state_dict() for m in training.members],
            "stack": {k: t.cpu() for k, t in stack.tensors().items()},
            "best": {k: t.cpu() for k, t in best.tensors().items()},
            "generators": get_generator_states(training.device),
            "rounds": training.num_rounds,
        }
        save_and_rotate(lambda path: self._write(content, path), self.folder)

    def save_member(self, member: Member) -> None:
        """Write the result of a member that has ended."""
        content = {"member": member.state_dict(), "weights": member.network.state_dict()}
        self._write(content, str(self._member_path(member)))

    def _write(self, content: Mapping[str, Any], path: str) -> None:
        state = {CALLBACK_STATE_KEY: {"format": FLEET_FORMAT}, **content}
        self._io.save_checkpoint(state, path)

    def _member_path(self, member: Member) -> Path:
        return self.folder / MEMBERS_FOLDER / f"{member.identity}.ckpt"

    def knows(self, member: Member) -> bool:
        """Whether there is anything of a member in the folder."""
        if self._member_path(member).is_file():
            return True
        checkpoint = newest_checkpoint(self.folder)
        states = [] if checkpoint is None else checkpoint[1]["members"]
        return any(state["identity"] == member.identity for state in states)

    def load_finished(self, member: Member) -> bool:
        """Load the result of a member that had ended; return whether there is one."""
        path = self._member_path(member)
        if not path.is_file():
            return False
        content = self._io.load_checkpoint(path)
        member.load_state_dict(content["member"])
        member.network.load_state_dict(content["weights"])
        return True

    def restore(self, training: FleetTraining) -> None:
        """Let the members of the last checkpoint continue where they were.

        Random draws (dropout) continue as well if the fleet has the same members.
        """
        checkpoint = newest_checkpoint(self.folder)
        if checkpoint is None:
            return
        path, content = checkpoint
        places = {state["identity"]: k for k, state in enumerate(content["members"])}
        members = [m for m in training.waiting if m.identity in places]
        members.sort(key=lambda m: places[m.identity])
        members = members[: training.max_members]
        if not members:
            return
        log.info("resuming %d members of the fleet from %s", len(members), path)
        for member in members:
            member.load_state_dict(content["members"][places[member.identity]])
        rows = torch.tensor([places[m.identity] for m in members])
        stacks = [_load_stack(content[name], rows, training) for name in ("stack", "best")]
        training.restore(members, *stacks)
        training.num_rounds = int(content["rounds"])
        if len(members) == len(places):
            restore_generators(content["generators"], training.device)


def _load_stack(
    tensors: Mapping[str, torch.Tensor], rows: torch.Tensor, training: FleetTraining
) -> MemberStack:
    values = {k: t.index_select(0, rows).to(training.device) for k, t in tensors.items()}
    weights = values["weights"]
    return MemberStack(training.layout, weights, {}, {}).map_tensors(values)
