"""`hydra/launcher=submitit_slurm` and `submitit_local`: Hydra's own, for the jobs that are left.

Jobs that are finished are told of at once (`qtorch.cli.settled_jobs`); the others are one array,
each with the number that it has in the sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

try:
    from hydra_plugins.hydra_submitit_launcher import submitit_launcher as theirs
except ImportError:  # an optional package
    SUBMITIT_LAUNCHERS: tuple[type[Launcher], ...] = ()
else:

    class _ForJobsLeft:
        """Submitit counts an array's jobs from 0; `numbers` are those of the sweep.

        Mixed into launchers without types: mypy can neither see what is above nor subclass it.
        """

        numbers: Sequence[int] = ()

        def launch(
            self: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
        ) -> Sequence[JobReturn]:
            """Run the jobs that have something to do."""
            from qtorch.cli.settled_jobs import settled_jobs  # with torch

            jobs = dict(enumerate(job_overrides, initial_job_idx))
            returns = settled_jobs(self.hydra_context, self.config, jobs)
            self.numbers = [n for n in jobs if n not in returns]
            if self.numbers:
                done = super().launch([jobs[n] for n in self.numbers], 0)  # type: ignore[misc]  # see above
                returns.update(zip(self.numbers, done, strict=True))
            return [returns[n] for n in jobs]

        def __call__(
            self: Any, sweep_overrides: list[str], key: str, position: int, id: str, state: Any
        ) -> JobReturn:
            """One job, in its process."""
            number = self.numbers[position]
            return super().__call__(  # type: ignore[misc,no-any-return]  # see above
                sweep_overrides, key, number, f"job_id_for_{number}", state
            )

    class SubmititSlurmLauncher(_ForJobsLeft, theirs.SlurmLauncher):  # type: ignore[misc]  # likewise
        """Jobs of SLURM."""

    class SubmititLocalLauncher(_ForJobsLeft, theirs.LocalLauncher):  # type: ignore[misc]  # likewise
        """Processes of this machine."""

    SUBMITIT_LAUNCHERS = (SubmititLocalLauncher, SubmititSlurmLauncher)
