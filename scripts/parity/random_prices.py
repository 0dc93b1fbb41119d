"""Random prices of a market, for the parity of features that read all fields of a bar."""

from __future__ import annotations

import numpy as np


def random_prices(rng: np.random.Generator, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return open, high, low, close, vwap and volume `[D, N]` of consistent random walks."""
    close = 20 * np.exp(np.cumsum(rng.normal(0, 0.02, shape), 0))
    first = close * np.exp(rng.normal(0, 0.01, shape))
    high = np.maximum(first, close) * (1 + rng.random(shape) * 0.02)
    low = np.minimum(first, close) * (1 - rng.random(shape) * 0.02)
    vwap = (high + low + close) / 3 * (1 + rng.normal(0, 0.002, shape))
    volume = np.exp(rng.normal(12, 0.5, shape))
    prices = {"open": first, "high": high, "low": low, "close": close}
    return prices | {"vwap": vwap, "volume": volume}
