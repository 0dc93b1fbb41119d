"""qtorch's measurements of the benchmark, and hand-written code as their bound.

    python qtorch_side.py WORK --provider FOLDER --threads 2 --work DIR

Prints one line of JSON. Each measurement runs in a process of its own, on the data and spans of
`qlib_side.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from memory import PeakMemory
from qlib_side import COLUMNS, FIT, SEGMENTS, SPAN, SPANS

from qtorch.core.instantiate import init_instance_by_config

BATCH = 800


def source_config(args: argparse.Namespace) -> dict[str, Any]:
    return {"_target_": "qtorch.data.QlibSource", "provider_uri": args.provider}


def dataset_config(
    args: argparse.Namespace, handler: str, *, windows: bool = False, **options: Any
) -> dict[str, Any]:
    return {
        "_target_": "qtorch.data.TSDatasetH" if windows else "qtorch.data.DatasetH",
        **({"step_len": 20} if windows else {}),
        "handler": {
            "_target_": f"qtorch.data.{handler}",
            "source": source_config(args),
            "instruments": "nyse500",
            "start_time": SPANS[handler][0],
            "end_time": SPANS[handler][1],
            **options,
        },
        "segments": SEGMENTS if windows else {**SEGMENTS, "train": FIT},
    }


def lstm_dataset(args: argparse.Namespace, *, windows: bool = True) -> Any:
    options = {
        "start_time": "2013-06-01",
        "fit_start_time": "2014-01-01",
        "fit_end_time": "2014-12-31",
        "infer_processors": [
            {"class": "FilterCol", "kwargs": {"fields_group": "feature", "col_list": COLUMNS}},
            {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature"}},
            {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
        ],
        "learn_processors": [
            {"class": "DropnaLabel"},
            {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}},
        ],
    }
    return init_instance_by_config(dataset_config(args, "Alpha158", windows=windows, **options))


def measure_seconds(function: Callable[[], Any], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def get_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_features(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Compute a set of columns: with reading the bars (as Qlib does), and without (KunQuant)."""
    import numpy as np

    from qtorch.data.expression import evaluate
    from qtorch.data.handler.alpha import alpha158
    from qtorch.data.handler.alpha101 import alpha101

    expressions, names = {"alpha158": alpha158, "alpha101": alpha101}[name]()
    expressions_by_name = dict(zip(names, expressions, strict=True))

    def read_bars() -> Any:
        source = init_instance_by_config(source_config(args))
        bars = source.load(instruments="nyse500", start_time=SPAN[0], end_time=SPAN[1])
        # KunQuant compares a multiple of eight instruments.
        keep = bars.instruments[: len(bars.instruments) // 8 * 8]
        return bars if name == "alpha158" else bars.select(instruments=list(keep))

    bars = read_bars()
    evaluate(expressions_by_name, bars, num_threads=args.threads)
    compute_seconds = measure_seconds(
        lambda: evaluate(expressions_by_name, bars, num_threads=args.threads), args.repeats
    )
    total_seconds = measure_seconds(
        lambda: evaluate(expressions_by_name, read_bars(), num_threads=args.threads), args.repeats
    )
    fields = ("open", "high", "low", "close", "volume", "vwap")
    path = Path(args.work) / f"bars_{name}.npz"
    np.savez(path, **{f: bars.column(f).contiguous().numpy() for f in fields})
    return {
        "seconds": median(total_seconds),
        "alone": median(compute_seconds),
        "columns": len(names),
    }


def measure_handler(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Measure from the handler to the first training batch, and separately `prepare`."""
    from qtorch.data import Alpha158, Alpha360, DatasetH, QlibSource  # noqa: F401 - imports are not
    from qtorch.data.dataset.batches import BatchLoader  # timed, as in qlib_side.py

    start = time.perf_counter()
    peak = PeakMemory()
    dataset = init_instance_by_config(dataset_config(args, name))
    samples = dataset.samples("train", data_key="learn")
    batch = next(iter(BatchLoader(samples, batch_size=BATCH, order="random", seed=0)))
    seconds, mib = time.perf_counter() - start, peak.mib
    assert batch.x.shape[0] == BATCH
    frame_peak, start = PeakMemory(), time.perf_counter()
    rows = len(dataset.prepare(slice(*SPANS[name]), col_set=["feature", "label"], data_key="infer"))
    return {
        "seconds": seconds,
        "mib": mib,
        "rows": rows,
        "prepare_seconds": time.perf_counter() - start,
        "prepare_mib": frame_peak.mib,
    }


def measure_windows(args: argparse.Namespace) -> dict[str, Any]:
    """Compare random batches of 20 x 20 windows with bare gathers from a prepared tensor.

    `bare`: one index per window into a strided view, in which a window is contiguous. `select`:
    the same with `index_select`, the fastest that torch offers. `rows`: one index per row, the
    obvious way to write it. Only qtorch also gathers labels, weights, dates and instruments.
    """
    from qtorch.data.dataset.batches import BatchLoader

    samples = lstm_dataset(args).samples("train", data_key="learn").to(get_device())
    loader = BatchLoader(samples, batch_size=BATCH, order="random", seed=0)

    def run_epoch() -> None:
        for _ in loader:
            pass

    store, index = random_features(samples)
    steps = torch.arange(-19, 1, device=store.device)

    width = store.shape[1]
    view = store.as_strided((len(store) - 19, 20 * width), (width, 1))
    first_rows = (index - 19).clamp(min=0)

    def gather_views() -> None:
        order = torch.randperm(len(index), device=store.device)
        for rows in order.split(BATCH):
            view[first_rows[rows]].view(-1, 20, width)

    def select_views() -> None:
        order = torch.randperm(len(index), device=store.device)
        for rows in order.split(BATCH):
            view.index_select(0, first_rows[rows]).view(-1, 20, width)

    def gather_rows() -> None:
        order = torch.randperm(len(index), device=store.device)
        for rows in order.split(BATCH):
            store[(index[rows, None] + steps)]

    functions = (run_epoch, gather_views, select_views, gather_rows)
    times: list[list[float]] = [[] for _ in functions]
    for round_number in range(args.repeats + 1):  # alternate, so that all see the same load
        for function, seconds in zip(functions, times, strict=True):
            measured_seconds = measure_seconds(function, 1)
            seconds += measured_seconds if round_number else []
    names = ("seconds", "bare", "select", "rows")
    return {**dict(zip(names, map(median, times), strict=True)), "samples": len(samples)}


def random_features(samples: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Random features `[rows, F]`, instrument after instrument, and the row of each sample."""
    d, n = len(samples.calendar), len(samples.instruments)
    f = samples.num_features
    generator = torch.Generator().manual_seed(0)
    store = torch.randn(n * d, f, generator=generator).to(samples.date.device)
    return store, samples.instrument * d + samples.date


def load_tensors(samples: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All windows and targets of the samples, gathered in advance."""
    batch = samples.batch(torch.arange(len(samples), device=samples.date.device))
    return batch.x, batch.y


def run_manual_epoch(
    network: torch.nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor
) -> None:
    network.train()
    permutation = torch.randperm(len(x), device=x.device)
    for rows in permutation.split(BATCH):
        loss = (network(x[rows]).view(-1) - y[rows].view(-1)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def compare_fit(
    args: argparse.Namespace,
    network: dict[str, Any],
    epochs: int,
    *,
    windows: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Seconds of one training epoch: of the model's `fit`, and of a hand-written loop."""
    dataset = lstm_dataset(args, windows=windows)
    config = {
        "_target_": "qtorch.model.LightningModel",
        "network": network,
        "loss": "mse",
        "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 1e-3},
        "batch": {"size": BATCH, "order": "random"},
        "trainer": {"max_epochs": epochs, "enable_progress_bar": False},
        "seed": 0,
        **options,
    }
    model = init_instance_by_config(config)
    start = time.perf_counter()
    model.fit(dataset)
    fit_seconds = time.perf_counter() - start
    samples = dataset.samples("train", data_key="learn").to(get_device())
    x, y = load_tensors(samples)
    bare_network = init_instance_by_config({**network, "d_feat": samples.num_features}).to(
        get_device()
    )
    if bare_network.inputs == "flat":  # the dataset has no windows: x is [rows, F] or [rows, 1, F]
        x = x.flatten(1)
    optimizer = torch.optim.Adam(bare_network.parameters(), lr=1e-3)
    run_manual_epoch(bare_network, optimizer, x[: 20 * BATCH], y[: 20 * BATCH])
    manual_seconds = measure_seconds(
        lambda: run_manual_epoch(bare_network, optimizer, x, y), max(epochs - 1, 1)
    )
    report = model.fit_report_
    return {
        "samples": len(samples),
        "train_seconds": report["train_seconds"] / report["epochs"],
        "epoch_seconds": report["seconds"] / report["epochs"],
        "inner_steps": report["inner_steps"],
        "fit": fit_seconds,
        "hand": median(manual_seconds),
        "model": model,
        "dataset": dataset,
        "bare": bare_network,
    }


def measure_lstm(args: argparse.Namespace) -> dict[str, Any]:
    network = {"_target_": "qtorch.nn.LSTM", "hidden_size": 64, "num_layers": 2, "dropout": 0.0}
    result = compare_fit(args, network, epochs=args.repeats)
    model, dataset, bare_network = result.pop("model"), result.pop("dataset"), result.pop("bare")
    model.predict(dataset)
    predict = measure_seconds(lambda: model.predict(dataset), args.repeats)
    samples = dataset.samples("test", data_key="infer").to(get_device())
    x, _ = load_tensors(samples)
    bare_network.eval()

    def infer(size: int) -> None:
        with torch.no_grad():
            torch.cat([bare_network(x[k : k + size]) for k in range(0, len(x), size)]).cpu()

    infer(BATCH)
    by_size = [median(measure_seconds(partial(infer, n), args.repeats)) for n in (BATCH, 4096)]
    return {
        **result,
        "predict": median(predict),
        "infer": min(by_size),  # the batch size that suits the device
        "test_samples": len(samples),
    }


def measure_mlp(args: argparse.Namespace) -> dict[str, Any]:
    """A network whose step takes about a millisecond."""
    network = {"_target_": "qtorch.nn.MLP", "layers": [32], "dropout": 0.0}
    result = compare_fit(args, network, epochs=args.repeats, windows=False, inner_steps="auto")
    return {k: v for k, v in result.items() if k not in ("model", "dataset", "bare")}


def measure_trainer(args: argparse.Namespace) -> dict[str, Any]:
    """Compare ten tiny tasks of TrainerR with the same fits and predictions without it."""
    import numpy as np
    import pandas as pd

    import qtorch
    from qtorch.trainer import TrainerR

    dates = pd.bdate_range("2020-01-01", periods=60)
    names = [f"S{k:02d}" for k in range(10)]
    index = pd.MultiIndex.from_product([dates, names], names=["datetime", "instrument"])
    rng = np.random.default_rng(0)
    columns = pd.MultiIndex.from_tuples([("feature", "a"), ("feature", "b"), ("label", "y")])
    frame = pd.DataFrame(rng.standard_normal((len(index), 3)), index=index, columns=columns)
    path = Path(args.work) / "tiny.parquet"
    frame.to_parquet(path)
    qtorch.init(tracking_uri=f"sqlite:///{args.work}/qtorch.db")
    days = [str(d.date()) for d in dates]
    dataset = {
        "_target_": "qtorch.data.DatasetH",
        "handler": {
            "_target_": "qtorch.data.DataHandlerLP",
            "data_loader": {"_target_": "qtorch.data.StaticDataLoader", "config": str(path)},
        },
        "segments": {
            "train": [days[0], days[39]],
            "valid": [days[40], days[49]],
            "test": [days[50], days[59]],
        },
    }

    def task(seed: int) -> dict[str, Any]:
        return {
            "model": {"_target_": "linear_model.Ridge", "alpha": 0.1 + seed},
            "dataset": dataset,
            "record": {
                "_target_": "qtorch.record.SignalRecord",
                "model": "<MODEL>",
                "dataset": "<DATASET>",
            },
        }

    def run_bare(seed: int) -> None:
        data = init_instance_by_config(task(seed)["dataset"])
        model = init_instance_by_config(task(seed)["model"])
        model.fit(data)
        model.predict(data)

    TrainerR(experiment_name="warm")([task(100)])
    run_bare(0)
    start = time.perf_counter()
    for seed in range(10):
        run_bare(seed)
    middle = time.perf_counter()
    TrainerR(experiment_name="tiny")([task(seed) for seed in range(10)])
    end = time.perf_counter()
    return {"bare": (middle - start) / 10, "task": (end - middle) / 10}


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "features": lambda a: measure_features(a, "alpha158"),
    "features101": lambda a: measure_features(a, "alpha101"),
    "alpha158": lambda a: measure_handler(a, "Alpha158"),
    "alpha360": lambda a: measure_handler(a, "Alpha360"),
    "windows": measure_windows,
    "lstm": measure_lstm,
    "mlp": measure_mlp,
    "trainer": measure_trainer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MEASUREMENTS)
    parser.add_argument("--provider", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = MEASUREMENTS[args.name](args)
    print(json.dumps({**result, "device": str(get_device())}))


if __name__ == "__main__":
    main()
