"""Replay a finished run from its own record and compare the results bit for bit.

The CPU repeats every bit of a training if its model, the number of threads, versions, data and code
are the same, and so does a GPU of the same kind with trainer.deterministic=true. Elsewhere sums are
added in another order, and the results only agree within a tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from qtorch.core.errors import ConfigError
from qtorch.tracking.manager import R
from qtorch.tracking.pruning import PRUNED_TAG
from qtorch.tracking.recorder import Recorder, load_if_present
from qtorch.trainer.failure import collect_started_runs
from qtorch.trainer.provenance import ENVIRONMENT
from qtorch.trainer.run import TASK, task_train

REPLAY_OF_TAG = "replay.of"
REPLAY_EQUAL_TAG, REPLAY_GUARANTEE_TAG = "replay.equal", "replay.guarantee"
MODEL, SCORES = "params.pkl", "pred.pkl"
MAX_NAMES = 3
SYSTEM = "system/"  # prefix of the system metrics that MLflow measures
REPORT = "report."  # prefix of a report's metrics; `qtorch report` adds them to a finished run
SOURCE = "source of "
# Parts of an environment that may be None (unknown), and how messages refer to them.
# Guarantees of a replay, the strongest first.
BIT_EQUAL, TOLERANCE, NO_GUARANTEE = "bit-equal", "tolerance", "none"
# How far results may differ where bits do not: as a share of the spread of scores, of the largest
# weight of a tensor, and of a metric (of 1, if it is smaller).
MAX_DIFFERENCE = 0.01
# Parts of an environment after whose change the same training is not the same at all.
CONTENT_PARTS = ("data", "code", "source of ", "pruned")
OPTIONAL_PARTS = {"data": "the data", "sources": "the code of the task's own modules"}


@dataclass(frozen=True)
class ResultCheck:
    """The comparison of one kind of result; `equal` is None if there was nothing to compare.

    `is_close`: the results agree within MAX_DIFFERENCE.
    """

    name: str
    equal: bool | None
    detail: str
    is_close: bool = False


@dataclass(frozen=True)
class Guarantee:
    """What the environments of two runs promise about their results: `kind`, and why."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Difference:
    """A part of the environment that changed since the original run; None where it is missing."""

    name: str
    original: str | None
    current: str | None


@dataclass
class Replay:
    """The result of a replay: both runs, the checks, and the differences of their environments.

    `unknown` are notes on what could not be compared. `guarantee`: what the results had to be.
    """

    original: Recorder
    run: Recorder
    checks: list[ResultCheck]
    differences: list[Difference]
    unknown: list[str]
    guarantee: Guarantee

    @property
    def equal(self) -> bool:
        """Whether at least one kind of result was compared and all of them are equal."""
        verdicts = [check.equal for check in self.checks if check.equal is not None]
        return bool(verdicts) and all(verdicts)

    @property
    def strongest_guarantee(self) -> str:
        """The strongest guarantee that the results keep: bit-equal, tolerance or none."""
        if self.equal:
            return BIT_EQUAL
        compared = [check for check in self.checks if check.equal is not None]
        is_close = bool(compared) and all(check.equal or check.is_close for check in compared)
        return TOLERANCE if is_close else NO_GUARANTEE

    @property
    def is_kept(self) -> bool:
        """Whether the results are equal, or as close as the environments allow."""
        return self.equal or (
            self.guarantee.kind == TOLERANCE and self.strongest_guarantee == TOLERANCE
        )


def replay_run(run_id: str, *, experiment_name: str | None = None) -> Replay:
    """Repeat a run's task in a new run (tag `replay.of`), with its seed and number of threads.

    Compares the weights, each step of each metric, and the scores. The new run belongs to the same
    experiment unless `experiment_name` is given. Raises ConfigError for a run that is not finished
    or has no task.
    """
    original: Recorder = R.get_recorder(recorder_id=run_id)
    if original.status != Recorder.STATUS_FI:
        raise ConfigError(
            f"run {original.id} is {original.status}; only a finished run can be replayed. "
            f"(To resume it: qtorch train resume={original.id})"
        )
    task = _load_task(original)
    original_environment = load_if_present(original, ENVIRONMENT) or {}
    name = experiment_name or getattr(original, "experiment_name", None)
    with collect_started_runs() as started_runs, _num_threads(original_environment.get("threads")):
        try:
            run = task_train(task, name, f"replay of {original.name}")
        finally:
            for started_run in started_runs:
                started_run.set_tags(**{REPLAY_OF_TAG: original.id})
    checks = [
        _compare_weights(original, run),
        _compare_metrics(original, run),
        _compare_scores(original, run),
    ]
    environment = load_if_present(run, ENVIRONMENT) or {}
    differences, unknown = compare_environments(original_environment, environment)
    pruning_note = original.list_tags().get(PRUNED_TAG)
    if pruning_note:
        differences.append(Difference("pruned by its search", pruning_note, "no"))
    guarantee = find_guarantee(environment, differences, unknown)
    replay = Replay(original, run, checks, differences, unknown, guarantee)
    run.set_tags(
        **{
            REPLAY_EQUAL_TAG: str(replay.equal).lower(),
            REPLAY_GUARANTEE_TAG: replay.strongest_guarantee,
        }
    )
    return replay


def find_guarantee(
    environment: Mapping[str, Any], differences: list[Difference], unknown: list[str]
) -> Guarantee:
    """Return what the results of a replay in this environment must be."""
    if unknown or not environment:
        return Guarantee(NO_GUARANTEE, "parts of the environments are unknown")
    names = [difference.name for difference in differences]
    if changed := [name for name in names if name.startswith(CONTENT_PARTS)]:
        return Guarantee(NO_GUARANTEE, f"changed: {_join_names(changed)}")
    if names:
        return Guarantee(TOLERANCE, f"changed: {_join_names(names)}")
    device = str(environment.get("device", "cpu"))
    if device.startswith("cuda") and not environment.get("deterministic"):
        return Guarantee(TOLERANCE, "the same GPU, but without trainer.deterministic=true")
    kind = "GPU with trainer.deterministic=true" if device.startswith("cuda") else "kind of CPU"
    return Guarantee(BIT_EQUAL, f"the same {kind}, versions, data and code")


def _load_task(run: Recorder) -> Any:
    task = load_if_present(run, TASK)
    if not isinstance(task, Mapping):
        raise ConfigError(
            f"run {run.id} has no task to repeat (its artifact {TASK!r} is "
            f"{'missing' if task is None else type(task).__name__}). Runs of qtorch train, "
            "task_train and the trainers store one."
        )
    return dict(task)


@contextmanager
def _num_threads(num_threads: Any) -> Iterator[None]:
    """Use the original run's number of threads, because it affects the last bits of sums."""
    import torch

    previous = torch.get_num_threads()
    if isinstance(num_threads, int):
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


# -- results -----------------------------------------------------------------------------------


def _compare_weights(original: Recorder, run: Recorder) -> ResultCheck:
    from qtorch.model.finetune import weights_digest

    first, second = (getattr(load_if_present(r, MODEL), "network_", None) for r in (original, run))
    if first is None or second is None:
        return ResultCheck("weights", None, "the model has no network whose weights can be read")
    digests = weights_digest(first), weights_digest(second)
    if digests[0] == digests[1]:
        return ResultCheck("weights", True, f"digest {digests[0][:12]}")
    left, right = first.state_dict(), second.state_dict()
    if {k: v.shape for k, v in left.items()} != {k: v.shape for k, v in right.items()}:
        return ResultCheck("weights", False, "the networks have different layers")
    largest = [float((left[k].double() - right[k].double()).abs().max()) for k in left]
    limits = [MAX_DIFFERENCE * float(left[k].double().abs().max()) for k in left]
    is_close = all(a <= b for a, b in zip(largest, limits, strict=True))
    detail = f"largest difference {max(largest, default=0):.3g}"
    return ResultCheck("weights", False, detail, is_close)


def _compare_metrics(original: Recorder, run: Recorder) -> ResultCheck:
    """Compare each step of each metric; NaN equals NaN."""
    metrics = [original.list_metrics(), run.list_metrics()]
    has_report = [any(n.startswith(REPORT) for n in each) for each in metrics]
    ignored = (SYSTEM,) if all(has_report) else (SYSTEM, REPORT)
    names = [n for n in sorted({*metrics[0], *metrics[1]}) if not n.startswith(ignored)]
    if not names:
        return ResultCheck("metrics", None, "the run has none")
    count, largest, is_close = 0, 0.0, True
    other_steps: list[str] = []
    first_difference: dict[str, int] = {}
    for name in names:
        left, right = original.metric_history(name), run.metric_history(name)
        if left.keys() != right.keys():
            other_steps.append(name)
        for step in sorted(left.keys() & right.keys()):
            count += 1
            if left[step] == right[step] or (math.isnan(left[step]) and math.isnan(right[step])):
                continue
            first_difference.setdefault(name, step)
            difference = abs(left[step] - right[step])
            largest = max(largest, difference)
            is_close &= difference <= MAX_DIFFERENCE * max(1.0, abs(left[step]))
    if not other_steps and not first_difference:
        return ResultCheck("metrics", True, f"{count} values of {len(names)} metrics")
    details = []
    if first_difference:
        first = min(first_difference, key=lambda n: (first_difference[n], n))
        details.append(
            f"{len(first_difference)} of {len(names)} metrics differ, first {first} at step "
            f"{first_difference[first]}; largest difference {largest:.3g}"
        )
    if other_steps:
        details.append(f"different steps of {_join_names(other_steps)}")
    return ResultCheck("metrics", False, "; ".join(details), is_close and not other_steps)


def _compare_scores(original: Recorder, run: Recorder) -> ResultCheck:
    left, right = load_if_present(original, SCORES), load_if_present(run, SCORES)
    if left is None or right is None:
        subject = "neither run has" if left is None and right is None else "one of the runs has no"
        return ResultCheck("predictions", None if left is None else False, f"{subject} {SCORES}")
    left, right = (pd.DataFrame(scores) for scores in (left, right))
    if not left.index.equals(right.index):
        detail = f"different samples: {len(left):,} originally, {len(right):,} now"
        return ResultCheck("predictions", False, detail)
    if left.shape != right.shape:
        detail = f"different columns: {left.shape[1]} originally, {right.shape[1]} now"
        return ResultCheck("predictions", False, detail)
    first, second = (scores.to_numpy(dtype=float) for scores in (left, right))
    if np.array_equal(first, second, equal_nan=True):
        return ResultCheck("predictions", True, f"{len(left):,} scores, bit for bit")
    largest = float(np.nanmax(np.abs(first - second), initial=0.0))
    detail = f"{len(left):,} scores, largest difference {largest:.3g}"
    num_missing = int((np.isnan(first) != np.isnan(second)).sum())
    if num_missing:
        detail += f", {num_missing:,} missing (NaN) in one of the runs"
    is_close = not num_missing and largest <= MAX_DIFFERENCE * float(np.nanstd(first))
    return ResultCheck("predictions", False, detail, is_close)


# -- environments ------------------------------------------------------------------------------


def compare_environments(
    original: Mapping[str, Any], current: Mapping[str, Any]
) -> tuple[list[Difference], list[str]]:
    """The differences between two environments, the data first, and notes on unknown parts."""
    if not original:
        reason = "the run has no record of its environment, so its versions, data, code and threads"
        return [], [f"{reason} are unknown"]
    unknown_parts = [k for k in OPTIONAL_PARTS if original.get(k) is None or current.get(k) is None]
    left, right = (
        {k: v for k, v in e.items() if k not in unknown_parts} for e in (original, current)
    )
    left, right = _environment_entries(left), _environment_entries(right)
    # Environments of different formats have different entries: only common ones are comparable.
    is_same_format = original.get("format") == current.get("format")
    differences, unknown = [], [OPTIONAL_PARTS[k] for k in unknown_parts]
    for name in sorted({*left, *right}, key=lambda n: (n != "data", not n.startswith("code"), n)):
        first, second = left.get(name), right.get(name)
        no_file = name.startswith(SOURCE) and None in (left.get(name, ""), right.get(name, ""))
        if no_file or not (is_same_format or (name in left and name in right)):
            unknown.append(name)
        elif first != second:
            differences.append(Difference(name, _to_text(first), _to_text(second)))
    return differences, (
        [f"unknown, so possibly different: {', '.join(unknown)}"] if unknown else []
    )


def _environment_entries(environment: Mapping[str, Any]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in environment.items():
        if isinstance(value, Mapping):
            prefix = {"packages": "", "sources": SOURCE}.get(name, f"{name}.")
            entries |= {f"{prefix}{k}": v for k, v in value.items()}
        elif name != "format":
            entries[name] = value
    return entries


def _to_text(value: Any) -> str | None:
    return None if value is None else str(value)


def _join_names(names: list[str]) -> str:
    num_hidden = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {num_hidden} more" if num_hidden > 0 else "")
