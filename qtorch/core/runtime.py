"""Process-wide utilities: random seeds, devices, environment, logging, progress bars."""

from __future__ import annotations

import logging
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from qtorch.core.errors import ConfigError
from qtorch.core.secrets import redact_urls

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

SHOW_AFTER_SECONDS = 2.0


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, numpy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries use numpy's global generator
    torch.manual_seed(seed)


def resolve_device(device: str | int | torch.device = "auto") -> torch.device:
    """Return a torch device; "auto" is the first CUDA device if there is one, else the CPU.

    Raises ConfigError for a CUDA device that does not exist.
    """
    import torch

    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        torch_device = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except RuntimeError as error:
        raise ConfigError(
            f"{device!r} is not a device; expected 'auto', 'cpu', 'cuda' or e.g. 'cuda:1'."
        ) from error
    if torch_device.type != "cuda":
        return torch_device
    count = torch.cuda.device_count()
    if (torch_device.index or 0) >= count:
        raise ConfigError(
            f"device {device!r} does not exist: this machine has {count} CUDA devices."
        )
    if str(torch_device) == "cuda":  # without an index
        return torch.device("cuda", torch.cuda.current_device())
    return torch_device


@contextmanager
def change_environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Change environment variables inside the block."""
    previous = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class RedactingFormatter(logging.Formatter):
    """Formats log records without the secrets in URLs, also those in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        return redact_urls(super().format(record))


def configure_logging(level: int | str = logging.INFO) -> None:
    """Write qtorch's log to stderr (with rich on a terminal); repeated calls change the level."""
    logger = logging.getLogger("qtorch")
    logger.setLevel(level)
    if logger.handlers:
        return
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        from qtorch.core.terminal import Terminal

        handler = RichHandler(
            console=Terminal(stderr=True), show_path=False, log_time_format="%H:%M:%S"
        )
        handler.setFormatter(RedactingFormatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(
            RedactingFormatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
        )
    logger.addHandler(handler)
    logger.propagate = False


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items; on a terminal, show a progress bar once they take over two seconds."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not sys.stderr.isatty():
        yield from items
        return
    from qtorch.core.terminal import progress_bars

    begin = time.monotonic()
    with progress_bars(transient=True) as bars:
        bar = bars.add_task(description, total=total, visible=False)
        for item in items:
            yield item
            bars.update(bar, advance=1, visible=time.monotonic() - begin > SHOW_AFTER_SECONDS)
