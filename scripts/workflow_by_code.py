"""The main job step by step in Python, like Qlib's example of the same name.

python scripts/workflow_by_code.py                                    # the synthetic market
python scripts/workflow_by_code.py --provider-uri ~/qlib_data --universe nyse500
"""

from __future__ import annotations

import argparse
from typing import Any

import qtorch
from qtorch import R, init_instance_by_config
from qtorch.core.instantiate import flatten_dict
from qtorch.core.runtime import configure_logging, seed_everything
from qtorch.record import PortAnaRecord, SigAnaRecord, SignalRecord

COLUMNS = """
RESI5 WVMA5 RSQR5 KLEN RSQR10 CORR5 CORD5 CORR10 ROC60 RESI10
VSTD5 RSQR60 CORR60 WVMA60 STD5 RSQR20 CORD60 CORD10 CORR20 KLOW
""".split()  # noqa: SIM905 - a list of twenty strings is harder to read


def source_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """The configuration of the source of the bars."""
    if arguments.provider_uri is None:
        return {"class": "SyntheticSource", "module_path": "qtorch.data"}
    kwargs = {"provider_uri": arguments.provider_uri}
    return {"class": "QlibSource", "module_path": "qtorch.data", "kwargs": kwargs}


def task_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """The task in Qlib's format: plain data with `class`, `module_path` and `kwargs`."""
    is_synthetic = arguments.provider_uri is None
    segments = {
        "train": ("2015-01-01", "2018-08-07") if is_synthetic else ("2008-01-01", "2014-12-31"),
        "valid": ("2018-08-08", "2019-07-02") if is_synthetic else ("2015-01-01", "2015-12-31"),
        "test": ("2019-07-03", "2020-12-31") if is_synthetic else ("2016-01-01", "2017-11-30"),
    }
    infer = [
        {"class": "FilterCol", "kwargs": {"fields_group": "feature", "col_list": COLUMNS}},
        {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", "clip_outlier": True}},
        {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
    ]
    learn = [
        {"class": "DropnaLabel"},
        {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}},
    ]
    handler = {
        "source": source_config(arguments),
        "instruments": arguments.universe or ("stocks" if is_synthetic else "all"),
        "infer_processors": infer,
        "learn_processors": learn,
    }
    return {
        "model": {
            "class": "LightningModel",
            "module_path": "qtorch.model",
            "kwargs": {
                "network": {"class": "LSTM", "module_path": "qtorch.nn", "kwargs": {}},
                "trainer": {"max_epochs": arguments.epochs},
            },
        },
        "dataset": {
            "class": "TSDatasetH",
            "module_path": "qtorch.data",
            "kwargs": {
                "handler": {"class": "Alpha158", "module_path": "qtorch.data", "kwargs": handler},
                "segments": segments,
                "step_len": 20,
            },
        },
    }


def portfolio_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """The backtest in the format of Qlib's example."""
    benchmark = arguments.benchmark or ("MARKET" if arguments.provider_uri is None else "scored")
    return {
        "strategy": {
            "class": "TopkDropoutStrategy",
            "kwargs": {"signal": "<PRED>", "topk": 50, "n_drop": 5},
        },
        "executor": {
            "class": "SimulatorExecutor",
            "kwargs": {"time_per_step": "day", "generate_portfolio_metrics": True},
        },
        "backtest": {
            "account": 100000000,
            "benchmark": benchmark,
            "exchange_kwargs": {
                "freq": "day",
                "limit_threshold": 0.095,
                "deal_price": "close",
                "open_cost": 0.0005,
                "close_cost": 0.0015,
                "min_cost": 5,
            },
        },
    }


def main(arguments: argparse.Namespace) -> None:
    """Train the model, save it, and evaluate its signal and portfolio."""
    configure_logging()
    qtorch.init(seed=arguments.seed)
    seed_everything(arguments.seed)

    task = task_config(arguments)
    model = init_instance_by_config(task["model"])
    dataset = init_instance_by_config(task["dataset"])

    with R.start(experiment_name="workflow"):
        R.log_params(**flatten_dict(task))
        model.fit(dataset)
        R.save_objects(trained_model=model)

        recorder = R.get_recorder()
        SignalRecord(model, dataset, recorder).generate()
        SigAnaRecord(recorder, ana_long_short=True).generate()
        PortAnaRecord(recorder, portfolio_config(arguments), dataset=dataset).generate()

    for name, value in recorder.list_metrics().items():
        print(f"{name:<58} {value:.4f}")
    print(f"run {recorder.id} in {R.get_uri()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--provider-uri", help="a folder in Qlib's layout")
    parser.add_argument("--universe", help="default: all stocks of the market")
    parser.add_argument(
        "--benchmark", help="default: MARKET, or the mean of the scored instruments"
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
