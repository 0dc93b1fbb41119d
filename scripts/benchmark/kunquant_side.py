"""Benchmark KunQuant's compiled alphas on the same bars; needs a Python with kunquant.

    python kunquant_side.py bars.npz --alphas alpha101 --threads 2

`bars.npz` holds open, high, low, close, volume, vwap as float32 `[D, N]`. Compilation is not timed.
--save writes the values of all columns to another file; with --ranked also the values that the
ranks and argmaxes inside each column of Alpha101 compare, as `alpha001_ranked1` and so on.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from KunQuant.Driver import KunCompilerConfig
from KunQuant.jit import cfake
from KunQuant.Op import Builder, Input, OpBase, Output, Rank
from KunQuant.ops import TsArgMax, TsArgMin, TsRank
from KunQuant.predefined import Alpha101, Alpha158
from KunQuant.runner import KunRunner
from KunQuant.Stage import Function

CONFIG = {
    "kbar": {},
    "price": {"windows": [0]},
    "rolling": {},
}
COMPARING = (Rank, TsRank, TsArgMax, TsArgMin)
FIELDS = ("open", "close", "high", "low", "volume", "amount")


def build_alpha158() -> list[str]:
    data = Alpha158.AllData(**{k: Input(k) for k in FIELDS})
    prices = [("OPEN", data.open), ("HIGH", data.high), ("LOW", data.low), ("VWAP", data.vwap)]
    CONFIG["price"]["feature"] = prices
    values, names = data.build(CONFIG)
    for value, name in zip(values, names, strict=True):
        Output(value, name)
    return list(names)


def build_alpha101(*, ranked: bool = False) -> list[str]:
    data = Alpha101.AllData(**{k: Input(k) for k in FIELDS})
    names = []
    for alpha in Alpha101.all_alpha:
        value = alpha(data)
        outputs = {alpha.__name__: value}
        if ranked:
            values = find_ranked_values(value)
            outputs |= {f"{alpha.__name__}_ranked{k}": v for k, v in enumerate(values, start=1)}
        for name, output in outputs.items():
            Output(output, name)
        names += list(outputs)
    return names


def find_ranked_values(root: OpBase) -> list[OpBase]:
    """Return the computed arguments of the operators below `root` that compare values."""
    arguments, pending = [], [root]
    while pending:
        operator = pending.pop()
        pending.extend(reversed(operator.inputs))
        if isinstance(operator, COMPARING) and not isinstance(operator.inputs[0], Input):
            arguments.append(operator.inputs[0])
    return list(dict.fromkeys(arguments))


ALPHAS = {"alpha158": build_alpha158, "alpha101": build_alpha101}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bars")
    parser.add_argument("--alphas", choices=ALPHAS, default="alpha158")
    parser.add_argument("--save")
    parser.add_argument("--ranked", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with np.load(args.bars) as file:
        bars = {k: file[k] for k in ("open", "high", "low", "close", "volume", "vwap")}
    bars["amount"] = bars["vwap"] * bars["volume"]
    d, n = bars["close"].shape
    pad = -n % 8  # KunQuant's time-major layout needs a multiple of the vector width
    if pad and args.alphas == "alpha101":
        raise SystemExit(f"alpha101 compares instruments: {n} of them must be a multiple of 8")
    inputs = {k: np.pad(bars[k], ((0, 0), (0, pad)), mode="edge") for k in FIELDS}
    inputs = {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in inputs.items()}
    builder = Builder()
    with builder:
        names = build_alpha101(ranked=True) if args.ranked else ALPHAS[args.alphas]()
    config = KunCompilerConfig(input_layout="TS", output_layout="TS")
    graph = [(args.alphas, Function(builder.ops), config)]
    library = cfake.compileit(graph, "qtorch_bench", cfake.CppCompilerConfig())
    module = library.getModule(args.alphas)
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
    if args.save:
        np.savez(args.save, **{name: value[:, :n] for name, value in outputs.items()})
    print(json.dumps({"seconds": seconds[1:], "columns": len(names)}))


if __name__ == "__main__":
    main()
