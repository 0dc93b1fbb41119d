"""Compute features on the pretended device; print its kernels, waits and copies as JSON.

Half of the instruments begin late and some days are missing, as in a market.
"""

from __future__ import annotations

import json

from pretended_cuda import PretendedCuda  # before torch

# isort: split
import pandas as pd
import torch

from qtorch.data.expression import evaluate
from qtorch.data.handler.alpha import alpha158
from qtorch.data.panel.panel import Panel

FIELDS = ("open", "high", "low", "close", "volume", "vwap")


def market(num_days: int, num_instruments: int) -> Panel:
    """Return random bars."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_days, num_instruments)
    close = (torch.randn(shape, generator=generator) * 0.02).cumsum(0).exp() * 10
    noise = [1 + 0.01 * torch.rand(shape, generator=generator) for _ in range(4)]
    fields = [close * noise[0], close * 1.03, close * 0.97, close, noise[1] * 1e6, close * noise[2]]
    values = torch.stack(fields, -1)
    values[torch.rand(shape, generator=generator) < 0.05] = torch.nan
    for k in range(0, num_instruments, 2):
        values[:k, k] = torch.nan
    calendar = pd.bdate_range("2020-01-01", periods=num_days)
    return Panel(values, calendar, [f"I{k}" for k in range(num_instruments)], FIELDS)


def main() -> None:
    torch.set_num_threads(1)
    bars = market(130, 16)
    expressions, names = alpha158()
    features = dict(zip(names, expressions, strict=True))
    with PretendedCuda() as gpu:
        on_device = bars.replace(values=bars.values.to("cuda:0"))
        with gpu.counting("features") as counts:
            evaluate(features, on_device)
        with gpu.counting("features in host memory") as host_counts:
            evaluate(features, bars, device="cuda:0")
    print(
        json.dumps(
            {
                "kernels": counts.num_kernels,
                "waits": dict(counts.waits),
                "waits in host memory": dict(host_counts.waits),
            }
        )
    )


if __name__ == "__main__":
    main()
