"""Benchmark KunQuant's compiled Alpha158 on the same bars; needs a Python with kunquant.

    python kunquant_side.py bars.npz --threads 2

`bars.npz` holds open, high, low, close, volume, vwap as float32 `[D, N]`. Compilation is not timed.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from KunQuant.Driver import KunCompilerConfig
from KunQuant.jit import cfake
from KunQuant.Op import Builder, Input, Output
from KunQuant.predefined import Alpha158
from KunQuant.runner import KunRunner
from KunQuant.Stage import Function

CONFIG = {
    "kbar": {},
    "price": {"windows": [0]},
    "rolling": {},
}
FIELDS = ("open", "close", "high", "low", "volume", "amount")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bars")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with np.load(args.bars) as file:
        bars = {k: file[k] for k in ("open", "high", "low", "close", "volume", "vwap")}
    bars["amount"] = bars["vwap"] * bars["volume"]
    d, n = bars["close"].shape
    pad = -n % 8  # KunQuant's time-major layout needs a multiple of the vector width
    inputs = {k: np.pad(bars[k], ((0, 0), (0, pad)), mode="edge") for k in FIELDS}
    inputs = {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in inputs.items()}
    builder = Builder()
    with builder:
        data = Alpha158.AllData(**{k: Input(k) for k in FIELDS})
        prices = [("OPEN", data.open), ("HIGH", data.high), ("LOW", data.low), ("VWAP", data.vwap)]
        CONFIG["price"]["feature"] = prices
        values, names = data.build(CONFIG)
        for value, name in zip(values, names, strict=True):
            Output(value, name)
    config = KunCompilerConfig(input_layout="TS", output_layout="TS")
    graph = [("alpha158", Function(builder.ops), config)]
    library = cfake.compileit(graph, "qtorch_bench", cfake.CppCompilerConfig())
    module = library.getModule("alpha158")
    executor = (
        KunRunner.createMultiThreadExecutor(args.threads)
        if args.threads > 1
        else KunRunner.createSingleThreadExecutor()
    )
    outputs = {name: np.empty((d, n + pad), dtype=np.float32) for name in names}
    seconds = []
    for _ in range(args.repeats + 1):
        begin = time.perf_counter()
        KunRunner.runGraph(executor, module, inputs, 0, d, outputs)
        seconds.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": seconds[1:], "columns": len(names)}))


if __name__ == "__main__":
    main()
