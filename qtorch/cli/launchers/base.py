"""What qtorch's launchers have in common: they only launch unfinished jobs, and lose none."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from hydra.core.utils import JobReturn
from hydra.types import HydraContext
from omegaconf import DictConfig

from qtorch.cli.jobs.finished_jobs import compose_job, skip_finished_jobs
from qtorch.cli.jobs.job import record_lost_job

Jobs = Mapping[int, list[str]]  # the overrides of each job by its number in the sweep


class UnfinishedJobsMixin:
    """Reports finished jobs at once, and runs the others under their numbers in the sweep.

    A mixin, because Hydra's submitit launchers are base classes too.
    """

    hydra_context: HydraContext
    config: DictConfig

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the unfinished jobs and wait for all of them.

        A job that could not run becomes a failed job of the sweep, not an error.
        """
        jobs = {n: list(o) for n, o in enumerate(job_overrides, initial_job_idx)}
        returns = skip_finished_jobs(self.hydra_context, self.config, jobs)
        unfinished = {n: overrides for n, overrides in jobs.items() if n not in returns}
        if unfinished:
            returns.update(self._run_jobs(unfinished))
        return [returns[n] for n in jobs]

    @abstractmethod
    def _run_jobs(self, jobs: Jobs) -> dict[int, JobReturn]:
        """Run jobs and wait for them."""

    def _record_lost_job(
        self, number: int, overrides: Sequence[str], reason: str, *, close_run: bool = True
    ) -> JobReturn:
        """Record that a job was lost; see `record_lost_job`."""
        config = compose_job(self.hydra_context, self.config, number, overrides)
        return record_lost_job(config, number, overrides, reason, close_run=close_run)
