"""A finished run repeated from its own record, and compared with it number by number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from qtorch.core.errors import ConfigError, LoadObjectError
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder
from qtorch.tracking.trials.place import PRUNED_TAG
from qtorch.trainer.failure import started_runs
from qtorch.trainer.provenance import ENVIRONMENT
from qtorch.trainer.run import TASK, task_train

OF_TAG = "replay.of"
EQUAL_TAG = "replay.equal"
MODEL, SCORES = "params.pkl", "pred.pkl"
MOST_NAMES = 3
SYSTEM = "system/"  # MLflow's own measurements of the machine
SOURCE = "source of "
# Of an environment: what is not known where it is None, and what it is called.
KNOWABLE = {"data": "the data", "sources": "the code of the task's own modules"}


@dataclass(frozen=True)
class Compared:
    """One kind of number: whether it came out equal, and what is to be said of it."""

    what: str
    equal: bool | None
    told: str


@dataclass(frozen=True)
class Difference:
    """Something that was another one when the run was made; None where it was not there."""

    what: str
    then: str | None
    now: str | None


@dataclass
class Replay:
    """What came out: `equal` where every number that could be compared is the same bit for bit."""

    original: Recorder
    run: Recorder
    numbers: list[Compared]
    differences: list[Difference]
    unknown: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether there was something to compare, and all of it is equal."""
        judged = [n.equal for n in self.numbers if n.equal is not None]
        return bool(judged) and all(judged)


def replay_run(run_id: str, *, experiment_name: str | None = None) -> Replay:
    """Repeat a run's task in a new run (tag `replay.of`), with its seed and number of threads.

    Compared are the weights, each step of each metric, and the scores. The new run lies in the
    same experiment unless another is named. Raises ConfigError for a run that is not finished or
    holds no task.
    """
    original: Recorder = R.get_recorder(recorder_id=run_id)
    if original.status != Recorder.STATUS_FI:
        raise ConfigError(
            f"run {original.id} is {original.status}; only a finished run has numbers to compare "
            f"with. (To go on with it: qtorch train resume={original.id})"
        )
    task = _task_of(original)
    then = _loaded(original, ENVIRONMENT) or {}
    name = experiment_name or getattr(original, "experiment_name", None)
    with started_runs() as started, _threads(then.get("threads")):
        try:
            run = task_train(task, name, f"replay of {original.name}")
        finally:
            for each in started:
                each.set_tags(**{OF_TAG: original.id})
    numbers = [_weights(original, run), _metrics(original, run), _scores(original, run)]
    now = _loaded(run, ENVIRONMENT) or {}
    found = Replay(original, run, numbers, *differences(then, now))
    stopped = original.list_tags().get(PRUNED_TAG)
    if stopped:
        found.differences.append(Difference("stopped by its search", stopped, "never"))
    run.set_tags(**{EQUAL_TAG: str(found.equal).lower()})
    return found


def _task_of(run: Recorder) -> Any:
    task = _loaded(run, TASK)
    if not isinstance(task, Mapping):
        raise ConfigError(
            f"run {run.id} holds no task that could be repeated (its artifact {TASK!r} is "
            f"{'missing' if task is None else type(task).__name__}). Runs of qtorch train, "
            "task_train and the trainers hold one."
        )
    return dict(task)


def _loaded(run: Recorder, name: str) -> Any:
    """An artifact; None where there is none."""
    try:
        return run.load_object(name)
    except LoadObjectError:
        return None


@contextmanager
def _threads(number: Any) -> Iterator[None]:
    """As many threads as the run had: sums of another number differ in their last bits."""
    import torch

    before = torch.get_num_threads()
    if isinstance(number, int):
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- numbers -----------------------------------------------------------------------------------


def _weights(original: Recorder, run: Recorder) -> Compared:
    from qtorch.model.model_state import weights_digest

    first, second = (getattr(_loaded(r, MODEL), "network_", None) for r in (original, run))
    if first is None or second is None:
        return Compared("weights", None, "the model has no network of ours to look into")
    digests = weights_digest(first), weights_digest(second)
    if digests[0] == digests[1]:
        return Compared("weights", True, f"digest {digests[0][:12]}")
    one, two = first.state_dict(), second.state_dict()
    if {k: v.shape for k, v in one.items()} != {k: v.shape for k, v in two.items()}:
        return Compared("weights", False, "the networks differ in their layers")
    largest = max((float((one[k].double() - two[k].double()).abs().max()) for k in one), default=0)
    return Compared("weights", False, f"largest difference {largest:.3g}")


def _metrics(original: Recorder, run: Recorder) -> Compared:
    """Each step of each metric; NaN equals NaN."""
    names = sorted({*original.list_metrics(), *run.list_metrics()})
    names = [n for n in names if not n.startswith(SYSTEM)]
    if not names:
        return Compared("metrics", None, "the run has none")
    count, largest = 0, 0.0
    missing: list[str] = []
    other: dict[str, int] = {}
    for name in names:
        one, two = original.logged(name), run.logged(name)
        if one.keys() != two.keys():
            missing.append(name)
        for step in sorted(one.keys() & two.keys()):
            count += 1
            if one[step] == two[step] or (math.isnan(one[step]) and math.isnan(two[step])):
                continue
            other.setdefault(name, step)
            largest = max(largest, abs(one[step] - two[step]))
    if not missing and not other:
        return Compared("metrics", True, f"{count} values of {len(names)} metrics")
    told = []
    if other:
        first = min(other, key=lambda n: (other[n], n))
        told.append(
            f"{len(other)} of {len(names)} metrics differ, first {first} at step {other[first]}; "
            f"largest difference {largest:.3g}"
        )
    if missing:
        told.append(f"not the same steps of {_few(missing)}")
    return Compared("metrics", False, "; ".join(told))


def _scores(original: Recorder, run: Recorder) -> Compared:
    one, two = _loaded(original, SCORES), _loaded(run, SCORES)
    if one is None or two is None:
        which = "neither run has" if one is None and two is None else "one of the runs has no"
        return Compared("predictions", None if one is None else False, f"{which} {SCORES}")
    one, two = (pd.DataFrame(each) for each in (one, two))
    if not one.index.equals(two.index):
        told = f"other samples: {len(one):,} then, {len(two):,} now"
        return Compared("predictions", False, told)
    first, second = one.to_numpy(), two.to_numpy()
    if first.shape == second.shape and np.array_equal(first, second, equal_nan=True):
        return Compared("predictions", True, f"{len(one):,} scores, bit for bit")
    largest = float(np.nanmax(np.abs(first.astype(float) - second.astype(float))))
    return Compared("predictions", False, f"{len(one):,} scores, largest difference {largest:.3g}")


# -- circumstances -----------------------------------------------------------------------------


def differences(
    then: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[list[Difference], list[str]]:
    """What differs between two environments, the data first; and what is to be said of what is
    not known of them."""
    if not then:
        told = "the run has no record of its environment: versions, data, code and threads of then"
        return [], [f"{told} are not known"]
    lost = [k for k in KNOWABLE if then.get(k) is None or now.get(k) is None]
    one, two = ({k: v for k, v in e.items() if k not in lost} for e in (then, now))
    one, two = _flat(one), _flat(two)
    alike = then.get("format") == now.get("format")  # else they hold other things
    found, unknown = [], [KNOWABLE[k] for k in lost]
    for name in sorted({*one, *two}, key=lambda n: (n != "data", not n.startswith("code"), n)):
        first, second = one.get(name), two.get(name)
        no_file = name.startswith(SOURCE) and None in (one.get(name, ""), two.get(name, ""))
        if no_file or not (alike or (name in one and name in two)):
            unknown.append(name)
        elif first != second:
            found.append(Difference(name, _text(first), _text(second)))
    return found, [f"not known, so perhaps not as then: {', '.join(unknown)}"] if unknown else []


def _flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in environment.items():
        if isinstance(value, Mapping):
            short = {"packages": "", "sources": SOURCE}.get(name, f"{name}.")
            found |= {f"{short}{k}": v for k, v in value.items()}
        elif name != "format":
            found[name] = value
    return found


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _few(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
