"""Real Qlib's measurements of the benchmark; needs a Python with pyqlib.

    python qlib_side.py WORK --provider FOLDER --threads 2 [--work DIR]

Prints one line of JSON. Each measurement runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from memory import PeakMemory

SPAN = ("2008-01-02", "2017-12-08")
# Two years only: Qlib's processors need over twenty minutes for all years of Alpha360.
SPANS = {"Alpha158": SPAN, "Alpha360": ("2014-01-01", "2015-12-31")}
SEGMENTS = {
    "train": ("2014-01-01", "2014-12-31"),
    "valid": ("2015-01-01", "2015-12-31"),
    "test": ("2016-01-01", "2017-11-30"),
}
FIT = ("2008-01-01", "2014-12-31")
COLUMNS = [
    "RESI5", "WVMA5", "RSQR5", "KLEN", "RSQR10", "CORR5", "CORD5", "CORR10", "ROC60", "RESI10",
    "VSTD5", "RSQR60", "CORR60", "WVMA60", "STD5", "RSQR20", "CORD60", "CORD10", "CORR20", "KLOW",
]  # fmt: skip


def init(provider: str, threads: int, folder: str) -> None:
    import qlib

    uri = f"sqlite:///{folder}/qlib.db"
    qlib.init(
        provider_uri=provider,
        region="us",
        kernels=threads,
        logging_level=30,
        exp_manager={
            "class": "MLflowExpManager",
            "module_path": "qlib.workflow.expm",
            "kwargs": {"uri": uri, "default_exp_name": "bench"},
        },
    )


def handler_config(name: str, span: tuple[str, str] = SPAN) -> dict:
    return {
        "class": name,
        "module_path": "qlib.contrib.data.handler",
        "kwargs": {
            "instruments": "nyse500",
            "start_time": span[0],
            "end_time": span[1],
            "fit_start_time": FIT[0],
            "fit_end_time": FIT[1],
        },
    }


def lstm_handler() -> dict:
    config = handler_config("Alpha158", ("2013-06-01", SPAN[1]))
    config["kwargs"]["fit_start_time"] = "2013-06-01"
    config["kwargs"]["infer_processors"] = [
        {"class": "FilterCol", "kwargs": {"fields_group": "feature", "col_list": COLUMNS}},
        {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", "clip_outlier": True}},
        {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
    ]
    config["kwargs"]["learn_processors"] = [
        {"class": "DropnaLabel"},
        {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}},
    ]
    return config


def measure_features(args: argparse.Namespace) -> dict:
    from qlib.contrib.data.loader import Alpha158DL
    from qlib.data import D

    expressions, _ = Alpha158DL.get_feature_config(
        {
            "kbar": {},
            "price": {"windows": [0], "feature": ["OPEN", "HIGH", "LOW", "VWAP"]},
            "rolling": {},
        }
    )
    start = time.perf_counter()
    frame = D.features(D.instruments("nyse500"), expressions, SPAN[0], SPAN[1])
    return {"seconds": time.perf_counter() - start, "rows": len(frame), "columns": len(expressions)}


def measure_handler(args: argparse.Namespace, name: str) -> dict:
    from qlib.utils import init_instance_by_config

    start = time.perf_counter()
    peak = PeakMemory()
    data_handler = init_instance_by_config(handler_config(name, SPANS[name]))
    return {
        "seconds": time.perf_counter() - start,
        "mib": peak.mib,
        "rows": len(data_handler._infer),
    }


def _window_dataset():
    from qlib.data.dataset import TSDatasetH

    return TSDatasetH(handler=lstm_handler(), segments=SEGMENTS, step_len=20)


def measure_windows(args: argparse.Namespace) -> dict:
    from torch.utils.data import DataLoader

    sampler = _window_dataset().prepare("train", col_set=["feature", "label"], data_key="learn")
    sampler.config(fillna_type="ffill+bfill")
    loader = DataLoader(sampler, batch_size=800, shuffle=True, num_workers=0, drop_last=True)
    num_seen, start = 0, time.perf_counter()
    for batch in loader:
        num_seen += len(batch)
        if num_seen >= 60_000:
            break
    return {"seconds": time.perf_counter() - start, "samples": num_seen}


def measure_lstm(args: argparse.Namespace) -> dict:
    import pandas as pd
    from qlib.contrib.model.pytorch_lstm_ts import LSTM

    dataset = _window_dataset()
    num_train = len(dataset.prepare("train", data_key="learn"))
    model = LSTM(d_feat=20, hidden_size=64, num_layers=2, dropout=0.0, n_epochs=1, lr=1e-3,
                 batch_size=800, early_stop=10, n_jobs=0, GPU=-1, seed=0)  # fmt: skip
    pass_seconds = {"train_epoch": 0.0, "test_epoch": 0.0}

    def add_timing(name: str):
        method = getattr(model, name)

        def wrapper(*args, **kwargs):
            begin = time.perf_counter()
            result = method(*args, **kwargs)
            pass_seconds[name] += time.perf_counter() - begin
            return result

        return wrapper

    for name in pass_seconds:
        setattr(model, name, add_timing(name))
    model.fit(dataset, evals_result={}, save_path=os.path.join(args.work, "lstm.pt"))
    begin = time.perf_counter()
    scores = model.predict(dataset)
    end = time.perf_counter()
    assert isinstance(scores, pd.Series)
    return {
        "epoch": sum(
            pass_seconds.values()
        ),  # the train pass, and the metric on the train and valid segments
        "train": pass_seconds["train_epoch"],
        "predict": end - begin,
        "train_samples": num_train,
        "test_samples": len(scores),
    }


def measure_trainer(args: argparse.Namespace) -> dict:
    """Compare ten tiny tasks of TrainerR with the same fits and predictions without it."""
    import numpy as np
    import pandas as pd
    from qlib.data.dataset import DatasetH
    from qlib.model.trainer import TrainerR
    from qlib.utils import init_instance_by_config

    dates = pd.bdate_range("2020-01-01", periods=60)
    names = [f"S{k:02d}" for k in range(10)]
    index = pd.MultiIndex.from_product([dates, names], names=["datetime", "instrument"])
    rng = np.random.default_rng(0)
    columns = pd.MultiIndex.from_tuples([("feature", "a"), ("feature", "b"), ("label", "y")])
    frame = pd.DataFrame(rng.standard_normal((len(index), 3)), index=index, columns=columns)
    path = os.path.join(args.work, "tiny.pkl")
    frame.to_pickle(path)
    dataset = {
        "class": "DatasetH",
        "module_path": "qlib.data.dataset",
        "kwargs": {
            "handler": {
                "class": "DataHandlerLP",
                "module_path": "qlib.data.dataset.handler",
                "kwargs": {
                    "data_loader": {
                        "class": "StaticDataLoader",
                        "module_path": "qlib.data.dataset.loader",
                        "kwargs": {"config": path},
                    }
                },
            },
            "segments": {
                "train": (dates[0], dates[39]),
                "valid": (dates[40], dates[49]),
                "test": (dates[50], dates[59]),
            },
        },
    }

    def task(seed: int) -> dict:
        return {
            "model": {
                "class": "LinearModel",
                "module_path": "qlib.contrib.model.linear",
                "kwargs": {"estimator": "ridge", "alpha": 0.1 + seed},
            },
            "dataset": dataset,
            "record": {
                "class": "SignalRecord",
                "module_path": "qlib.workflow.record_temp",
                "kwargs": {"model": "<MODEL>", "dataset": "<DATASET>"},
            },
        }

    def run_bare(seed: int) -> None:
        t = task(seed)
        data: DatasetH = init_instance_by_config(t["dataset"])
        model = init_instance_by_config(t["model"])
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


BACKTEST = {
    "span": ("2016-01-01", "2017-11-30"),
    "scores": ("2015-12-25", "2017-11-30"),
    "account": 1e8,
    "benchmark": "NYSE500EW",
    "limit_threshold": 0.095,
    "open_cost": 0.0005,
    "close_cost": 0.0015,
    "min_cost": 5.0,
}


def random_scores(calendar, instruments):
    """Slowly drifting random scores by (datetime, instrument)."""
    import numpy as np
    import pandas as pd

    random = np.random.default_rng(0)
    values = random.standard_normal((len(calendar), len(instruments)))
    index = pd.MultiIndex.from_product([calendar, instruments], names=["datetime", "instrument"])
    return pd.Series((np.cumsum(values, axis=0) / 4 + values).ravel(), index=index, name="score")


def measure_backtest(args: argparse.Namespace) -> dict:
    """One pass of TopkDropoutStrategy, topk 50, n_drop 5, over 23 months of 500 instruments."""
    from qlib.backtest import backtest
    from qlib.contrib.strategy import TopkDropoutStrategy
    from qlib.data import D

    calendar = D.calendar(*BACKTEST["scores"])
    names = sorted(D.list_instruments(D.instruments("nyse500"), as_list=True))
    scores = random_scores(calendar, names)
    costs = ("limit_threshold", "open_cost", "close_cost", "min_cost")
    peak = PeakMemory()
    start = time.perf_counter()
    backtest(
        *BACKTEST["span"],
        strategy=TopkDropoutStrategy(signal=scores, topk=50, n_drop=5),
        executor={
            "class": "SimulatorExecutor",
            "module_path": "qlib.backtest.executor",
            "kwargs": {"time_per_step": "day", "generate_portfolio_metrics": True},
        },
        account=BACKTEST["account"],
        benchmark=BACKTEST["benchmark"],
        exchange_kwargs={"deal_price": "close", **{k: BACKTEST[k] for k in costs}},
    )
    return {"seconds": time.perf_counter() - start, "mib": peak.mib}


MEASUREMENTS = {
    "features": measure_features,
    "alpha158": lambda a: measure_handler(a, "Alpha158"),
    "alpha360": lambda a: measure_handler(a, "Alpha360"),
    "windows": measure_windows,
    "lstm": measure_lstm,
    "trainer": measure_trainer,
    "backtest": measure_backtest,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MEASUREMENTS)
    parser.add_argument("--provider", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", required=True)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    init(args.provider, args.threads, args.work)
    print(json.dumps(MEASUREMENTS[args.name](args)))


if __name__ == "__main__":
    main()
