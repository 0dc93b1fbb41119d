"""Compare Alpha101 with KunQuant's on random prices, column by column.

    python scripts/parity/alpha101.py --kunquant-python PYTHON

PYTHON is an interpreter with kunquant and a C++ compiler. KunQuant's windows are rounded to the
nearest day instead of down, its ts_rank counts positions instead of a fraction, its adv is a mean
volume, and some formulas differ from the paper's; a column with one of these differences is shown
as different.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from random_prices import random_prices

from qtorch.data.expression import evaluate
from qtorch.data.handler.alpha101 import alpha101
from qtorch.data.panel.panel import Panel

SIDE = Path(__file__).resolve().parents[1] / "benchmark" / "kunquant_side.py"
NUM_DATES, NUM_INSTRUMENTS, FIRST_FULL_DATE = 600, 64, 450
# KunQuant's value by the paper's: without the constant, or with positions as ranks.
SCALES = {1: (1.0, 0.5), 4: (9.0, 0.0), 43: (160.0, 0.0), 52: (5.0, 0.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kunquant-python", required=True)
    args = parser.parse_args()
    shape = NUM_DATES, NUM_INSTRUMENTS
    random_values = random_prices(np.random.default_rng(0), shape)
    prices = {name: values.astype(np.float32) for name, values in random_values.items()}
    with tempfile.TemporaryDirectory() as folder:
        bars_file, result_file = Path(folder) / "bars.npz", Path(folder) / "kunquant.npz"
        np.savez(bars_file, **prices)
        command = [args.kunquant_python, str(SIDE), str(bars_file), "--alphas", "alpha101"]
        subprocess.run([*command, "--repeats", "1", "--save", str(result_file)], check=True)
        with np.load(result_file) as file:
            kunquant = {name: file[name].astype(np.float64) for name in file.files}
    bars = Panel(
        torch.from_numpy(np.stack(list(prices.values()), 2)),
        pd.bdate_range("2020-01-01", periods=NUM_DATES),
        [f"I{k:03d}" for k in range(NUM_INSTRUMENTS)],
        list(prices),
    )
    expressions, names = alpha101(dollar_volume="$volume")
    panel = evaluate(dict(zip(names, expressions, strict=True)), bars)
    shares = {}
    for number, name in enumerate(names, start=1):
        if (kunquant_values := kunquant.get(f"alpha{number:03d}")) is None:
            continue
        factor, shift = SCALES.get(number, (1.0, 0.0))
        values = panel.column(name).double().numpy()[FIRST_FULL_DATE:] * factor + shift
        scale = 2e-3 * float(np.nanmedian(np.abs(values)))
        is_equal = np.isclose(
            values, kunquant_values[FIRST_FULL_DATE:], 1e-3, scale, equal_nan=True
        )
        shares[name] = float(is_equal.mean())
    equal = [name for name, share in shares.items() if share > 0.94]
    print(f"{len(equal)} of {len(shares)} columns are equal (in over 94% of cells): {equal}")
    print("share of equal cells of the others:")
    print({name: round(share, 3) for name, share in shares.items() if name not in equal})


if __name__ == "__main__":
    main()
