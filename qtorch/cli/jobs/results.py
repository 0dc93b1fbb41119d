"""Store and collect the results of a command's jobs, wherever a launcher ran them.

Hydra discards the return values of a sweep's jobs, and a launcher's workers share no memory with
the command. So each job writes its result to its folder, and the command reads them there.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from qtorch.core.files import write_private
from qtorch.study.sweep import JobResult

log = logging.getLogger(__name__)

RESULT_FILE = "job.json"
FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"  # the statuses of MLflow's runs
RUNNING = "RUNNING"  # another process runs the job
SENT = "SENT"  # submitted to a task pool


class CommandResults:
    """The results of this command's jobs: those of this process, or those in a sweep's folder."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the results of an earlier command in this process."""
        self._own_results: list[JobResult] = []
        self._folder: Path | None = None
        self._stale_files: dict[Path, int] = {}

    def watch_folder(self, folder: Path) -> None:
        """Collect the results from a sweep's folder, which jobs in other processes write to.

        Files of an earlier command with the same `hydra.sweep.dir` do not count until a job of
        this command has written them again.
        """
        self._folder = folder.resolve()
        self._stale_files = {p: p.stat().st_mtime_ns for p in self._folder.rglob(RESULT_FILE)}

    def add(self, result: JobResult) -> None:
        """Add a result that is stored already."""
        self._own_results.append(result)

    def store(self, result: JobResult, folder: Path) -> None:
        """Add a result, and write it to the job's folder for the process of the command.

        A full disk must not hide the job's own outcome: it is only logged.
        """
        self.add(result)
        try:
            write_private(folder / RESULT_FILE, json.dumps(asdict(result), indent=1))
        except OSError as error:
            log.warning("cannot write the result of the job: %s", error)

    def load(self, folder: Path) -> JobResult | None:
        """Load the result that a job of this command has written to its folder, if there is one."""
        path = (folder / RESULT_FILE).resolve()
        try:
            if path.stat().st_mtime_ns == self._stale_files.get(path):
                return None
            return JobResult(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            log.warning("cannot read the result %s: %s", path, error)
            return None

    def all(self) -> list[JobResult]:
        """Return the results of all jobs that have ended, ordered by number."""
        results = self._own_results
        if self._folder is not None:
            files = self._folder.rglob(RESULT_FILE)
            results = [r for path in files if (r := self.load(path.parent)) is not None]
        return sorted(results, key=lambda r: r.number)

    def discard(self, number: int) -> None:
        """Delete the result of a job that will be started again under another number."""
        self._own_results = [r for r in self._own_results if r.number != number]
        for path in [] if self._folder is None else list(self._folder.rglob(RESULT_FILE)):
            result = self.load(path.parent)
            if result is not None and result.number == number:
                path.unlink()


command_results = CommandResults()
