"""`qtorch train -m hydra/sweeper=optuna`: the jobs of a sweep are chosen by Optuna.

Hydra's own Optuna sweeper pins an Optuna whose storage fails with today's SQLAlchemy; this one
asks Optuna itself, keeps the study beside the tracking store, and stops what falls behind.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from qtorch.cli.ray_launcher import RayLauncher
from qtorch.cli.search_space import Searched, searched
from qtorch.cli.sweep import (
    FINISHED,
    KILLED,
    RUNNING,
    JobResult,
    finished_jobs,
    forget_job,
)
from qtorch.cli.sweep_start import the_sweep
from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.identity import digest
from qtorch.core.wording import counted
from qtorch.tracking.trials.place import PRUNED_TAG, TRIAL_VARIABLE

if TYPE_CHECKING:
    from qtorch.tracking.trials.row import Asked
    from qtorch.tracking.trials.study import Trials

log = logging.getLogger(__name__)

SWEEP_VARIABLE = "QTORCH_SWEEP"
STUDY_TAG = "qtorch.study"  # a study's name: of a trial's run; + . + a search's digest, of a sweep
# What may be another one in a command that goes on with the same study.
NO_PART = ("tracking", "log_level=", "runner=", "resume", "run=", "sweep.")
PAUSE_SECONDS = 1.0


class OptunaSweeper(Sweeper):
    """Asks a study for trials, has the launcher run them, tells the study how they ended.

    The arguments are those of conf/hydra/sweeper/optuna.yaml.
    """

    def __init__(
        self,
        metric: str,
        direction: str,
        n_trials: int,
        n_jobs: int,
        sampler: Any,
        seed: int | None,
        pruner: Any,
        report: str,
        study_name: str | None,
        storage: str | None,
        grace: float,
        params: Mapping[str, Any] | None,
    ) -> None:
        self.metric, self.direction, self.report = metric, direction, report
        self.n_trials, self.n_jobs = int(n_trials), int(n_jobs)
        self.sampler, self.pruner = _plain(sampler), _plain(pruner)
        self.seed, self.study_name, self.storage = seed, study_name, storage
        self.grace, self.params = float(grace), _plain(params)
        self._number = 0  # of the next job
        self._started = False
        self._busy: list[tuple[float, Asked]] = []  # others are at their jobs: try again then
        self._pauses: dict[int, float] = {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Hydra's; the launcher is the command's."""
        self.config, self.hydra_context = config, hydra_context  # for Hydra's own methods
        self._config, self._context = config, hydra_context
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until the study has as many as were asked for, by whatever processes."""
        found = searched(arguments, self.params, self._context.config_loader)
        folder = Path(str(self._config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self._config, folder / "multirun.yaml")
        study = self._study(found)
        self._take_up(study)
        stays_open(self.launcher, True)
        try:
            while not _stopped():
                asked = self._due() or self._asked(study, found)
                if asked:
                    self._run(study, asked, found)
                elif not self._wait(study):
                    return
            raise KeyboardInterrupt  # a launcher of several processes has returned nonetheless
        finally:
            stays_open(self.launcher, False)
            for _, trial in self._busy:
                study.give_back(trial, lost=False)
            self._tell_all(study, folder)

    def _take_up(self, study: Trials) -> None:
        """Say what there is already; with sweep.retry have what failed tried again."""
        failed = 0
        if OmegaConf.select(self._config, "sweep.retry"):
            failed = study.retry_failed()
        begun = study.counted()
        if begun:
            print(f"the study {study.name} has {counted(begun, 'trial')} already", file=sys.stderr)
        if failed:
            print(f"{counted(failed, 'failed trial')} to be tried again", file=sys.stderr)

    def _study(self, found: Searched) -> Trials:
        try:
            from qtorch.tracking.trials.parts import grid_of, is_grid
            from qtorch.tracking.trials.study import Trials
        except ImportError as error:
            raise ConfigError(
                "hydra/sweeper=optuna needs Optuna 5: pip install 'qtorch[sweep]'."
            ) from error
        from qtorch.core.session import init
        from qtorch.tracking.locations import default_uri
        from qtorch.tracking.trials.place import storage_url

        if is_grid(self.sampler):
            points = math.prod(len(values) for values in grid_of(found.space).values())
            self.n_trials = min(self.n_trials, points)
        uri = OmegaConf.select(self._config, "tracking.uri")
        if uri is not None:
            init(tracking_uri=str(uri))
        self.url = storage_url(self.storage, default_uri())
        if self.storage is None and default_uri().startswith("http"):
            print(
                f"the trials are in {self.url}, for an MLflow server's database is out of reach; "
                "hydra.sweeper.storage=postgresql+psycopg://... serves all machines.",
                file=sys.stderr,
            )
        return Trials(
            self._name(found),
            self.url,
            direction=self.direction,
            sampler=self.sampler,
            pruner=self.pruner,
            seed=self.seed,
            grace=self.grace,
        )

    def _name(self, found: Searched) -> str:
        """The given name, the sweep's, else one made of the command: what it fixes and searches,
        and by what it judges. The sweep's run remembers it: it may get a name of its own later."""
        if self.study_name:
            return str(self.study_name)
        parts = {
            "fixed": sorted(o for o in found.fixed if not o.lstrip("+~").startswith(NO_PART)),
            "space": {name: repr(part) for name, part in found.space.items()},
            "judge": [self.metric, self.direction, self.report, self.sampler, self.pruner],
        }
        own = digest(parts)[:8]
        named = OmegaConf.select(self._config, "sweep.name")
        name = str(named or f"{self._config.experiment_name}-{own}")
        parent = self._parent()
        if parent is None:
            return name
        from qtorch.tracking.r import R

        sweep, tag = R.get_recorder(recorder_id=parent), f"{STUDY_TAG}.{own}"
        remembered: str = sweep.list_tags().get(tag, name)
        sweep.set_tags(**{tag: remembered})
        return remembered

    def _asked(self, study: Trials, found: Searched) -> list[Asked]:
        asked: list[Asked] = []
        while len(asked) < max(self.n_jobs, 1):
            trial = study.ask(found.space, self.n_trials)
            if trial is None:
                break
            asked.append(trial)
        return asked

    def _run(self, study: Trials, asked: Sequence[Asked], found: Searched) -> None:
        """Launch the trials' jobs. Whatever ends this process, none of them stays behind."""
        first, self._number = self._number, self._number + len(asked)
        batch = [[*self._overrides(found, t), self._variable(study, t)] for t in asked]
        left = dict(enumerate(asked, first))
        try:
            self.validate_batch_is_legal(batch)
            with study.alive([*asked, *(t for _, t in self._busy)]):
                told = self._launched(batch, first)
            for number, trial in list(left.items()):
                self._judge(study, trial, told.get(number))
                del left[number]
        except (ConfigError, HydraException) as error:
            for trial in left.values():
                study.fail(trial, str(error))
            raise
        except BaseException:
            for trial in left.values():
                study.give_back(trial, lost=False)
            raise

    def _overrides(self, found: Searched, trial: Asked) -> list[str]:
        """The job's; whoever runs a trial that is to be tried again tries it again."""
        return found.overrides(trial.params) + (["sweep.retry=true"] if trial.retry else [])

    def _launched(self, batch: Sequence[Sequence[str]], first: int) -> dict[int, JobResult]:
        """The results of the jobs by number; one that left none failed with its launcher."""
        error: Exception | None = None
        try:
            self.launcher.launch(batch, initial_job_idx=first)
        except Exception as raised:
            error = raised
        told = {j.number: j for j in finished_jobs()}
        missing = [n for n in range(first, first + len(batch)) if n not in told]
        if missing and error is not None:
            if not self._started and len(missing) == len(batch):
                raise error  # no job has ever begun: the launcher, not the jobs
            log.warning("jobs %s left no result: %s", missing, error)
        self._started = self._started or len(missing) < len(batch)
        return told

    def _judge(self, study: Trials, trial: Asked, job: JobResult | None) -> None:
        if job is not None and job.status == RUNNING:
            self._put_off(trial, job)
            return
        if job is None or job.status == KILLED:
            again = study.give_back(trial, lost=not _stopped())
            if again and job is not None:
                forget_job(job)
            return
        if job.status != FINISHED:
            study.fail(trial, job.error or job.status, run_id=job.run_id)
            return
        value, pruned = job.metrics.get(self.metric, math.nan), self._tagged(study, trial, job)
        if math.isfinite(value) or pruned:
            study.tell(trial, value, run_id=job.run_id, pruned=pruned)
        elif self.metric in job.metrics:
            study.fail(trial, f"{self.metric} is {value}", run_id=job.run_id)
        else:
            raise ConfigError(unknown_name("metric of the run", self.metric, job.metrics, limit=40))

    def _put_off(self, trial: Asked, job: JobResult) -> None:
        """Another process is at the trial's job: it stays asked for, and is tried again when that
        may be over, each time later. (After a kill a job's own process lives on until it has
        written its checkpoint; two trials may be one job.)"""
        pause = min(2 * self._pauses.get(trial.number, PAUSE_SECONDS / 2), self.grace)
        self._pauses[trial.number] = pause
        self._busy.append((time.monotonic() + pause, trial))
        forget_job(job)

    def _due(self) -> list[Asked]:
        """The trials that were put off until now."""
        now = time.monotonic()
        due = [put_off for put_off in self._busy if put_off[0] <= now][: max(self.n_jobs, 1)]
        self._busy = [put_off for put_off in self._busy if put_off not in due]
        return [trial for _, trial in due]

    def _tagged(self, study: Trials, trial: Asked, job: JobResult) -> bool:
        """Name the trial in its run; whether that was pruned, for this trial or an equal one."""
        from qtorch.tracking.r import R

        pruned = study.is_pruned(trial)
        if job.run_id is None:
            return pruned
        run = R.get_recorder(recorder_id=job.run_id)
        run.set_tags(**{STUDY_TAG: study.name, "qtorch.trial": str(trial.number)})
        return pruned or PRUNED_TAG in run.list_tags()

    def _variable(self, study: Trials, trial: Asked) -> str:
        """The job's process learns its trial by its environment: no part of its task."""
        told = {
            "study": study.name,
            "id": trial.id,
            "number": trial.number,
            "storage": self.storage,
            "report": self.report,
            "pruner": self.pruner,
        }
        text = json.dumps(told).replace("\\", "\\\\").replace("'", "\\'")
        return f"++hydra.job.env_set.{TRIAL_VARIABLE}='{text}'"

    def _wait(self, study: Trials) -> bool:
        """Whether there may be more to do: others may die. Waits as long as it takes to tell.

        All trials are asked for; some may run elsewhere. Whoever is alive after the grace time
        brings them home, and this process need not stay.
        """
        if self._busy:
            with study.alive([trial for _, trial in self._busy]):
                time.sleep(PAUSE_SECONDS)
            return True
        end = time.monotonic() + self.grace + 2 * study.interval
        while study.running() and time.monotonic() < end and not _stopped():
            time.sleep(PAUSE_SECONDS)
            if study.has_work(self.n_trials):
                return True
        return study.has_work(self.n_trials)

    def _tell_all(self, study: Trials, folder: Path) -> None:
        from qtorch.cli.study_table import show_study

        show_study(study, self.metric, folder, self._parent())

    def _parent(self) -> str | None:
        """The sweep's own run, where it has one."""
        if os.environ.get(SWEEP_VARIABLE):
            return os.environ[SWEEP_VARIABLE]
        for override in self._config.hydra.overrides.hydra:
            name, _, value = str(override).partition("=")
            if name.endswith(f".{SWEEP_VARIABLE}"):
                return value.strip("'\"") or None
        return None


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _stopped() -> bool:
    """Whether Ctrl-C or a signal has stopped the command; no job is begun any more."""
    sweep = the_sweep()
    return sweep is not None and sweep.stopped


def stays_open(launcher: Launcher, wanted: bool) -> None:
    """Tell a launcher that holds a cluster to keep it from batch to batch, or to let it go."""
    if isinstance(launcher, RayLauncher):
        launcher.stays_open = wanted
        if not wanted:
            launcher.close()
