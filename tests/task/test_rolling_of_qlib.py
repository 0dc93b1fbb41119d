"""Rolling tasks and ensembles against what real Qlib made of the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "parity"))

from rolling_cases import CALENDAR, flat, rolling_cases, scores, shown, task_of  # noqa: E402

from qtorch.study import AverageEnsemble, RollingEnsemble, RollingGroup  # noqa: E402
from qtorch.task import MultiHorizonGenBase, RollingGen  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "qlib_rolling.json"


class Horizons(MultiHorizonGenBase):
    def set_horizon(self, task, hr):
        task["horizon"] = hr


def ours() -> dict:
    rolled = {}
    for name, case in rolling_cases().items():
        generator = RollingGen(
            case["step"], case["rtype"], trunc_days=case["trunc_days"], calendar=CALENDAR
        )
        rolled[name] = shown(generator(task_of(case["segments"], case["end_time"])))
    case = rolling_cases()[next(iter(rolled))]
    horizons = Horizons([1, 5, 20], label_leak_n=2, calendar=CALENDAR)
    frames = scores()
    return {
        "rolling": rolled,
        "horizons": shown(horizons(task_of(case["segments"], None))),
        "stitched": flat(RollingGroup()(frames)[("lstm",)]),
        "rolling ensemble": flat(RollingEnsemble()(frames)),
        "average": flat(AverageEnsemble()({"a": frames, "b": {"c": frames}})),
    }


def check(made: dict, golden: dict) -> None:
    assert made["rolling"].keys() == golden["rolling"].keys()
    for name, tasks in golden["rolling"].items():
        for theirs, own in zip(tasks, made["rolling"][name], strict=True):
            assert own["segments"] == theirs["segments"], name
            # Where the last window is open, Qlib leaves a handler that ends before it begins.
            if theirs["segments"]["test"][1] is not None:
                assert own["end_time"] == theirs["end_time"], name
    assert made["horizons"] == golden["horizons"]
    for name in ("stitched", "rolling ensemble", "average"):
        own, theirs = made[name], golden[name]
        assert [row[:2] for row in own] == [row[:2] for row in theirs], name
        values = [np.array([row[2] for row in rows], dtype=float) for rows in (own, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-12, atol=1e-12)


def test_as_real_qlib_made_them():
    check(ours(), json.loads(GOLDEN.read_text()))


@pytest.mark.qlib
@pytest.mark.slow
def test_against_qlib_now(qlib_python):
    script = ROOT / "scripts" / "parity" / "qlib_rolling.py"
    done = subprocess.run([qlib_python, str(script)], capture_output=True, text=True, check=True)
    check(ours(), json.loads(done.stdout))
