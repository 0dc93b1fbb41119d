"""Compare Alpha101 with KunQuant's on random prices, column by column, and explain each difference.

    python scripts/parity/alpha101.py --kunquant-python PYTHON

PYTHON is an interpreter with kunquant and a C++ compiler. A column is equal if over 99.9% of its
cells are, within 1e-4, from the first day on which all windows are full (before it, KunQuant has no
value, and qtorch uses the days that there are). Three expressions are compared with KunQuant's:

1. that of the handler, as it stands;
2. that with the departures of KunQuant, which are in kunquant_departures.py;
3. the same, where each rank inside the column compares the values that KunQuant's rank compares.
   They too must be equal to qtorch's. So a column that is equal only at this stage differs by the
   order of values that are equal but for rounding, such as correlations of a few ranks: exact sums
   have ties where KunQuant's float32 has none.

The table names the departures that are necessary: without one of them, the column or the values
that are ranked inside it would differ. Exits with 1 unless every column is explained.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from kunquant_departures import (
    DEPARTURES,
    EXPRESSIONS,
    NAMES,
    describe_departure,
    replace_calls,
    vary_expression,
)
from random_prices import random_prices

from qtorch.data.expression import evaluate
from qtorch.data.expression.parser import parse
from qtorch.data.panel.panel import Panel

SIDE = Path(__file__).resolve().parents[1] / "benchmark" / "kunquant_side.py"
NUM_COLUMNS, NUM_DATES, NUM_INSTRUMENTS, FIRST_FULL_DATE = 82, 450, 64, 300
TOLERANCE, MIN_SHARE, MIN_RANKED_SHARE = 1e-4, 0.999, 0.99
COMPARING = ("CSRank", "Rank", "ArgMax", "ArgMin")
STAGES = ("as they stand", "with KunQuant's departures", "with the values that KunQuant ranks")


@dataclass
class Comparison:
    """The shares of equal cells of a column, by stage; of a column that is equal, only the first.

    `ranked_share` is that of the values ranked inside the column which agree least.
    """

    name: str
    shares: list[float]
    ranked_share: float = 1.0
    departures: list[str] = field(default_factory=list)

    @property
    def stage(self) -> int | None:
        """The first stage at which the column is equal, or None."""
        if self.ranked_share <= MIN_RANKED_SHARE:
            return None
        return next((k for k, share in enumerate(self.shares) if share > MIN_SHARE), None)


class Market:
    """Random bars, KunQuant's columns of them, and the values that it ranks inside each column."""

    def __init__(self, kunquant_python: str) -> None:
        shape = NUM_DATES, NUM_INSTRUMENTS
        random_values = random_prices(np.random.default_rng(0), shape)
        prices = {name: values.astype(np.float32) for name, values in random_values.items()}
        self._kunquant = run_kunquant(kunquant_python, prices)
        # KunQuant computes vwap from amount and volume, in float32.
        prices["vwap"] = prices["vwap"] * prices["volume"] / prices["volume"]
        self._bars = Panel(
            torch.from_numpy(np.stack(list(prices.values()), 2)),
            pd.bdate_range("2020-01-01", periods=NUM_DATES),
            [f"I{k:03d}" for k in range(NUM_INSTRUMENTS)],
            list(prices),
        )

    def numbers(self) -> list[int]:
        """Return the numbers of KunQuant's columns."""
        return [int(name[5:]) for name in self._kunquant if "_" not in name]

    def measure_shares(self, expressions: dict[int, str]) -> dict[int, float]:
        """Return the shares of cells in which expressions by column equal KunQuant's columns."""
        panel = evaluate({str(k): expression for k, expression in expressions.items()}, self._bars)
        return {
            k: share_of_equal_cells(panel.column(str(k)), self._kunquant[f"alpha{k:03d}"])
            for k in expressions
        }

    def measure_ranked_values(self, number: int, expression: str) -> tuple[float, float]:
        """Compare a column whose ranks compare the values that KunQuant ranks.

        Returns the share of equal cells of the column, and that of the ranked values which agree
        least. The values of an outer rank are computed from KunQuant's values of the inner ones.
        """
        prefix = f"alpha{number:03d}_"
        ranked = {n: torch.from_numpy(v) for n, v in self._kunquant.items() if n.startswith(prefix)}
        bars = Panel(
            torch.cat([self._bars.values, *(v[:, :, None] for v in ranked.values())], 2),
            self._bars.calendar,
            self._bars.instruments,
            [*self._bars.fields, *ranked],
        )
        shares = []

        def compare_argument(call: str, arguments: tuple[str, ...]) -> str:
            if arguments[0].startswith("$"):
                return call
            values = evaluate([arguments[0]], bars).values[:, :, 0]
            by_name = {n: share_of_equal_cells(values, v.numpy()) for n, v in ranked.items()}
            nearest_name = max(by_name, key=lambda n: by_name[n], default="")
            shares.append(by_name.get(nearest_name, 0.0))
            if not nearest_name:
                return call
            return call.replace(arguments[0], f"${nearest_name}", 1)

        ranking = replace_calls(expression, COMPARING, compare_argument)
        values = evaluate([ranking], bars).values[:, :, 0]
        share = share_of_equal_cells(values, self._kunquant[f"alpha{number:03d}"])
        return share, min(shares, default=1.0)


def run_kunquant(python: str, prices: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return KunQuant's columns `[D, N]` and the values that are ranked inside them, by name."""
    with tempfile.TemporaryDirectory() as folder:
        bars_file, result_file = Path(folder) / "bars.npz", Path(folder) / "kunquant.npz"
        np.savez(bars_file, **prices)
        command = [python, str(SIDE), str(bars_file), "--alphas", "alpha101", "--ranked"]
        command += ["--repeats", "1", "--save", str(result_file)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with np.load(result_file) as file:
            return {name: file[name] for name in file.files}


def share_of_equal_cells(values: torch.Tensor, kunquant_values: np.ndarray) -> float:
    """Return the share of cells `[D, N]` that are equal after the days of incomplete windows."""
    left = values.double().numpy()[FIRST_FULL_DATE:]
    right = kunquant_values[FIRST_FULL_DATE:].astype(np.float64)
    scale = TOLERANCE * float(np.nanmedian(np.abs(right)))
    return float(np.isclose(left, right, TOLERANCE, scale, equal_nan=True).mean())


def compare_columns(market: Market) -> dict[int, Comparison]:
    """Compare all columns as they stand, and those that differ with KunQuant's departures."""
    shares = market.measure_shares({k: EXPRESSIONS[k - 1] for k in market.numbers()})
    columns = {k: Comparison(NAMES[k - 1], [share]) for k, share in shares.items()}
    different = {k: c for k, c in columns.items() if c.stage is None}
    variants = {k: vary_expression(k) for k in different}
    shares = market.measure_shares(variants)
    for number, comparison in different.items():
        share, comparison.ranked_share = market.measure_ranked_values(number, variants[number])
        comparison.shares += [shares[number], share]
        comparison.departures = [
            describe_departure(number, departure)
            for departure in DEPARTURES
            if is_necessary(departure, number, market)
        ]
    return columns


def is_necessary(departure: str, number: int, market: Market) -> bool:
    """Say whether a column, or a value ranked inside it, would differ without a departure."""
    expression = vary_expression(number, leave_out=departure)
    if parse(expression) == parse(vary_expression(number)):
        return False
    share, ranked_share = market.measure_ranked_values(number, expression)
    share = max(share, market.measure_shares({number: expression})[number])
    return share <= MIN_SHARE or ranked_share <= MIN_RANKED_SHARE


def print_table(columns: dict[int, Comparison]) -> None:
    print(f"shares of equal cells {', '.join(STAGES)}; that of the ranked values; departures:")
    for comparison in columns.values():
        shares = comparison.shares[:]
        if len(shares) > 1:
            shares.append(comparison.ranked_share)
        texts = [f"{share:8.2%}" for share in shares]
        reasons = comparison.departures[:]
        if comparison.stage == len(STAGES) - 1:
            reasons.append("orders values that are equal but for rounding")
        print(comparison.name, *texts, "; ".join(reasons) or "equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kunquant-python", required=True)
    args = parser.parse_args()
    columns = compare_columns(Market(args.kunquant_python))
    print_table(columns)
    stages = [c.stage for c in columns.values()]
    for stage, title in enumerate(STAGES):
        print(f"{stages.count(stage)} columns are equal {title}")
    num_explained = len(stages) - stages.count(None)
    print(f"{num_explained} of {len(stages)} columns are explained")
    sys.exit(num_explained < NUM_COLUMNS)


if __name__ == "__main__":
    main()
