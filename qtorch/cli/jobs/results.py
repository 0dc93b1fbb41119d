"""Store and collect the results of a command's jobs, wherever a launcher ran them."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

RESULT_FILE = "job.json"
FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"  # the statuses of MLflow's runs
RUNNING = "RUNNING"  # another process runs the job
SENT = "SENT"  # submitted to a task pool

_results: list[JobResult] = []
_sweep_folder: Path | None = None


class SweepStartError(BaseException):
    """A sweep cannot start.

    A BaseException, because Hydra turns the exceptions of callbacks into warnings.
    """


@dataclass
class JobResult:
    """The result of one job, written to its folder because a launcher may use another process.

    `note` says how the job got its run unless it was simply trained.
    """

    number: int
    overrides: list[str]
    status: str
    seconds: float
    run_id: str | None = None
    experiment: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    pool_task: dict[str, Any] | None = None  # a task in a pool: id, pool, url, wait
    note: str | None = None

    def store(self, folder: Path) -> None:
        """Write the result to the job's folder for the process that started the sweep."""
        _results.append(self)
        (folder / RESULT_FILE).write_text(json.dumps(asdict(self), indent=1))


def collect_results(folder: Path) -> None:
    """Collect the results of this command's jobs from that folder."""
    global _sweep_folder
    _sweep_folder = folder


def clear_results() -> None:
    """Forget the results of an earlier command in this process."""
    global _sweep_folder
    _sweep_folder = None
    _results.clear()


def job_results() -> list[JobResult]:
    """Return the results of all jobs that have ended, ordered by number."""
    if _sweep_folder is None:
        return sorted(_results, key=lambda j: j.number)
    results = [load_result(path) for path in _sweep_folder.rglob(RESULT_FILE)]
    return sorted((j for j in results if j is not None), key=lambda j: j.number)


def discard_result(job: JobResult) -> None:
    """Delete the result of a job that will be started again under another number."""
    if _sweep_folder is None:
        _results[:] = [j for j in _results if j.number != job.number]
        return
    for path in _sweep_folder.rglob(RESULT_FILE):
        result = load_result(path)
        if result is not None and result.number == job.number:
            path.unlink()


def add_result(result: JobResult) -> None:
    """Add a result that another process has stored to this process's results."""
    _results.append(result)


def load_result(path: Path) -> JobResult | None:
    """Load a result; return None if there is no file, or with a warning if it is invalid."""
    try:
        return JobResult(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        log.warning("cannot read the result %s: %s", path, error)
        return None
