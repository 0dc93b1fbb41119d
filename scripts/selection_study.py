"""Count how often the tests of a choice among many find something in noise, and find a real edge.

    python scripts/selection_study.py [--repeats 200] [--strategies 500] [--seed 30000]

Each repeat draws the daily returns of strategies without skill, of five kinds, and then gives one
of them an edge. Prints the shares of the repeats with a find; 200 repeats take about ten minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import pandas as pd

from qtorch.metrics import SelectionTest, assess_selection

DAYS, SHORT_DAYS, FIRST_DAYS = 750, 250, 200
EDGES = (0.15, 0.2, 0.25)  # daily Sharpe ratios
FINDS: dict[str, Callable[[SelectionTest], bool]] = {
    "Hansen's p under 5%": lambda test: test.superiority.p_value < 0.05,
    "White's p under 5%": lambda test: test.superiority.reality_check < 0.05,
    "deflated Sharpe ratio over 95%": lambda test: test.sharpe.probability > 0.95,
    "verdict of three": lambda test: test.is_beyond_luck,
}


def draw_heavy_tails(rng: np.random.Generator, num: int, days: int = DAYS) -> np.ndarray:
    return rng.standard_t(5, (days, num))


def draw_few_days(rng: np.random.Generator, num: int) -> np.ndarray:
    return draw_heavy_tails(rng, num, SHORT_DAYS)


def draw_autocorrelation(rng: np.random.Generator, num: int) -> np.ndarray:
    values = draw_heavy_tails(rng, num, DAYS + FIRST_DAYS)
    for day in range(1, len(values)):
        values[day] += 0.15 * values[day - 1]
    return values[FIRST_DAYS:]


def draw_common_factor(rng: np.random.Generator, num: int) -> np.ndarray:
    return draw_heavy_tails(rng, num) + draw_heavy_tails(rng, 1)


def draw_volatility_clusters(rng: np.random.Generator, num: int) -> np.ndarray:
    """A GARCH(1, 1) process per strategy, whose shocks share a factor."""
    shocks = 0.8 * rng.normal(size=(DAYS + FIRST_DAYS, num))
    shocks += 0.6 * rng.normal(size=(DAYS + FIRST_DAYS, 1))
    variance = np.ones(num)
    values = np.empty_like(shocks)
    for day, shock in enumerate(shocks):
        values[day] = np.sqrt(variance) * shock
        variance = 0.05 + 0.1 * values[day] ** 2 + 0.85 * variance
    return values[FIRST_DAYS:]


KINDS = {
    "heavy tails": draw_heavy_tails,
    "250 days": draw_few_days,
    "autocorrelation": draw_autocorrelation,
    "common factor": draw_common_factor,
    "volatility clusters": draw_volatility_clusters,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--strategies", type=int, default=500)
    parser.add_argument("--seed", type=int, default=30000, help="of the first repeat")
    args = parser.parse_args()
    for kind, draw in KINDS.items():
        rows: dict[float, list[list[bool]]] = {edge: [] for edge in (0.0, *EDGES)}
        for repeat in range(args.repeats):
            rng = np.random.default_rng(args.seed + repeat)
            returns = pd.DataFrame(0.01 * draw(rng, args.strategies))
            # Edges vary less than noise and cost as much time: a tenth of the repeats is enough.
            for edge in rows if repeat % 10 == 0 else (0.0,):
                changed = returns.copy()
                changed[0] += edge * returns[0].std()
                test = assess_selection(changed)
                rows[edge].append([is_find(test) for is_find in FINDS.values()])
        for edge, finds in rows.items():
            shares = np.mean(finds, axis=0)
            text = ", ".join(f"{name} {s:.1%}" for name, s in zip(FINDS, shares, strict=True))
            print(f"{kind}, edge {edge:g} ({len(finds)} repeats): {text}", flush=True)


if __name__ == "__main__":
    main()
