"""The jobs of a sweep by setting: seeds of one setting as a group, the best of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.study.sweep import SweepJob
from qtorch.tracking.recorder import Recorder

# What is chosen by the test segment has no test any more: the valid segment comes first.
RANK_IC = ("valid.Rank IC", "test.Rank IC", "Rank IC", "valid/rank_ic")
LESS_IS_BETTER = ("loss", "mse", "mae", "rmse")
MODES = ("max", "min")


@dataclass(frozen=True)
class SeedGroup:
    """Finished jobs whose tasks are equal but for the seed."""

    name: str
    jobs: tuple[SweepJob, ...]

    def spread(self, metric: str) -> tuple[float, float, int]:
        """Mean, deviation (ddof 1; NaN for one value) and number of values of a metric."""
        values = [j.metrics[metric] for j in self.jobs if metric in j.metrics]
        values = [v for v in values if math.isfinite(v)]
        if not values:
            return math.nan, math.nan, 0
        return fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values)


def common_overrides(jobs: Sequence[SweepJob], command: str = "") -> set[str]:
    """What every job was told alike; of one job alone, what stands like this in the command."""
    common = set.intersection(*(set(j.overrides) for j in jobs)) if jobs else set()
    return common if len(jobs) > 1 else common & set(command.split())


def seed_groups(jobs: Sequence[SweepJob]) -> list[SeedGroup]:
    """The finished jobs, grouped, in the order of their first ones; named by what they vary."""
    common = common_overrides(jobs)
    members: dict[str, list[SweepJob]] = {}
    for job in jobs:
        if job.status == Recorder.STATUS_FI:
            members.setdefault(job.setting, []).append(job)
    return [SeedGroup(_name(some, common), tuple(some)) for some in members.values()]


def best_metric(jobs: Sequence[SweepJob], wanted: str | None = None) -> str:
    """The metric to judge by: the one given (ConfigError where no job has it), else a Rank IC."""
    known = sorted({key for job in jobs for key in job.metrics})
    if wanted is not None:
        if wanted not in known:
            raise ConfigError(unknown_name("metric", wanted, known, limit=30))
        return wanted
    found = next((name for name in RANK_IC if name in known), None)
    if found is None:
        raise ConfigError(f"no job has a Rank IC: give metric=..., one of {', '.join(known)}.")
    return found


def mode_of(metric: str, given: str | None = None) -> str:
    """max or min: the one given, else min for losses and errors."""
    if given is not None:
        if given not in MODES:
            raise ConfigError(unknown_name("mode", given, MODES))
        return given
    last = metric.lower().replace("/", ".").rpartition(".")[2]
    return "min" if any(word in last.split("_") for word in LESS_IS_BETTER) else "max"


def best_job(jobs: Sequence[SweepJob], metric: str, mode: str = "max") -> SweepJob | None:
    """The finished job with the best value; None where none has one."""
    held = [j for j in jobs if j.status == Recorder.STATUS_FI]
    held = [j for j in held if math.isfinite(j.metrics.get(metric, math.nan))]
    pick = max if mode == "max" else min
    return pick(held, key=lambda j: j.metrics[metric]) if held else None


def best_group(groups: Sequence[SeedGroup], metric: str, mode: str = "max") -> SeedGroup | None:
    """The group with the best mean over its seeds; None where none has the metric."""
    held = [g for g in groups if g.spread(metric)[2]]
    pick = max if mode == "max" else min
    return pick(held, key=lambda g: g.spread(metric)[0]) if held else None


def _name(jobs: Sequence[SweepJob], common: set[str]) -> str:
    told = [o for o in jobs[0].overrides if o not in common and not _is_seed(o)]
    return " ".join(told) or "one setting"


def _is_seed(override: str) -> bool:
    return override.lstrip("+").partition("=")[0] in ("seed", "model.seed", "model.kwargs.seed")
