"""Networks with real Qlib's weights against the scores that Qlib's gave with them."""

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


def kept(file: str) -> dict[str, networks.Answer]:
    return {name: answer for name, answer in GOLDEN.items() if name.startswith(f"{file}:")}


def row_of(answers: dict[str, networks.Answer]) -> networks.Row:
    (row,) = networks.compare(answers)
    return row


@pytest.mark.slow
@pytest.mark.parametrize("file", network_cases.TWINS)
def test_scores_are_those_of_qlib(file: str) -> None:
    row = row_of(kept(file))
    if not row.here:
        pytest.skip(f"qtorch.nn has no {row.ours}")
    assert row.passes, str(row)
    assert row.spread > 0.02, "scores that are all alike would agree with anything"


def test_the_golden_points_cover_the_grid() -> None:
    assert set(GOLDEN) == {case.name for case in network_cases.cases(networks.EVERY)}
    for file, twin in network_cases.TWINS.items():
        some = [c.sizes for c in network_cases.cases(networks.EVERY, [file])]
        for name, values in {**network_cases.BASE, **twin.varied}.items():
            assert {sizes[name] for sizes in some} == set(values), (file, name)


def test_the_comparison_notices_a_score_that_differs() -> None:
    answers = kept("pytorch_gru")
    name = next(iter(answers))
    shifted = answers[name].parts["score"] + 2e-5
    answers[name] = replace(answers[name], parts={"score": shifted})
    row = row_of(answers)
    assert not row.passes
    assert row.agree == row.outputs - len(shifted)


def test_the_comparison_notices_weights_in_the_wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = ((r"^transformation", "fc"), (r"^fc\.", "transformation."))
    monkeypatch.setitem(network_weights.NAMES, "GATs", swapped)
    assert not row_of(kept("pytorch_gats")).passes


def test_a_parameter_without_a_place_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_weights, "NAMES", {})
    with pytest.raises(RuntimeError, match=r"without a value.*embed.*not known.*net\.fc_in"):
        networks.compare(kept("pytorch_alstm"))


@pytest.mark.qlib
@pytest.mark.slow
def test_scores_are_those_of_qlib_now(qlib_python: str) -> None:
    assert [str(row) for row in networks.main(qlib_python) if not row.passes] == []
