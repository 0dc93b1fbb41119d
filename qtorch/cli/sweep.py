"""The jobs of one command: what each leaves behind, wherever a launcher ran it."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

log = logging.getLogger(__name__)

RESULT_FILE = "job.json"
FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"  # a run's own words
SENT = "SENT"  # into a pool, for workers

_here: list[JobResult] = []
_sweep_folder: Path | None = None


@dataclass
class JobResult:
    """How one job ended: a file in its folder, for the launcher may run it in another process."""

    number: int
    overrides: list[str]
    status: str
    seconds: float
    run_id: str | None = None
    experiment: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    sent: dict[str, Any] | None = None  # of a task in a pool: its id, pool, url, wait

    def store(self, folder: Path) -> None:
        """Keep the result for the process that started the sweep."""
        _here.append(self)
        (folder / RESULT_FILE).write_text(json.dumps(asdict(self), indent=1))


class SweepFolder(Callback):
    """Tells the starting process where the jobs of a sweep put their results.

    Hydra gives a sweep's return values to nobody, and a launcher's workers share no memory.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember the sweep's folder."""
        global _sweep_folder
        _sweep_folder = Path(str(config.hydra.sweep.dir)).resolve()


def forget_jobs() -> None:
    """Begin anew: the results of an earlier command in this process do not count."""
    global _sweep_folder
    _sweep_folder = None
    _here.clear()


def finished_jobs() -> list[JobResult]:
    """The results of all jobs that ended, by number."""
    if _sweep_folder is None:
        return sorted(_here, key=lambda j: j.number)
    found = []
    for path in _sweep_folder.rglob(RESULT_FILE):
        try:
            found.append(JobResult(**json.loads(path.read_text())))
        except (ValueError, TypeError) as error:
            log.warning("the result %s cannot be read: %s", path, error)
    return sorted(found, key=lambda j: j.number)
