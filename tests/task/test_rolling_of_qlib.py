"""Rolling tasks and ensembles compared with those of real Qlib."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "parity"))

from rolling_cases import CALENDAR, build_task, flatten, rolling_cases, scores, task_windows  # noqa: E402

from qtorch.study import AverageEnsemble, RollingEnsemble, RollingGroup  # noqa: E402
from qtorch.task import MultiHorizonGenBase, RollingGen  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "qlib_rolling.json"


class Horizons(MultiHorizonGenBase):
    def set_horizon(self, task, hr):
        task["horizon"] = hr


def compute_results() -> dict:
    windows = {}
    for name, case in rolling_cases().items():
        generator = RollingGen(
            case["step"], case["rtype"], trunc_days=case["trunc_days"], calendar=CALENDAR
        )
        windows[name] = task_windows(generator(build_task(case["segments"], case["end_time"])))
    case = rolling_cases()[next(iter(windows))]
    horizons = Horizons([1, 5, 20], label_leak_n=2, calendar=CALENDAR)
    frames = scores()
    return {
        "rolling": windows,
        "horizons": task_windows(horizons(build_task(case["segments"], None))),
        "stitched": flatten(RollingGroup()(frames)[("lstm",)]),
        "rolling ensemble": flatten(RollingEnsemble()(frames)),
        "average": flatten(AverageEnsemble()({"a": frames, "b": {"c": frames}})),
    }


def check_results(results: dict, golden: dict) -> None:
    assert results["rolling"].keys() == golden["rolling"].keys()
    for name, tasks in golden["rolling"].items():
        for expected, actual in zip(tasks, results["rolling"][name], strict=True):
            assert actual["segments"] == expected["segments"], name
            # If the last window has no end, Qlib's handler ends before that window starts.
            if expected["segments"]["test"][1] is not None:
                assert actual["end_time"] == expected["end_time"], name
    assert results["horizons"] == golden["horizons"]
    for name in ("stitched", "rolling ensemble", "average"):
        actual, expected = results[name], golden[name]
        assert [row[:2] for row in actual] == [row[:2] for row in expected], name
        values = [np.array([row[2] for row in rows], dtype=float) for rows in (actual, expected)]
        np.testing.assert_allclose(*values, rtol=1e-12, atol=1e-12)


def test_results_equal_stored_results_of_qlib():
    check_results(compute_results(), json.loads(GOLDEN.read_text()))


@pytest.mark.qlib
@pytest.mark.slow
def test_results_equal_those_of_installed_qlib(qlib_python):
    script = ROOT / "scripts" / "parity" / "qlib_rolling.py"
    process = subprocess.run([qlib_python, str(script)], capture_output=True, text=True, check=True)
    check_results(compute_results(), json.loads(process.stdout))
