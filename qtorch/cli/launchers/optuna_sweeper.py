"""`qtorch train -m hydra/sweeper=optuna`: let Optuna choose the jobs of a sweep.

Hydra's own Optuna sweeper pins an Optuna version whose storage fails with current SQLAlchemy. This
one uses Optuna directly, stores the study beside the tracking store, and prunes bad trials.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
)
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from qtorch.cli.jobs.results import FINISHED, KILLED, RUNNING, command_results
from qtorch.cli.jobs.sweep_command import current_sweep
from qtorch.cli.launchers.ray import RayLauncher
from qtorch.cli.tables.trials import report_study
from qtorch.core.errors import ConfigError, format_count, install_command, unknown_name_message
from qtorch.core.identity import digest
from qtorch.core.instantiate import resolve_config
from qtorch.study.search.trial import Choice, Space, Span, storage_url
from qtorch.study.sweep import JobResult
from qtorch.tracking.locations import default_uri
from qtorch.tracking.manager import R
from qtorch.tracking.pruning import PRUNED_TAG, TRIAL_VARIABLE

if TYPE_CHECKING:
    from qtorch.study.search.study import SharedStudy
    from qtorch.study.search.trial import TrialJob


log = logging.getLogger(__name__)

# Tag with the study's name: on the run of a trial, and, with "." and the digest of the search
# appended, on the run of the sweep.
STUDY_TAG = "qtorch.study"
# Overrides that begin with one of these may differ between commands that continue one study.
IGNORED_OVERRIDES = ("tracking", "log_level=", "runner=", "resume", "run=", "sweep.")
PAUSE_SECONDS = 1.0

PARAMETER_TAGS = ("log",)  # tag(log, ...): search the parameter on a logarithmic scale
SPACE_HINT = (
    "add at least one parameter to search: 'model.optimizer.lr=tag(log, interval(1e-4, 1e-2))', "
    "'model.network.num_layers=range(1, 4)' or model.network.hidden_size=32,64,128."
)


class OptunaSweeper(Sweeper):
    """Asks a study for trials, runs them with the launcher, and tells the study their results.

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
        self.n_trials, self.n_jobs = int(n_trials), max(int(n_jobs), 1)
        self.sampler, self.pruner = resolve_config(sampler), resolve_config(pruner)
        self.seed, self.study_name, self.storage = seed, study_name, storage
        self.grace, self.params = float(grace), resolve_config(params)
        self._next_number = 0  # number of the next job
        self._has_started = False
        # Trials whose jobs run in other processes, each with the time of the next attempt.
        self._postponed_trials: list[tuple[float, TrialJob]] = []
        self._pauses: dict[int, float] = {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Store the context and configuration, as Hydra requires; create the command's launcher."""
        # Hydra's base class expects the public names.
        self.config, self.hydra_context = config, hydra_context
        self._config, self._context = config, hydra_context
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until the study has as many as requested, counting other processes' trials."""
        search = parse_search(arguments, self.params, self._context.config_loader)
        folder = Path(str(self._config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self._config, folder / "multirun.yaml")
        study = self._create_study(search)
        self._resume_study(study)
        _keep_connection(self.launcher, True)
        try:
            while not _is_stopped():
                trials = self._take_due_trials() or self._ask_trials(study, search)
                if trials:
                    self._run_trials(study, trials, search)
                elif not self._wait_for_work(study):
                    return
            # Launchers with several processes return after Ctrl-C instead of raising.
            raise KeyboardInterrupt
        finally:
            _keep_connection(self.launcher, False)
            for _, trial in self._postponed_trials:
                study.requeue(trial, count_retry=False)
            report_study(study, self.metric, folder, self._sweep_run_id())

    def _resume_study(self, study: SharedStudy) -> None:
        """Report the trials that the study already has; retry failed ones if sweep.retry is set."""
        num_failed = 0
        if OmegaConf.select(self._config, "sweep.retry"):
            num_failed = study.retry_failed_trials()
        num_trials = study.num_final_trials()
        if num_trials:
            print(
                f"study {study.name} already has {format_count(num_trials, 'trial')}",
                file=sys.stderr,
            )
        if num_failed:
            print(f"retrying {format_count(num_failed, 'failed trial')}", file=sys.stderr)

    def _create_study(self, search: SearchOverrides) -> SharedStudy:
        try:
            from qtorch.study.search.sampler import grid_values, is_grid
            from qtorch.study.search.study import SharedStudy
        except ImportError as error:
            raise ConfigError(
                f"hydra/sweeper=optuna requires Optuna 5: {install_command('sweep')}."
            ) from error
        if is_grid(self.sampler):
            num_points = math.prod(len(values) for values in grid_values(search.space).values())
            self.n_trials = min(self.n_trials, num_points)
        url = storage_url(self.storage, default_uri())
        if self.storage is None and default_uri().startswith("http"):
            print(
                f"storing the trials in {url}, because the MLflow server's database is not "
                "accessible; use hydra.sweeper.storage=postgresql+psycopg://... to share them "
                "between machines.",
                file=sys.stderr,
            )
        return SharedStudy(
            self._choose_study_name(search),
            url,
            direction=self.direction,
            sampler=self.sampler,
            pruner=self.pruner,
            seed=self.seed,
            grace=self.grace,
        )

    def _choose_study_name(self, search: SearchOverrides) -> str:
        """Return the study's name: the given one, the sweep's, or one derived from the command.

        A derived name depends on the fixed overrides, the search space and the objective. A tag of
        the sweep's run stores the name at the first command, and later ones read it: the sweep may
        be given a name in between, and the study keeps its own.
        """
        if self.study_name:
            return str(self.study_name)
        parts = {
            "fixed": sorted(
                o for o in search.fixed if not o.lstrip("+~").startswith(IGNORED_OVERRIDES)
            ),
            "space": {name: repr(part) for name, part in search.space.items()},
            "judge": [self.metric, self.direction, self.report, self.sampler, self.pruner],
        }
        search_digest = digest(parts)[:8]
        sweep_name = OmegaConf.select(self._config, "sweep.name")
        name = str(sweep_name or f"{self._config.experiment_name}-{search_digest}")
        sweep_run_id = self._sweep_run_id()
        if sweep_run_id is None:
            return name
        sweep, tag = R.get_recorder(recorder_id=sweep_run_id), f"{STUDY_TAG}.{search_digest}"
        stored_name: str = sweep.list_tags().get(tag, name)
        sweep.set_tags(**{tag: stored_name})
        return stored_name

    def _ask_trials(self, study: SharedStudy, search: SearchOverrides) -> list[TrialJob]:
        """Ask the study for one trial per parallel job; fewer or none if it has all it needs."""
        trials: list[TrialJob] = []
        while len(trials) < self.n_jobs:
            trial = study.ask(search.space, self.n_trials)
            if trial is None:
                break
            trials.append(trial)
        return trials

    def _run_trials(
        self, study: SharedStudy, trials: Sequence[TrialJob], search: SearchOverrides
    ) -> None:
        """Launch the jobs of the trials; requeue unfinished trials if they are interrupted."""
        first, self._next_number = self._next_number, self._next_number + len(trials)
        batch = [
            [*self._trial_overrides(search, t), *self._pruning_overrides(study, t)] for t in trials
        ]
        pending_trials = dict(enumerate(trials, first))
        try:
            self.validate_batch_is_legal(batch)
            with study.keep_heartbeats([*trials, *(t for _, t in self._postponed_trials)]):
                results = self._launch(batch, first)
            for number, trial in list(pending_trials.items()):
                self._tell_result(study, trial, results.get(number))
                del pending_trials[number]
        except (ConfigError, HydraException) as error:
            for trial in pending_trials.values():
                study.fail(trial, str(error))
            raise
        except BaseException:
            for trial in pending_trials.values():
                study.requeue(trial, count_retry=False)
            raise

    def _trial_overrides(self, search: SearchOverrides, trial: TrialJob) -> list[str]:
        """Return the overrides of the trial's job; the job of a retried trial retries too."""
        return search.overrides(trial.params) + (["sweep.retry=true"] if trial.retry else [])

    def _launch(self, batch: Sequence[Sequence[str]], first: int) -> dict[int, JobResult]:
        """Launch the jobs and return their results by number.

        Jobs may be missing if the launcher fails.
        """
        error: Exception | None = None
        try:
            self.launcher.launch(batch, initial_job_idx=first)
        except Exception as launch_error:
            error = launch_error
        results = {r.number: r for r in command_results.all()}
        missing = [n for n in range(first, first + len(batch)) if n not in results]
        if missing and error is not None:
            if not self._has_started and len(missing) == len(batch):
                raise error  # no job has ever started: the launcher is at fault, not the jobs
            log.warning("jobs %s left no result: %s", missing, error)
        self._has_started = self._has_started or len(missing) < len(batch)
        return results

    def _tell_result(self, study: SharedStudy, trial: TrialJob, job: JobResult | None) -> None:
        """Tell the study how the trial's job ended; None: it left no result."""
        if job is not None and job.status == RUNNING:
            self._postpone(trial, job)
            return
        if job is None or job.status == KILLED:
            is_requeued = study.requeue(trial, count_retry=not _is_stopped())
            if is_requeued and job is not None:
                command_results.discard(job.number)
            return
        if job.status != FINISHED:
            study.fail(trial, job.error or job.status, run_id=job.run_id)
            return
        value = job.metrics.get(self.metric, math.nan)
        is_pruned = self._tag_run(study, trial, job)
        if math.isfinite(value) or is_pruned:
            study.tell(trial, value, run_id=job.run_id, has_pruned_run=is_pruned)
        elif self.metric in job.metrics:
            study.fail(trial, f"{self.metric} is {value}", run_id=job.run_id)
        else:
            raise ConfigError(
                unknown_name_message("metric of the run", self.metric, job.metrics, limit=40)
            )

    def _postpone(self, trial: TrialJob, job: JobResult) -> None:
        """Postpone a trial whose job another process is running, each time for longer.

        After a kill, a job's process may live on until it has written its checkpoint; and two
        trials may be the same job.
        """
        pause = min(2 * self._pauses.get(trial.number, PAUSE_SECONDS / 2), self.grace)
        self._pauses[trial.number] = pause
        self._postponed_trials.append((time.monotonic() + pause, trial))
        command_results.discard(job.number)

    def _take_due_trials(self) -> list[TrialJob]:
        """Take the postponed trials whose time has come, at most one per parallel job."""
        now = time.monotonic()
        due_entries = [entry for entry in self._postponed_trials if entry[0] <= now][: self.n_jobs]
        self._postponed_trials = [
            entry for entry in self._postponed_trials if entry not in due_entries
        ]
        return [trial for _, trial in due_entries]

    def _tag_run(self, study: SharedStudy, trial: TrialJob, job: JobResult) -> bool:
        """Tag the run with its trial; return whether it was pruned (for this or an equal trial)."""
        is_pruned = study.is_pruned(trial)
        if job.run_id is None:
            return is_pruned
        run = R.get_recorder(recorder_id=job.run_id)
        run.set_tags(**{STUDY_TAG: study.name, "qtorch.trial": str(trial.number)})
        return is_pruned or PRUNED_TAG in run.list_tags()

    def _pruning_overrides(self, study: SharedStudy, trial: TrialJob) -> list[str]:
        """Return the override that lets the trial's job ask the pruner whether to stop.

        It sets an environment variable, because a trial is no part of the task.
        """
        if self.pruner is None:
            return []
        judge = {
            "_target_": "qtorch.study.search.study.RunningTrial",
            "_recursive_": False,  # it builds the pruner itself
            "study": study.name,
            "id": trial.id,
            "storage": self.storage,
            "pruner": self.pruner,
        }
        text = QuotedString(json.dumps({"judge": judge, "report": self.report}), Quote.single)
        return [f"++hydra.job.env_set.{TRIAL_VARIABLE}={text.with_quotes()}"]

    def _wait_for_work(self, study: SharedStudy) -> bool:
        """Wait until it is clear whether more trials have to be run, and return that.

        All trials have been asked for, but some may run in other processes, which may die. A
        process that is alive after the grace time will finish its trials, so this one need not
        wait for it.
        """
        if self._postponed_trials:
            with study.keep_heartbeats([trial for _, trial in self._postponed_trials]):
                time.sleep(PAUSE_SECONDS)
            return True
        end = time.monotonic() + self.grace + 2 * study.interval
        while study.num_running() and time.monotonic() < end and not _is_stopped():
            time.sleep(PAUSE_SECONDS)
            if study.has_work(self.n_trials):
                return True
        return study.has_work(self.n_trials)

    def _sweep_run_id(self) -> str | None:
        """Return the ID of the sweep's run, if there is one."""
        sweep = current_sweep()
        return None if sweep is None or sweep.recorder is None else str(sweep.recorder.id)


def _is_stopped() -> bool:
    """Whether Ctrl-C or a signal has stopped the command, so that no more jobs may start."""
    sweep = current_sweep()
    return sweep is not None and sweep.is_stopped


def _keep_connection(launcher: Launcher, is_kept: bool) -> None:
    """Let the Ray launcher keep its cluster connection between batches, or close it."""
    if isinstance(launcher, RayLauncher):
        launcher.keep_connection = is_kept
        if not is_kept:
            launcher.close()


# -- the search space ------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchOverrides:
    """The overrides of a search: the fixed ones, and the search space of the others."""

    fixed: tuple[str, ...]
    space: Space

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """Return the overrides of a job for one point of the space."""
        return [*self.fixed, *(f"{name}={_format_value(params[name])}" for name in self.space)]


def parse_search(
    arguments: Sequence[str], params: Mapping[str, Any] | None, config_loader: Any = None
) -> SearchOverrides:
    """Parse the overrides of a search; those of the command take precedence over `params` (a file).

    `a,b` and `choice(a, b)` are categorical values, `range(1, 10, 2)` is a grid of numbers (without
    the end, as everywhere in Hydra), `interval(0.1, 0.5)` a continuous range, `int(interval(1, 9))`
    whole numbers including both ends; `tag(log, ...)` searches on a logarithmic scale. Raises
    ConfigError if the space is empty or cannot be searched.
    """
    parser = OverridesParser.create(config_loader=config_loader)
    param_overrides = [f"{name}={text}" for name, text in (params or {}).items()]
    parsed_overrides = parser.parse_overrides([*param_overrides, *arguments])
    last_overrides = {o.get_key_element().lstrip("+"): o for o in parsed_overrides}
    fixed, space = [], {}
    for override in parsed_overrides:
        name = override.get_key_element()
        if last_overrides[name.lstrip("+")] is not override:
            continue
        if override.is_sweep_override():
            space[name] = _parse_dimension(name, override)
        elif not override.is_hydra_override():
            fixed.append(str(override.input_line))
    if not space:
        raise ConfigError(f"the search has no space: {SPACE_HINT}")
    return SearchOverrides(tuple(fixed), space)


def _parse_dimension(name: str, override: Override) -> Choice | Span:
    value = override.value()
    tags: set[str] = getattr(value, "tags", set())
    _check_tags(name, tags)
    is_log = "log" in tags
    if isinstance(value, IntervalSweep):
        return _parse_interval(name, value, is_log)
    if isinstance(value, RangeSweep) and not value.shuffle:
        return _parse_range(name, value, is_log)
    options = tuple(dict.fromkeys(override.sweep_string_iterator()))
    if is_log:
        raise ConfigError(f"{name}: tag(log, ...) is valid for interval and range, not for choice.")
    if not options:
        raise ConfigError(f"{name}={override.get_value_string()} has no values to choose from.")
    return Choice(options)


def _parse_interval(name: str, value: IntervalSweep, is_log: bool) -> Span:
    low, high = value.start, value.end
    if low is None or high is None or not low < high:
        raise ConfigError(
            f"{name}: interval({low}, {high}) is empty; the lower bound must come first."
        )
    integer = isinstance(low, int) and isinstance(high, int)
    _check_log(name, low, is_log)
    return Span(low, high, integer=integer, log=is_log)


def _parse_range(name: str, value: RangeSweep, is_log: bool) -> Span:
    start, stop, step = value.start, value.stop, value.step
    if start is None or stop is None or not (step > 0 and start < stop):
        raise ConfigError(f"{name}: range({start}, {stop}, {step}) is empty or decreasing.")
    integer = all(isinstance(v, int) for v in (start, stop, step))
    num_values = sum(1 for _ in value.range())
    high = start + (num_values - 1) * step
    _check_log(name, start, is_log)
    if is_log and not (integer and step == 1):
        raise ConfigError(f"{name}: tag(log, range(...)) requires whole numbers and a step of 1.")
    return Span(start, high, integer=integer, log=is_log, step=None if is_log else step)


def _check_tags(name: str, tags: Iterable[str]) -> None:
    for tag in tags:
        if tag not in PARAMETER_TAGS:
            raise ConfigError(f"{name}: {unknown_name_message('tag', tag, PARAMETER_TAGS)}")


def _check_log(name: str, low: float, is_log: bool) -> None:
    if is_log and low <= 0:
        raise ConfigError(f"{name}: a logarithmic scale must start above 0; got {low}.")


def _format_value(value: Any) -> str:
    return repr(float(value)) if isinstance(value, float) else str(value)
