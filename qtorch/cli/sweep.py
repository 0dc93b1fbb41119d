"""The jobs of one command: what each leaves behind, wherever a launcher ran it."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

RESULT_FILE = "job.json"
FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"  # a run's own words
RUNNING = "RUNNING"  # in another process
SENT = "SENT"  # into a pool, for workers

_here: list[JobResult] = []
_sweep_folder: Path | None = None


class Refusal(BaseException):
    """A sweep that cannot begin: Hydra makes warnings of its callbacks' exceptions, not of this."""


@dataclass
class JobResult:
    """How one job ended: a file in its folder, for the launcher may run it in another process.

    `note` says how it came to its run, where it was not simply trained.
    """

    number: int
    overrides: list[str]
    status: str
    seconds: float
    run_id: str | None = None
    experiment: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    sent: dict[str, Any] | None = None  # of a task in a pool: its id, pool, url, wait
    note: str | None = None

    def store(self, folder: Path) -> None:
        """Keep the result for the process that started the sweep."""
        _here.append(self)
        (folder / RESULT_FILE).write_text(json.dumps(asdict(self), indent=1))


def collect_from(folder: Path) -> None:
    """The results of this command are what its jobs leave in that folder."""
    global _sweep_folder
    _sweep_folder = folder


def forget_jobs() -> None:
    """Begin anew: the results of an earlier command in this process do not count."""
    global _sweep_folder
    _sweep_folder = None
    _here.clear()


def finished_jobs() -> list[JobResult]:
    """The results of all jobs that ended, by number."""
    if _sweep_folder is None:
        return sorted(_here, key=lambda j: j.number)
    found = [stored_result(path) for path in _sweep_folder.rglob(RESULT_FILE)]
    return sorted((j for j in found if j is not None), key=lambda j: j.number)


def forget_job(job: JobResult) -> None:
    """Its result is no end: it will be begun again, with another number."""
    if _sweep_folder is None:
        _here[:] = [j for j in _here if j.number != job.number]
        return
    for path in _sweep_folder.rglob(RESULT_FILE):
        told = stored_result(path)
        if told is not None and told.number == job.number:
            path.unlink()


def note_here(result: JobResult) -> None:
    """Count a result that another process has stored among this process's own."""
    _here.append(result)


def stored_result(path: Path) -> JobResult | None:
    """The result in a file; None, with a warning unless there is no file, where none is."""
    try:
        return JobResult(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        log.warning("the result %s cannot be read: %s", path, error)
        return None
