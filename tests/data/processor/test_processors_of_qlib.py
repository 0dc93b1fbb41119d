"""All processors and both process types compared with the results of Qlib."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts" / "parity"))

import handlers  # noqa: E402
import processors  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "qlib_processors.npz"


def test_processors_equal_the_stored_results_of_qlib() -> None:
    frame, processor_configs = processors.golden_input()
    rows = processors.compare(frame, processors.read_golden(GOLDEN), processor_configs)
    assert len(rows) == 4 * len(processor_configs)
    assert [str(r) for r in rows if not r.passes] == []


def test_the_comparison_detects_a_difference() -> None:
    frame, processor_configs = processors.golden_input()
    golden = processors.read_golden(GOLDEN)
    name = "CSZScoreNorm/label"
    golden[f"{name}|infer|test|values"][5, -1] += 1e-3
    golden[f"{name}|infer|train|values"][5, -1] = np.nan
    rows = processors.compare(frame, golden, {name: processor_configs[name]})
    assert [r.passes for r in rows] == [False, False, True, True]


@pytest.mark.qlib
@pytest.mark.slow
def test_processors_equal_the_installed_qlib(qlib_python: str) -> None:
    assert [str(r) for r in processors.main(qlib_python) if not r.passes] == []


@pytest.mark.qlib
@pytest.mark.slow
def test_handlers_and_prepare_equal_the_installed_qlib(qlib_python: str) -> None:
    assert [str(r) for r in handlers.main(qlib_python) if not r.passes] == []
