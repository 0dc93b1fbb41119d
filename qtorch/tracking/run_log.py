"""The log of a run: what qtorch logs while the run is active, as the artifact `run.log`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qtorch.core.runtime import RedactingFormatter

RUN_LOG = "run.log"


class RunLog(logging.FileHandler):
    """Writes the log of a run to a file, line by line, so that a killed process leaves it too.

    Records from INFO on are written if the log is configured (by a command or `qtorch.init`),
    otherwise warnings and errors, which are then also printed as Python does without a handler.
    `concerns_run` says whether what is logged now belongs to the run: several runs may be active,
    each in a context of its own. A file that cannot be written ends the log, not the run; `error`
    is then the reason.
    """

    def __init__(self, path: Path, concerns_run: Callable[[], bool]) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self.path, self.error = path, ""
        self._concerns_run = concerns_run
        self.setLevel(logging.INFO)
        self.setFormatter(
            RedactingFormatter("%(asctime)s %(levelname).1s %(message)s", "%Y-%m-%d %H:%M:%S")
        )
        self._logger = logging.getLogger("qtorch")
        self._logger.addHandler(self)

    def _open(self) -> Any:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; print it too if nobody else does."""
        if not self.error and self._concerns_run():
            try:
                super().emit(record)
            except OSError as error:  # the file cannot be opened
                self.error = str(error)
        handlers = self._logger.handlers
        is_alone = all(isinstance(h, RunLog) for h in handlers) and handlers[:1] == [self]
        printer = logging.lastResort if is_alone and not logging.root.handlers else None
        if printer is not None and record.levelno >= printer.level:
            printer.handle(record)

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        """Keep the reason why a record could not be written, instead of printing a traceback."""
        self.error = str(sys.exc_info()[1])

    def finish(self) -> Path | None:
        """Stop collecting; return the file, or None if nothing was logged."""
        self._logger.removeHandler(self)
        try:
            self.close()
        except OSError as error:  # the last lines do not fit on the disk
            self.error = self.error or str(error)
        return self.path if self.path.exists() else None
