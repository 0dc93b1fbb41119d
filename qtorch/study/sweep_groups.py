"""Group the jobs of a sweep by setting (all but the seed), and find the best job and group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.study.sweep import SweepJob
from qtorch.tracking.recorder import Recorder

# The valid segment comes first: a test segment that was used for selection is no test any more.
DEFAULT_METRICS = ("valid.Rank IC", "test.Rank IC", "Rank IC", "valid/rank_ic")
MINIMIZED_METRICS = ("loss", "mse", "mae", "rmse")
MODES = ("max", "min")


@dataclass(frozen=True)
class SeedGroup:
    """Finished jobs whose tasks are equal except for the seed."""

    name: str
    jobs: tuple[SweepJob, ...]

    def metric_statistics(self, metric: str) -> tuple[float, float, int]:
        """Mean, standard deviation (ddof 1; NaN for one value) and count of a metric's values."""
        values = [j.metrics[metric] for j in self.jobs if metric in j.metrics]
        values = [v for v in values if math.isfinite(v)]
        if not values:
            return math.nan, math.nan, 0
        return fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values)


def common_overrides(jobs: Sequence[SweepJob], command: str = "") -> set[str]:
    """The overrides that all jobs share; for a single job, those that the command has verbatim."""
    common = set.intersection(*(set(j.overrides) for j in jobs)) if jobs else set()
    return common if len(jobs) > 1 else common & set(command.split())


def seed_groups(jobs: Sequence[SweepJob]) -> list[SeedGroup]:
    """Group the finished jobs, in the order of their first ones; named by what they vary."""
    common = common_overrides(jobs)
    members: dict[str, list[SweepJob]] = {}
    for job in jobs:
        if job.status == Recorder.STATUS_FI:
            members.setdefault(job.setting, []).append(job)
    return [SeedGroup(_group_name(group, common), tuple(group)) for group in members.values()]


def choose_metric(jobs: Sequence[SweepJob], metric: str | None = None) -> str:
    """The metric to rank jobs by: the given one (ConfigError if no job has it), else a Rank IC."""
    logged_metrics = sorted({key for job in jobs for key in job.metrics})
    if metric is not None:
        if metric not in logged_metrics:
            raise ConfigError(unknown_name("metric", metric, logged_metrics, limit=30))
        return metric
    default = next((name for name in DEFAULT_METRICS if name in logged_metrics), None)
    if default is None:
        raise ConfigError(
            f"no job has a Rank IC; set metric=... to one of {', '.join(logged_metrics)}."
        )
    return default


def resolve_mode(metric: str, mode: str | None = None) -> str:
    """The mode "max" or "min": the given one, else "min" for losses and errors."""
    if mode is not None:
        if mode not in MODES:
            raise ConfigError(unknown_name("mode", mode, MODES))
        return mode
    last = metric.lower().replace("/", ".").rpartition(".")[2]
    return "min" if any(word in last.split("_") for word in MINIMIZED_METRICS) else "max"


def best_job(jobs: Sequence[SweepJob], metric: str, mode: str = "max") -> SweepJob | None:
    """The finished job with the best value; None if no job has the metric."""
    candidates = [j for j in jobs if j.status == Recorder.STATUS_FI]
    candidates = [j for j in candidates if math.isfinite(j.metrics.get(metric, math.nan))]
    pick = max if mode == "max" else min
    return pick(candidates, key=lambda j: j.metrics[metric]) if candidates else None


def best_group(groups: Sequence[SeedGroup], metric: str, mode: str = "max") -> SeedGroup | None:
    """The group with the best mean over its seeds; None if no group has the metric."""
    candidates = [g for g in groups if g.metric_statistics(metric)[2]]
    pick = max if mode == "max" else min
    return pick(candidates, key=lambda g: g.metric_statistics(metric)[0]) if candidates else None


def _group_name(jobs: Sequence[SweepJob], common: set[str]) -> str:
    varying = [o for o in jobs[0].overrides if o not in common and not _is_seed(o)]
    return " ".join(varying) or "one setting"


def _is_seed(override: str) -> bool:
    return override.lstrip("+").partition("=")[0] in ("seed", "model.seed", "model.kwargs.seed")
