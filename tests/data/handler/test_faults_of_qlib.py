"""Faults of Qlib that qtorch does not repeat, computed by hand and demonstrated with real Qlib."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts" / "parity"))

import faults  # noqa: E402


def test_a_day_batch_holds_the_rows_of_one_date() -> None:
    assert faults.run_qtorch()["day batches"] == [
        ["1 A", "1 B", "1 C"],
        ["2 A", "2 C"],
        ["3 A", "3 B", "3 C"],
        ["4 A", "4 B", "4 C"],
    ]


def test_a_perfect_score_has_no_loss_and_other_shapes_are_refused() -> None:
    results = faults.run_qtorch()
    # The mean of 1, 0, 1.
    assert results["losses"] == {"perfect": 0.0, "constant": pytest.approx(2 / 3)}
    assert "score [3] and target [3, 1]" in results["broadcast"]


def test_each_row_is_used_for_any_batch_size() -> None:
    results = faults.run_qtorch()
    for key in ("seen", "seen in a large batch"):
        assert results[key] == {"rows": 11, "train": 11, "valid": 11}


@pytest.mark.qlib
def test_real_qlib_has_these_faults(qlib_python: str) -> None:
    qlib_results = faults.ask_qlib(qlib_python)
    # Sorted by instrument, cut by the counts of dates: 3, 2, 3, 3.
    assert qlib_results["day batches"] == [
        ["1 A", "2 A", "3 A"],
        ["4 A", "1 B"],
        ["3 B", "4 B", "1 C"],
        ["2 C", "3 C", "4 C"],
    ]
    # All pairs of 1, 2, 3: three differ by 0, four by 1, two by 2, so 12 / 9.
    assert qlib_results["losses"] == {
        "perfect": pytest.approx(4 / 3),
        "constant": pytest.approx(2 / 3),
    }
    assert qlib_results["seen"] == {"rows": 11, "train": 8, "valid": 8}
    assert qlib_results["seen in a large batch"] == {"rows": 11, "train": 0, "valid": 0}
    assert all(f.shows_in_qlib and f.is_avoided for f in faults.faults(qlib_results))
