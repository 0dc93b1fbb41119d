"""Alpha101 beside KunQuant's: each difference is a departure that scripts/parity names."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qtorch.data.expression.parser import parse
from qtorch.data.handler.alpha101 import FORMULAS

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts" / "parity"))

import kunquant_departures
from kunquant_departures import DEPARTURES, vary_expression

SCRIPT = Path(kunquant_departures.__file__).with_name("alpha101.py")


@pytest.mark.parametrize(
    ("number", "expression"),
    [
        (4, "-1*(9*Rank(CSRank($low), 9))"),
        (
            40,
            "-1*CSRank(Std($high, 10))*If(Abs(Corr($high, $volume, 10)) <= 1, "
            "Corr($high, $volume, 10), 1)",
        ),
        # The paper's windows are 16.1219 and 17.9282 days.
        (61, "CSRank($vwap - Min($vwap, 16)) < CSRank(Corr($vwap, Mean($volume, 180), 18))"),
        (101, FORMULAS[101]),
    ],
)
def test_expressions_with_the_departures_of_kunquant(number: int, expression: str) -> None:
    assert parse(vary_expression(number)) == parse(expression)


@pytest.mark.parametrize("departure", DEPARTURES)
def test_every_departure_of_kunquant_changes_a_column(departure: str) -> None:
    # A part that the handler's formula lacks, or another window than the paper's, raises.
    assert any(
        parse(vary_expression(number, leave_out=departure)) != parse(vary_expression(number))
        for number in FORMULAS
    )


@pytest.mark.qlib
def test_differences_from_kunquant_are_explained(qlib_python: str) -> None:
    has_kunquant = subprocess.run([qlib_python, "-c", "import KunQuant"], capture_output=True)
    if has_kunquant.returncode or not shutil.which("g++"):
        pytest.skip("the Python of QTORCH_QLIB_PYTHON has no KunQuant, or there is no g++")
    command = [sys.executable, str(SCRIPT), "--kunquant-python", qlib_python]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr[-3000:]
    assert "82 of 82 columns are explained" in process.stdout
