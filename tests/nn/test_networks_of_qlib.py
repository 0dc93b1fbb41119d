"""Networks with weights of real Qlib, compared with the scores of Qlib's networks."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "parity"))

import network_cases  # noqa: E402
import network_weights  # noqa: E402
import networks  # noqa: E402

GOLDEN = networks.read(ROOT / "tests" / "golden" / "qlib_networks.npz")


def golden_answers(file: str) -> dict[str, networks.Answer]:
    return {name: answer for name, answer in GOLDEN.items() if name.startswith(f"{file}:")}


def compare_single(answers: dict[str, networks.Answer]) -> networks.Row:
    (row,) = networks.compare(answers)
    return row


@pytest.mark.slow
@pytest.mark.parametrize("file", network_cases.TWINS)
def test_scores_equal_golden_scores_of_qlib(file: str) -> None:
    row = compare_single(golden_answers(file))
    if not row.is_available:
        pytest.skip(f"qtorch.nn has no {row.network}")
    assert row.passes, str(row)
    assert row.spread > 0.02, "the scores are too similar for a meaningful comparison"


def test_golden_cases_cover_the_parameter_grid() -> None:
    assert set(GOLDEN) == {case.name for case in network_cases.cases(networks.EVERY)}
    for file, twin in network_cases.TWINS.items():
        case_sizes = [c.sizes for c in network_cases.cases(networks.EVERY, [file])]
        for name, values in {**network_cases.BASE, **twin.grid_values}.items():
            assert {sizes[name] for sizes in case_sizes} == set(values), (file, name)


def test_comparison_detects_different_scores() -> None:
    answers = golden_answers("pytorch_gru")
    name = next(iter(answers))
    shifted_scores = answers[name].parts["score"] + 2e-5
    answers[name] = replace(answers[name], parts={"score": shifted_scores})
    row = compare_single(answers)
    assert not row.passes
    assert row.agree == row.outputs - len(shifted_scores)


def test_comparison_detects_swapped_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped_names = ((r"^transformation", "fc"), (r"^fc\.", "transformation."))
    monkeypatch.setitem(network_weights.NAMES, "GATs", swapped_names)
    assert not compare_single(golden_answers("pytorch_gats")).passes


def test_unmapped_parameters_are_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_weights, "NAMES", {})
    with pytest.raises(RuntimeError, match=r"without a value.*embed.*unknown.*net\.fc_in"):
        networks.compare(golden_answers("pytorch_alstm"))


@pytest.mark.qlib
@pytest.mark.slow
def test_scores_equal_those_of_installed_qlib(qlib_python: str) -> None:
    # The whole grid takes a minute; a step that is prime to its sizes still meets all of them.
    rows = networks.main(qlib_python, every=5)
    assert [str(row) for row in rows if not row.passes] == []
