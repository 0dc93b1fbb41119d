"""Checkpoint files.

They are written atomically, the previous file is kept, and a damaged file is skipped.
"""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from qtorch.core.errors import ConfigError, QtorchError
from qtorch.core.files import atomic_write, remove_partial_files

log = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
CALLBACK_STATE_KEY = "qtorch_keeper"
FORMAT_VERSION = 2  # of the entry under CALLBACK_STATE_KEY


class CheckpointError(QtorchError, OSError):
    """A checkpoint could not be written or read."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically: to a temporary file, flushed to disk, then renamed.

    A crash leaves either the old file or the new one. Files hold tensors and plain values only, and
    are read with `weights_only=True`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        try:
            with atomic_write(path) as temporary:
                torch.save(checkpoint, temporary)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"could not write checkpoint {path}: {error}. Is the disk full? The existing "
                "checkpoint is unchanged."
            ) from error


def save_and_rotate(save: Any, folder: Path, *, rotate: bool = True) -> Path:
    """Save the folder's last checkpoint by calling `save(path)`; keep the old one as the previous.

    `rotate` is False in a process that only takes part in a collective save, whose file another one
    writes.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    new_path = _temporary_path(folder, LAST)
    save(str(new_path))
    if not rotate:
        return last
    if last.exists():
        os.replace(last, previous)
    os.replace(new_path, last)
    return last


def link_best_checkpoint(folder: Path) -> None:
    """Make the last checkpoint the best one, as a hard link to the same file."""
    link = _temporary_path(folder, BEST)
    link.unlink(missing_ok=True)
    try:
        os.link(folder / LAST, link)
    except OSError:  # the file system has no hard links
        link.write_bytes((folder / LAST).read_bytes())
    os.replace(link, folder / BEST)


def remove_leftovers(folder: Path, *, is_finished: bool) -> None:
    """Remove what a process left in the folder that was killed while writing a checkpoint.

    A complete checkpoint that has not been renamed yet is removed only if the training is finished:
    otherwise another process may be about to rename it, and the next checkpoint replaces it anyway.
    """
    remove_partial_files(folder)
    for name in (LAST, BEST) if is_finished else ():
        _temporary_path(folder, name).unlink(missing_ok=True)


def _temporary_path(folder: Path, name: str) -> Path:
    return folder / f".new-{name}"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint; raise CheckpointError if it is damaged or not written by qtorch."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {first}") from error
    if not isinstance(content, dict) or CALLBACK_STATE_KEY not in content:
        raise CheckpointError(f"{path} is not a checkpoint written by qtorch.")
    return content


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest readable checkpoint of a folder; skip a damaged one with a warning."""
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            log.warning("%s; trying the previous checkpoint.", error)
    return None


def find_resume_checkpoint(
    resume: str | Path | None, folder: Path | None, identity: str
) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint to resume from, or None to start from scratch.

    `resume` is None (start from scratch), "auto" (the folder's newest checkpoint if it belongs to
    the same training), or the path of a checkpoint or of a folder of checkpoints (ConfigError if it
    belongs to another training).
    """
    if resume is None:
        return None
    if resume == "auto":
        checkpoint = None if folder is None else newest_checkpoint(folder)
        _check_format(checkpoint)
        if checkpoint is None or checkpoint[1][CALLBACK_STATE_KEY]["identity"] == identity:
            return checkpoint
        log.warning(
            "%s belongs to another training (model, data or seed differ): starting from scratch.",
            checkpoint[0],
        )
        return None
    path = Path(resume)
    checkpoint = newest_checkpoint(path) if path.is_dir() else (path, read_checkpoint(path))
    if checkpoint is None:
        raise ConfigError(f"{resume} contains no checkpoint to resume from.")
    _check_format(checkpoint)
    if checkpoint[1][CALLBACK_STATE_KEY]["identity"] != identity:
        raise ConfigError(
            f"{checkpoint[0]} belongs to another training: model, data, batches or seed differ. "
            "Start from scratch (resume=None), or use finetune to train on other data."
        )
    return checkpoint


def _check_format(checkpoint: tuple[Path, dict[str, Any]] | None) -> None:
    """Refuse a checkpoint that another version of qtorch has written; the file stays unchanged."""
    if checkpoint is None:
        return
    path, version = checkpoint[0], checkpoint[1][CALLBACK_STATE_KEY].get("format", 1)
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{path} has checkpoint format {version}, but this version reads {FORMAT_VERSION}: "
            "finish the training with the version that started it, or start from scratch."
        )
