"""Process-wide utilities: random seeds, devices, environment, logging, progress bars."""

from __future__ import annotations

import ctypes
import logging
import os
import random
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from qtorch.core.errors import ConfigError
from qtorch.core.secrets import redact_urls
from qtorch.core.session import Session, set_defaults

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

SHOW_AFTER_SECONDS = 2.0
# Options of glibc's mallopt(3): the value in a training, and afterwards. Once one of them has been
# set, glibc does not adapt the others any more; afterwards they are the largest that it adapts.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
MALLOC_OPTIONS = {
    M_TRIM_THRESHOLD: (512 << 20, 64 << 20),
    M_MMAP_THRESHOLD: (32 << 20, 32 << 20),
    M_MMAP_MAX: (0, 65536),
}
MALLOC_VARIABLES = {
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
}
GPU_SHARE_VARIABLE = "QTORCH_GPU_SHARE"
CONSOLE = "qtorch console"  # the name of the handler that shows the log

_memory_lock = threading.Lock()
_memory_contexts: list[object] = []  # of `reuse_freed_memory`, that have not ended


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, numpy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries use numpy's global generator
    torch.manual_seed(seed)


@contextmanager
def reuse_freed_memory() -> Iterator[None]:
    """Context manager in which the C library reuses the memory of freed tensors of any size.

    glibc takes a large tensor from the system and gives it back as soon as it is freed. A training
    step on a CPU would spend up to half of its time on page faults of memory that the step before
    has freed. Here such memory is kept, up to 512 MiB of it at the end of the heap, until the
    context ends. Other libraries have no such settings, and those that a user has made in the
    environment take precedence.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim") or MALLOC_VARIABLES & os.environ.keys():
        yield
        return
    context = object()
    with _memory_lock:
        _memory_contexts.append(context)
        for option, (value, _) in MALLOC_OPTIONS.items():
            library.mallopt(option, value)
    try:
        yield
    finally:
        with _memory_lock:
            _memory_contexts.remove(context)
            if not _memory_contexts:
                for option, (_, default) in MALLOC_OPTIONS.items():
                    library.mallopt(option, default)
                library.malloc_trim(0)


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


def gpu_share() -> float:
    """Return the share of each GPU's memory that belongs to this process, at most 1.

    It is less where processes share a GPU: QTORCH_GPU_SHARE, set by whoever starts them. Raises
    ConfigError for a value that is no share.
    """
    text = os.environ.get(GPU_SHARE_VARIABLE, "").strip() or "1"
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"{GPU_SHARE_VARIABLE}={text!r}: expected a number above 0, at most 1.")
    return share


def gpu_share_variables(num_processes: float) -> dict[str, str]:
    """Return the environment of processes of which this number shares each GPU of this one."""
    if num_processes <= 1:
        return {}
    return {GPU_SHARE_VARIABLE: f"{gpu_share() / num_processes:.4g}"}


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


def is_file_only(record: logging.LogRecord) -> bool:
    """Whether a log record is for a run's log file only: a progress bar shows the same."""
    return getattr(record, "file_only", False)


def show_log(level: int | str = logging.INFO) -> None:
    """Show qtorch's log in the user's own handlers, or else as the commands do."""
    logger = logging.getLogger("qtorch")
    if _console_handler(logger) is None and logging.root.handlers:
        logger.setLevel(level)
    else:
        configure_logging(level)


def configure_logging(level: int | str = logging.INFO) -> None:
    """Write qtorch's log to stderr; repeated calls change the level.

    On a terminal it is coloured, in a notebook it stands in the output of the cell. Records from
    INFO on are created whatever the level is, for the log file of a run.
    """
    logger = logging.getLogger("qtorch")
    handler = _console_handler(logger)
    if handler is None:
        handler = _create_console_handler()
        logger.addHandler(handler)
        logger.propagate = False
    handler.setLevel(level)
    logger.setLevel(min(handler.level, logging.INFO))


def _console_handler(logger: logging.Logger) -> logging.Handler | None:
    return next((h for h in logger.handlers if h.name == CONSOLE), None)


def _create_console_handler() -> logging.Handler:
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        from qtorch.core.terminal import Terminal

        handler = RichHandler(
            console=Terminal(stderr=True), show_path=False, log_time_format="%H:%M:%S"
        )
        handler.setFormatter(RedactingFormatter("%(message)s"))
    else:
        # Notebooks show stderr in red, as if each line was an error.
        handler = logging.StreamHandler(sys.stdout if is_notebook() else sys.stderr)
        if is_notebook():  # MLflow's progress bars want ipywidgets
            warnings.filterwarnings("ignore", message="IProgress not found")
        handler.setFormatter(
            RedactingFormatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
        )
    handler.set_name(CONSOLE)
    handler.addFilter(lambda record: not is_file_only(record))
    return handler


def is_notebook() -> bool:
    """Whether this process is the kernel of a Jupyter notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")


def init(
    provider_uri: str | Mapping[str, str] | None = None,
    region: str | None = None,
    *,
    tracking_uri: str | None = None,
    task_url: str | None = None,
    seed: int | None = None,
    trusted: Sequence[str] = (),
    trusted_pickle: bool | None = None,
    folder: str | None = None,
    log_level: int | str | None = logging.INFO,
) -> Session:
    """Set the defaults of this process, and show qtorch's log: epochs, metrics, run IDs.

    A later call changes only the arguments it passes. From the first call on, relative paths of
    data and stores start in the folder of that call, whatever folder the process changes to.

    provider_uri: data folder in Qlib's layout, or `{frequency: folder}`.
    region: "us", "cn" or "tw"; sets the trade unit, the price limit and the bars per year.
    tracking_uri: URI of the MLflow tracking store.
    task_url: URL of the task pool's store.
    seed: default random seed.
    trusted: packages (or `.py` files) that stored objects and pool tasks may name; a later call
        adds to them.
    trusted_pickle: whether pickles may be loaded; each runs the code that its author put into it.
    folder: where relative paths start; default: the folder of the first call.
    log_level: of the log on the terminal; None leaves Python's logging as it is. A program that
        has handlers of its own (`logging.basicConfig`) gets the log there.
    """
    if log_level is not None:
        show_log(log_level)
    return set_defaults(
        provider_uri=provider_uri,
        region=region,
        tracking_uri=tracking_uri,
        task_url=task_url,
        seed=seed,
        trusted=trusted,
        trusted_pickle=trusted_pickle,
        folder=folder,
    )


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
