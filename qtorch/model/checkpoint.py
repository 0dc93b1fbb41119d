"""Checkpoint files: written whole or not at all, the one before kept, a damaged one passed over."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from qtorch.core.errors import ConfigError, QtorchError
from qtorch.core.files import remove_unfinished, whole_file

log = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
KEEPER = "qtorch_keeper"
FORMAT = 2  # of what lies under KEEPER


class CheckpointError(QtorchError, OSError):
    """A checkpoint could not be written, or cannot be read."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, brings it to the disk, then renames: a crash in the middle leaves
    the old file or the new one. Files hold tensors and plain values, and are read as such."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        try:
            with whole_file(path) as temporary:
                torch.save(checkpoint, temporary)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint {path} could not be written: {error}. Is the disk full? What was "
                "there before is untouched."
            ) from error


def save_rotating(save: Any, folder: Path, *, rotate: bool = True) -> Path:
    """`save(path)` as the folder's last checkpoint; what was last becomes the previous one.

    `rotate` is False in a process that only takes part in saving what another one writes.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    fresh = _new(folder, LAST)
    save(str(fresh))
    if not rotate:
        return last
    if last.exists():
        os.replace(last, previous)
    os.replace(fresh, last)
    return last


def keep_best(folder: Path) -> None:
    """The last checkpoint is also the best so far: a second name for the same file."""
    link = _new(folder, BEST)
    link.unlink(missing_ok=True)
    try:
        os.link(folder / LAST, link)
    except OSError:  # a file system without hard links
        link.write_bytes((folder / LAST).read_bytes())
    os.replace(link, folder / BEST)


def tidy(folder: Path, *, ended: bool) -> None:
    """Remove what a process that was killed in the middle of a checkpoint left in the folder.

    A whole checkpoint that was not yet given its name goes only when the training has ended: the
    next one takes its place, and another process may be about to name it.
    """
    remove_unfinished(folder)
    for name in (LAST, BEST) if ended else ():
        _new(folder, name).unlink(missing_ok=True)


def _new(folder: Path, name: str) -> Path:
    return folder / f".new-{name}"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint of ours; CheckpointError where it is damaged or foreign."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {first}") from error
    if not isinstance(content, dict) or KEEPER not in content:
        raise CheckpointError(f"{path} is no checkpoint that a fit of qtorch has written.")
    return content


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a folder that can be read; a damaged one is passed over, loudly."""
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            log.warning("%s; trying the one before it.", error)
    return None


def checkpoint_to_resume(
    resume: str | Path | None, folder: Path | None, identity: str
) -> tuple[Path, dict[str, Any]] | None:
    """What a fit goes on from: None for "auto" where there is nothing that belongs to it.

    `resume` is None (start anew), "auto" (the folder's newest, if it is of the same training),
    or the path of a checkpoint or of a folder of them (ConfigError if it is of another one).
    """
    if resume is None:
        return None
    if resume == "auto":
        found = None if folder is None else newest_checkpoint(folder)
        _check_format(found)
        if found is None or found[1][KEEPER]["identity"] == identity:
            return found
        log.warning("%s is of another training (model, data or seed): starting anew.", found[0])
        return None
    path = Path(resume)
    found = newest_checkpoint(path) if path.is_dir() else (path, read_checkpoint(path))
    if found is None:
        raise ConfigError(f"{resume} holds no checkpoint to resume from.")
    _check_format(found)
    if found[1][KEEPER]["identity"] != identity:
        raise ConfigError(
            f"{found[0]} is a checkpoint of another training: model, data, batches or seed differ. "
            "Start anew (resume=None), or use finetune to go on with other data."
        )
    return found


def _check_format(found: tuple[Path, dict[str, Any]] | None) -> None:
    """Refuse what another version of qtorch has written: nothing of it is lost."""
    if found is None:
        return
    path, written = found[0], found[1][KEEPER].get("format", 1)
    if written != FORMAT:
        raise ConfigError(
            f"{path} is a checkpoint of format {written}, and this version of qtorch reads format "
            f"{FORMAT}: finish the training with the version that began it, or start anew."
        )
