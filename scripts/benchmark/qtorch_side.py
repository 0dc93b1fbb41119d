"""qtorch's side of the benchmark, and the hand-written code that bounds it.

    python qtorch_side.py WORK --provider FOLDER --threads 2 --work DIR

prints one line of JSON. Every work runs in a process of its own, on the data and spans of
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
from memory import Peak
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


def timed(function: Callable[[], Any], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def features(args: argparse.Namespace) -> dict[str, Any]:
    """The 158 columns: with the reading of bars (Qlib's work), and alone (KunQuant's)."""
    import numpy as np

    from qtorch.data.expression import evaluate
    from qtorch.data.features import alpha158

    expressions, names = alpha158()
    named = dict(zip(names, expressions, strict=True))

    def read() -> Any:
        source = init_instance_by_config(source_config(args))
        return source.load(instruments="nyse500", start_time=SPAN[0], end_time=SPAN[1])

    bars = read()
    evaluate(named, bars, num_threads=args.threads)
    alone = timed(lambda: evaluate(named, bars, num_threads=args.threads), args.repeats)
    whole = timed(lambda: evaluate(named, read(), num_threads=args.threads), args.repeats)
    wanted = ("open", "high", "low", "close", "volume", "vwap")
    path = Path(args.work) / "bars.npz"
    np.savez(path, **{f: bars.column(f).contiguous().numpy() for f in wanted})
    return {"seconds": median(whole), "alone": median(alone), "columns": len(names)}


def handler(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """From nothing to the first training batch; the full frame of `prepare` apart."""
    from qtorch.data import Alpha158, Alpha360, DatasetH, QlibSource  # noqa: F401 - Qlib's imports
    from qtorch.data.batches import BatchLoader  # are not timed either

    begin = time.perf_counter()
    peak = Peak()
    dataset = init_instance_by_config(dataset_config(args, name))
    samples = dataset.samples("train", data_key="learn")
    batch = next(iter(BatchLoader(samples, batch_size=BATCH, order="random", seed=0)))
    seconds, mib = time.perf_counter() - begin, peak.mib
    assert batch.x.shape[0] == BATCH
    frame_peak, begin = Peak(), time.perf_counter()
    rows = len(dataset.prepare(slice(*SPANS[name]), col_set=["feature", "label"], data_key="infer"))
    return {
        "seconds": seconds,
        "mib": mib,
        "rows": rows,
        "prepare_seconds": time.perf_counter() - begin,
        "prepare_mib": frame_peak.mib,
    }


def windows(args: argparse.Namespace) -> dict[str, Any]:
    """Random window batches of 20 x 20 beside bare gathers from a ready tensor.

    `bare`: one index a window into a strided view, where a window is one run of memory. `select`:
    the same by `index_select`, the fastest that torch offers. `rows`: one index a row, as one
    writes it first. Ours gathers labels, weights, dates and instruments too.
    """
    from qtorch.data.batches import BatchLoader

    samples = lstm_dataset(args).samples("train", data_key="learn").to(device())
    loader = BatchLoader(samples, batch_size=BATCH, order="random", seed=0)

    def epoch() -> None:
        for _ in loader:
            pass

    store, index = dense_store(samples)
    steps = torch.arange(-19, 1, device=store.device)

    width = store.shape[1]
    view = store.as_strided((len(store) - 19, 20 * width), (width, 1))
    begin = (index - 19).clamp(min=0)

    def bare() -> None:
        order = torch.randperm(len(index), device=store.device)
        for rows in order.split(BATCH):
            view[begin[rows]].view(-1, 20, width)

    def select() -> None:
        order = torch.randperm(len(index), device=store.device)
        for rows in order.split(BATCH):
            view.index_select(0, begin[rows]).view(-1, 20, width)

    def by_rows() -> None:
        order = torch.randperm(len(index), device=store.device)
        for rows in order.split(BATCH):
            store[(index[rows, None] + steps)]

    works = (epoch, bare, select, by_rows)
    times: list[list[float]] = [[] for _ in works]
    for turn in range(args.repeats + 1):  # in turns, so that all see the same machine
        for work, found in zip(works, times, strict=True):
            took = timed(work, 1)
            found += took if turn else []
    names = ("seconds", "bare", "select", "rows")
    return {**dict(zip(names, map(median, times), strict=True)), "samples": len(samples)}


def dense_store(samples: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ready-made features `[rows, F]`, instrument after instrument, and each sample's row."""
    d, n = len(samples.calendar), len(samples.instruments)
    f = samples.num_features
    generator = torch.Generator().manual_seed(0)
    store = torch.randn(n * d, f, generator=generator).to(samples.date.device)
    return store, samples.instrument * d + samples.date


def ready(samples: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All windows and targets of the samples as ready tensors."""
    batch = samples.batch(torch.arange(len(samples), device=samples.date.device))
    return batch.x, batch.y


def hand_epoch(network: torch.nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    network.train()
    order = torch.randperm(len(x), device=x.device)
    for rows in order.split(BATCH):
        loss = (network(x[rows]).view(-1) - y[rows].view(-1)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def fit_and_hand(
    args: argparse.Namespace,
    network: dict[str, Any],
    epochs: int,
    *,
    windows: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Seconds of one epoch of training: the model's own `fit`, and a hand-written loop."""
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
    begin = time.perf_counter()
    model.fit(dataset)
    total = time.perf_counter() - begin
    samples = dataset.samples("train", data_key="learn").to(device())
    x, y = ready(samples)
    bare = init_instance_by_config({**network, "d_feat": samples.num_features}).to(device())
    if bare.inputs == "flat":  # the dataset has no windows: x is [rows, F] or [rows, 1, F]
        x = x.flatten(1)
    optimizer = torch.optim.Adam(bare.parameters(), lr=1e-3)
    hand_epoch(bare, optimizer, x[: 20 * BATCH], y[: 20 * BATCH])
    hand = timed(lambda: hand_epoch(bare, optimizer, x, y), max(epochs - 1, 1))
    report = model.fit_report_
    return {
        "samples": len(samples),
        "train_seconds": report["train_seconds"] / report["epochs"],
        "epoch_seconds": report["seconds"] / report["epochs"],
        "inner_steps": report["inner_steps"],
        "fit": total,
        "hand": median(hand),
        "model": model,
        "dataset": dataset,
        "bare": bare,
    }


def lstm(args: argparse.Namespace) -> dict[str, Any]:
    network = {"_target_": "qtorch.nn.LSTM", "hidden_size": 64, "num_layers": 2, "dropout": 0.0}
    out = fit_and_hand(args, network, epochs=args.repeats)
    model, dataset, bare = out.pop("model"), out.pop("dataset"), out.pop("bare")
    model.predict(dataset)
    predict = timed(lambda: model.predict(dataset), args.repeats)
    samples = dataset.samples("test", data_key="infer").to(device())
    x, _ = ready(samples)
    bare.eval()

    def infer(size: int) -> None:
        with torch.no_grad():
            torch.cat([bare(x[k : k + size]) for k in range(0, len(x), size)]).cpu()

    infer(BATCH)
    by_size = [median(timed(partial(infer, n), args.repeats)) for n in (BATCH, 4096)]
    return {
        **out,
        "predict": median(predict),
        "infer": min(by_size),  # the size that suits the device
        "test_samples": len(samples),
    }


def mlp(args: argparse.Namespace) -> dict[str, Any]:
    """A network whose step takes about a millisecond."""
    network = {"_target_": "qtorch.nn.MLP", "layers": [32], "dropout": 0.0}
    out = fit_and_hand(args, network, epochs=args.repeats, windows=False, inner_steps="auto")
    return {k: v for k, v in out.items() if k not in ("model", "dataset", "bare")}


def trainer(args: argparse.Namespace) -> dict[str, Any]:
    """Ten tiny tasks through TrainerR, beside the same fits and predictions bare."""
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

    def bare(seed: int) -> None:
        data = init_instance_by_config(task(seed)["dataset"])
        model = init_instance_by_config(task(seed)["model"])
        model.fit(data)
        model.predict(data)

    TrainerR(experiment_name="warm")([task(100)])
    bare(0)
    begin = time.perf_counter()
    for seed in range(10):
        bare(seed)
    middle = time.perf_counter()
    TrainerR(experiment_name="tiny")([task(seed) for seed in range(10)])
    end = time.perf_counter()
    return {"bare": (middle - begin) / 10, "task": (end - middle) / 10}


WORKS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "features": features,
    "alpha158": lambda a: handler(a, "Alpha158"),
    "alpha360": lambda a: handler(a, "Alpha360"),
    "windows": windows,
    "lstm": lstm,
    "mlp": mlp,
    "trainer": trainer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=WORKS)
    parser.add_argument("--provider", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = WORKS[args.name](args)
    print(json.dumps({**result, "device": str(device())}))


if __name__ == "__main__":
    main()
