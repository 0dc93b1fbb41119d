"""The log of a run: what qtorch logs while the run is active, saved as the artifact `run.log`."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from qtorch.core.runtime import RedactingFormatter

RUN_LOG = "run.log"


class RunLog(logging.FileHandler):
    """Collects the log of a run in a temporary file.

    Records from INFO on are collected if the log is configured (by a command or `qtorch.init`),
    otherwise warnings and errors, which are then also printed as Python does without a handler.
    `concerns_run` says whether what is logged now belongs to the run: several runs may be active,
    each in a context of its own.
    """

    def __init__(self, concerns_run: Callable[[], bool]) -> None:
        self._concerns_run = concerns_run
        self._folder = tempfile.TemporaryDirectory(prefix="qtorch-log-")
        super().__init__(Path(self._folder.name, RUN_LOG), encoding="utf-8", delay=True)
        self.setLevel(logging.INFO)
        self.setFormatter(
            RedactingFormatter("%(asctime)s %(levelname).1s %(message)s", "%Y-%m-%d %H:%M:%S")
        )
        self._logger = logging.getLogger("qtorch")
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; print it too if nobody else does."""
        if self._concerns_run():
            super().emit(record)
        handlers = self._logger.handlers
        is_alone = all(isinstance(h, RunLog) for h in handlers) and handlers[:1] == [self]
        printer = logging.lastResort if is_alone and not logging.root.handlers else None
        if printer is not None and record.levelno >= printer.level:
            printer.handle(record)

    def finish(self, name: str) -> Path | None:
        """Stop collecting; return the file under this name, or None if nothing was logged."""
        self._logger.removeHandler(self)
        self.close()
        path = Path(self.baseFilename)
        return path.rename(path.with_name(name)) if path.exists() else None

    def delete(self) -> None:
        """Delete the temporary file."""
        self._folder.cleanup()
