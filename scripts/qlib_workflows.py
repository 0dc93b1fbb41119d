"""The settings of Qlib's benchmarks as workflow files, and a small market on which they run.

    python scripts/qlib_workflows.py FOLDER            write the files and the market, run them all
    python scripts/qlib_workflows.py FOLDER LSTM GRU   run those whose names begin so

The settings (networks, columns, batches, dates) are those of Qlib's examples/benchmarks, in a
compact table; the market has their names (csi300, csi500, their indices) and their dates. Each
workflow is trained for one epoch on a short span, and its scores, IC and portfolio are stored in
MLflow.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

WINDOWS, DAYS, COLUMNS = "windows of Alpha158", "days of Alpha158", "Alpha360"
MARKETS = {"csi300": "SH000300", "csi500": "SH000905"}  # the universes and their indices
LABEL = "Ref($close, -{}) / Ref($close, -1) - 1"
TRAINING = {"loss": "mse", "early_stop": 10, "n_epochs": 200, "GPU": 0}
FEATURES_20 = (
    *("RESI5", "WVMA5", "RSQR5", "KLEN", "RSQR10", "CORR5", "CORD5", "CORR10", "ROC60", "RESI10"),
    *("VSTD5", "RSQR60", "CORR60", "WVMA60", "STD5", "RSQR20", "CORD60", "CORD10", "CORR20"),
    "KLOW",
)
RECURRENT = {"hidden_size": 64, "num_layers": 2, "dropout": 0.0, "metric": "loss", **TRAINING}
BY_DAY = {"base_model": "LSTM", "lr": 1e-4, **RECURRENT}
CONCEPTS = {"stock2concept": "concepts.npy", "stock_index": "rows.csv"}
TRA = {
    "tra_config": {
        "num_states": 3,
        "rnn_arch": "LSTM",
        "hidden_size": 32,
        "num_layers": 1,
        "dropout": 0.0,
        "tau": 1.0,
        "src_info": "LR_TPE",
    },
    "model_type": "RNN",
    "lr": 1e-3,
    "n_epochs": 100,
    "early_stop": 20,
    "lamb": 1.0,
    "rho": 0.99,
    "alpha": 0.5,
    "transport_method": "router",
    "memory_mode": "sample",
    "max_steps_per_epoch": None,
    "eval_train": False,
    "eval_test": True,
    "pretrain": True,
}
TRA_NETWORK = {"hidden_size": 64, "num_layers": 2, "rnn_arch": "LSTM", "use_attn": True}
MLP = {
    "loss": "mse",
    "lr": 0.002,
    "optimizer": "adam",
    "max_steps": 8000,
    "batch_size": 8192,
    "GPU": 0,
    "weight_decay": 0.0002,
    "early_stop_rounds": 50,
    "eval_steps": 20,
}
PTNN = {
    "metric": "loss",
    "n_jobs": 20,
    "weight_decay": 1e-4,
    "lr": 1e-3,
    "batch_size": 800,
    **TRAINING,
}
TREES = {
    "loss": "mse",
    "learning_rate": 0.0421,
    "colsample_bytree": 0.8879,
    "subsample": 0.8789,
    "lambda_l1": 205.6999,
    "lambda_l2": 580.9768,
    "max_depth": 8,
    "num_leaves": 210,
    "num_threads": 20,
}

XGBOOST = {
    "eval_metric": "rmse",
    "colsample_bytree": 0.8879,
    "eta": 0.0421,
    "max_depth": 8,
    "n_estimators": 647,
    "subsample": 0.8789,
    "nthread": 20,
}
CATBOOST = {
    "loss": "RMSE",
    "learning_rate": 0.0421,
    "subsample": 0.8789,
    "max_depth": 6,
    "num_leaves": 100,
    "thread_count": 20,
    "grow_policy": "Lossguide",
    "bootstrap_type": "Poisson",
}
DOUBLE_ENSEMBLE = {
    **TREES,
    "base_model": "gbm",
    "enable_sr": True,
    "enable_fs": True,
    "alpha1": 1,
    "alpha2": 1,
    "bins_sr": 10,
    "bins_fs": 5,
    "decay": 0.5,
    "sample_ratios": [0.8, 0.7, 0.6, 0.5, 0.4],
    "verbosity": -1,
}

# name -> (module of qlib.contrib.model, class, kind of data, arguments)
SETTINGS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "LSTM-158": (
        *("pytorch_lstm_ts", "LSTM", WINDOWS),
        {"d_feat": 20, "lr": 1e-3, "batch_size": 800, "n_jobs": 20, **RECURRENT},
    ),
    "LSTM-360": (
        *("pytorch_lstm", "LSTM", COLUMNS),
        {"d_feat": 6, "lr": 1e-3, "batch_size": 800, **RECURRENT},
    ),
    "GRU-158": (
        *("pytorch_gru_ts", "GRU", WINDOWS),
        {"d_feat": 20, "lr": 2e-4, "batch_size": 800, "n_jobs": 20, **RECURRENT},
    ),
    "GRU-360": (
        *("pytorch_gru", "GRU", COLUMNS),
        {"d_feat": 6, "lr": 1e-3, "batch_size": 800, **RECURRENT},
    ),
    "ALSTM-158": (
        *("pytorch_alstm_ts", "ALSTM", WINDOWS),
        {"d_feat": 20, "lr": 1e-3, "batch_size": 800, "rnn_type": "GRU", **RECURRENT},
    ),
    "ALSTM-360": (
        *("pytorch_alstm", "ALSTM", COLUMNS),
        {"d_feat": 6, "lr": 1e-3, "batch_size": 800, "rnn_type": "GRU", **RECURRENT},
    ),
    "GATs-158": ("pytorch_gats_ts", "GATs", WINDOWS, {"d_feat": 20, **BY_DAY, "dropout": 0.7}),
    "GATs-360": ("pytorch_gats", "GATs", COLUMNS, {"d_feat": 6, **BY_DAY}),
    "HIST-360": (
        *("pytorch_hist", "HIST", COLUMNS),
        {"d_feat": 6, **BY_DAY, **CONCEPTS, "metric": "ic"},
    ),
    "IGMTF-360": ("pytorch_igmtf", "IGMTF", COLUMNS, {"d_feat": 6, **BY_DAY, "metric": "ic"}),
    "TCN-158": (
        *("pytorch_tcn_ts", "TCN", WINDOWS),
        {
            "d_feat": 20,
            "n_chans": 32,
            "kernel_size": 7,
            "num_layers": 5,
            "dropout": 0.5,
            "lr": 1e-4,
            "batch_size": 2000,
            "metric": "loss",
            "optimizer": "adam",
            "n_jobs": 20,
            **TRAINING,
        },
    ),
    "TCN-360": (
        *("pytorch_tcn", "TCN", COLUMNS),
        {
            "d_feat": 6,
            "n_chans": 128,
            "kernel_size": 3,
            "num_layers": 5,
            "dropout": 0.5,
            "lr": 1e-3,
            "batch_size": 2000,
            "metric": "loss",
            "optimizer": "adam",
            **TRAINING,
        },
    ),
    "Transformer-158": ("pytorch_transformer_ts", "TransformerModel", WINDOWS, {"seed": 0}),
    "Transformer-360": ("pytorch_transformer", "TransformerModel", COLUMNS, {"d_feat": 6}),
    "Localformer-158": ("pytorch_localformer_ts", "LocalformerModel", WINDOWS, {"seed": 0}),
    "Localformer-360": ("pytorch_localformer", "LocalformerModel", COLUMNS, {"d_feat": 6}),
    "KRNN-360": (
        *("pytorch_krnn", "KRNN", COLUMNS),
        {
            "fea_dim": 6,
            "cnn_dim": 8,
            "cnn_kernel_size": 3,
            "rnn_dim": 8,
            "rnn_dups": 2,
            "rnn_layers": 2,
            "lr": 1e-3,
            "batch_size": 2000,
            "metric": "loss",
            **TRAINING,
        },
    ),
    "Sandwich-360": (
        *("pytorch_sandwich", "Sandwich", COLUMNS),
        {
            "fea_dim": 6,
            "cnn_dim_1": 16,
            "cnn_dim_2": 16,
            "cnn_kernel_size": 3,
            "rnn_dim_1": 8,
            "rnn_dim_2": 8,
            "rnn_dups": 2,
            "rnn_layers": 2,
            "lr": 1e-3,
            "batch_size": 2000,
            "metric": "loss",
            **TRAINING,
        },
    ),
    "SFM-360": (
        *("pytorch_sfm", "SFM", COLUMNS),
        {
            "d_feat": 6,
            "hidden_size": 64,
            "output_dim": 32,
            "freq_dim": 25,
            "dropout_W": 0.5,
            "dropout_U": 0.5,
            "n_epochs": 20,
            "lr": 1e-3,
            "batch_size": 1600,
            "early_stop": 20,
            "eval_steps": 5,
            "loss": "mse",
            "optimizer": "adam",
            "GPU": 0,
        },
    ),
    "TabNet-158": ("pytorch_tabnet", "TabnetModel", DAYS, {"d_feat": 158, "pretrain": True}),
    "TabNet-360": ("pytorch_tabnet", "TabnetModel", COLUMNS, {"d_feat": 360, "pretrain": False}),
    "TCTS-360": (
        *("pytorch_tcts", "TCTS", COLUMNS),
        {
            "d_feat": 6,
            "hidden_size": 64,
            "num_layers": 2,
            "dropout": 0.3,
            "n_epochs": 200,
            "early_stop": 20,
            "batch_size": 800,
            "metric": "loss",
            "loss": "mse",
            "GPU": 0,
            "fore_optimizer": "adam",
            "weight_optimizer": "adam",
            "output_dim": 3,
            "fore_lr": 2e-3,
            "weight_lr": 2e-3,
            "steps": 3,
            "target_label": 1,
            "mode": "hard",
            "lowest_valid_performance": 0.993,
        },
    ),
    "TRA-158": (
        *("pytorch_tra", "TRAModel", WINDOWS),
        {**TRA, "model_config": {"input_size": 20, "dropout": 0.0, **TRA_NETWORK}},
    ),
    "TRA-360": (
        *("pytorch_tra", "TRAModel", COLUMNS),
        {**TRA, "model_config": {"input_size": 6, "dropout": 0.0, **TRA_NETWORK}},
    ),
    "ADARNN-360": (
        *("pytorch_adarnn", "ADARNN", COLUMNS),
        {"d_feat": 6, "lr": 1e-3, "batch_size": 800, "pre_epoch": 40, "dw": 0.5, **RECURRENT},
    ),
    "ADD-360": (
        *("pytorch_add", "ADD", COLUMNS),
        {
            "d_feat": 6,
            "dec_dropout": 0.0,
            "lr": 1e-3,
            "gamma": 0.1,
            "gamma_clip": 0.2,
            "mu": 0.2,
            "optimizer": "adam",
            "base_model": "GRU",
            "batch_size": 5000,
            **{k: v for k, v in RECURRENT.items() if k != "loss"},
        },
    ),
    "MLP-158": (
        *("pytorch_nn", "DNNModelPytorch", DAYS),
        {**MLP, "pt_model_kwargs": {"input_dim": 158}},
    ),
    "MLP-360": (
        *("pytorch_nn", "DNNModelPytorch", COLUMNS),
        {**MLP, "pt_model_kwargs": {"input_dim": 360}},
    ),
    "GeneralPTNN-GRU": (
        *("pytorch_general_nn", "GeneralPTNN", WINDOWS),
        {
            **PTNN,
            "pt_model_uri": "qlib.contrib.model.pytorch_gru_ts.GRUModel",
            "pt_model_kwargs": {"d_feat": 20, "hidden_size": 64, "num_layers": 2, "dropout": 0.0},
        },
    ),
    "GeneralPTNN-MLP": (
        *("pytorch_general_nn", "GeneralPTNN", DAYS),
        {
            **PTNN,
            "pt_model_uri": "qlib.contrib.model.pytorch_nn.Net",
            "pt_model_kwargs": {"input_dim": 158, "layers": [64]},
        },
    ),
    "LightGBM-158": ("gbdt", "LGBModel", DAYS, TREES),
    "LightGBM-360": ("gbdt", "LGBModel", COLUMNS, TREES),
    "XGBoost-158": ("xgboost", "XGBModel", DAYS, XGBOOST),
    "XGBoost-360": ("xgboost", "XGBModel", COLUMNS, XGBOOST),
    "CatBoost-158": ("catboost_model", "CatBoostModel", DAYS, CATBOOST),
    "CatBoost-360": ("catboost_model", "CatBoostModel", COLUMNS, CATBOOST),
    "DoubleEnsemble-158": (
        *("double_ensemble", "DEnsembleModel", DAYS),
        {
            **DOUBLE_ENSEMBLE,
            "num_models": 3,
            "sub_weights": [1, 1, 1],
            "epochs": 28,
            "learning_rate": 0.2,
        },
    ),
    "DoubleEnsemble-360": (
        *("double_ensemble", "DEnsembleModel", COLUMNS),
        {
            **DOUBLE_ENSEMBLE,
            "num_models": 6,
            "sub_weights": [1, 0.2, 0.2, 0.2, 0.2, 0.2],
            "epochs": 136,
            "early_stopping_rounds": 50,
        },
    ),
    "Linear-158": ("linear", "LinearModel", DAYS, {"estimator": "ols"}),
    "Linear-360": ("linear", "LinearModel", COLUMNS, {"estimator": "ols"}),
}


def workflow_names() -> list[str]:
    """Return the names of all workflows: a setting and a market."""
    return [f"{name}-{market}" for name in SETTINGS for market in MARKETS]


def build_workflow(name: str, provider_uri: str) -> dict[str, Any]:
    """Return a workflow as the content of its file."""
    setting, _, market = name.rpartition("-")
    module, title, data, arguments = SETTINGS[setting]
    num_labels = 3 if title == "TCTS" else 1
    handler: dict[str, Any] = {
        "start_time": "2008-01-01",
        "end_time": "2020-08-01",
        "fit_start_time": "2008-01-01",
        "fit_end_time": "2014-12-31",
        "instruments": market,
        "label": [LABEL.format(2 + k) for k in range(num_labels)],
        **processors(data),
    }
    model = {
        "class": title,
        "module_path": f"qlib.contrib.model.{module}",
        "kwargs": arguments,
    }
    return {
        "qlib_init": {"provider_uri": provider_uri, "region": "cn"},
        "experiment_name": "benchmarks",
        "task": {
            "model": model,
            "dataset": build_dataset(title, data, handler),
            "record": build_records(MARKETS[market]),
        },
    }


def processors(data: str) -> dict[str, Any]:
    """Return the processors of the benchmarks for a kind of data."""
    infer: list[dict[str, Any]] = [
        {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", "clip_outlier": True}},
        {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
    ]
    if data == WINDOWS:
        columns = {"fields_group": "feature", "col_list": list(FEATURES_20)}
        infer.insert(0, {"class": "FilterCol", "kwargs": columns})
    learn = [
        {"class": "DropnaLabel"},
        {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}},
    ]
    return {"infer_processors": infer, "learn_processors": learn}


def build_dataset(title: str, data: str, handler: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dataset of the benchmarks for a kind of data."""
    kwargs: dict[str, Any] = {
        "handler": {
            "class": "Alpha360" if data == COLUMNS else "Alpha158",
            "module_path": "qlib.contrib.data.handler",
            "kwargs": dict(handler),
        },
        "segments": {
            "train": ["2008-01-01", "2014-12-31"],
            "valid": ["2015-01-01", "2016-12-31"],
            "test": ["2017-01-01", "2020-08-01"],
        },
    }
    if title == "TRAModel":
        kwargs |= {"seq_len": 60, "horizon": 2, "num_states": 3, "memory_mode": "sample"}
        kwargs |= {"batch_size": 1024, "drop_last": True}
        if data == COLUMNS:
            kwargs["input_size"] = 6
        module, name = "qlib.contrib.data.dataset", "MTSDatasetH"
    else:
        module, name = "qlib.data.dataset", "TSDatasetH" if data == WINDOWS else "DatasetH"
        if data == WINDOWS:
            kwargs["step_len"] = 20
    return {"class": name, "module_path": module, "kwargs": kwargs}


def build_records(benchmark: str) -> list[dict[str, Any]]:
    """Return the records of the benchmarks."""
    strategy = {
        "class": "TopkDropoutStrategy",
        "module_path": "qlib.contrib.strategy",
        "kwargs": {"signal": "<PRED>", "topk": 50, "n_drop": 5},
    }
    backtest = {
        "start_time": "2017-01-01",
        "end_time": "2020-08-01",
        "account": 100000000,
        "benchmark": benchmark,
        "exchange_kwargs": {
            "limit_threshold": 0.095,
            "deal_price": "close",
            "open_cost": 0.0005,
            "close_cost": 0.0015,
            "min_cost": 5,
        },
    }
    contents = {
        "SignalRecord": {"model": "<MODEL>", "dataset": "<DATASET>"},
        "SigAnaRecord": {"ana_long_short": False, "ann_scaler": 252},
        "PortAnaRecord": {"config": {"strategy": strategy, "backtest": backtest}},
    }
    module = "qlib.workflow.record_temp"
    return [{"class": k, "module_path": module, "kwargs": v} for k, v in contents.items()]


def write_market(folder: Path, *, num_instruments: int = 24) -> Path:
    """Write a synthetic market in Qlib's layout with the names and dates of the benchmarks.

    Also the concepts of HIST (`concepts.npy`, `rows.csv`) beside it.
    """
    from qtorch.data import SyntheticSource, write_qlib

    source = SyntheticSource(
        num_instruments, "2008-01-01", "2020-09-25", num_sectors=3, signal=0.2, seed=0
    )
    frame = source.load().to_frame()
    names = {
        name: "SH000300" if name == "MARKET" else f"SH6{k:05d}"
        for k, name in enumerate(frame.index.levels[1])
    }
    frame.index = frame.index.set_levels([names[n] for n in frame.index.levels[1]], level=1)
    index = frame.xs("SH000300", level=1, drop_level=False)
    frame = pd.concat([frame, index.rename({"SH000300": "SH000905"}, level=1)]).sort_index()
    members = [name for name in names.values() if name != "SH000300"]
    whole, parted = (
        [("2008-01-01", "2020-09-25")],
        [("2008-01-01", "2013-06-28"), ("2014-01-02", "2020-09-25")],
    )
    universes = {
        "csi300": {name: whole if k % 3 else parted for k, name in enumerate(members)},
        "csi500": members,
    }
    write_qlib(frame, folder / "cn_data", universes=universes, overwrite=True)
    np.save(folder / "concepts.npy", np.eye(len(members) + 1)[:, :4])
    rows = "".join(f"{name},{k}\n" for k, name in enumerate(members))
    (folder / "rows.csv").write_text(f"instrument,row\n{rows}")
    return folder / "cn_data"


def short_overrides(name: str) -> list[str]:
    """Return the overrides that train a workflow for one epoch on a short span."""
    title = SETTINGS[name.rpartition("-")[0]][1]
    epochs = {
        "DNNModelPytorch": ["max_steps=4", "eval_steps=2", "batch_size=512"],
        **{name: ["num_boost_round=5"] for name in ("LGBModel", "XGBModel", "CatBoostModel")},
        "DEnsembleModel": ["epochs=5"],
        "LinearModel": [],
        "TabnetModel": ["n_epochs=1", "pretrain_n_epochs=1", "batch_size=512"],
        "TRAModel": ["n_epochs=1", "early_stop=1"],
    }.get(title, ["n_epochs=1"])
    segments = "task.dataset.kwargs.segments."
    return [
        *(f"++task.model.kwargs.{word}" for word in epochs),
        f"{segments}train=[2008-01-01,2008-12-31]",
        f"{segments}valid=[2009-01-01,2009-06-30]",
        f"{segments}test=[2009-07-01,2009-12-31]",
        "task.dataset.kwargs.handler.kwargs.end_time=2010-01-29",
        "task.dataset.kwargs.handler.kwargs.fit_end_time=2008-12-31",
        "task.record.2.kwargs.config.backtest.start_time=2009-07-01",
        "task.record.2.kwargs.config.backtest.end_time=2009-12-31",
        "task.record.2.kwargs.config.strategy.kwargs.topk=6",
        "task.record.2.kwargs.config.strategy.kwargs.n_drop=2",
    ]


def write_workflows(folder: Path, provider_uri: Path) -> Iterator[Path]:
    """Write all workflow files and yield their paths."""
    for name in workflow_names():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(build_workflow(name, str(provider_uri)), sort_keys=False))
        yield path


def main() -> int:
    """Write the files and run them by `qtorch run`; return 1 if one failed."""
    from qtorch.cli.main import main as run_qtorch

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=[""], help="only names that begin so")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    paths = list(write_workflows(options.folder, write_market(options.folder)))
    failed = []
    for path in (p for p in paths if p.stem.startswith(tuple(options.names))):
        start = time.perf_counter()
        words = [*short_overrides(path.stem), "sweep.isolate=false", "log_level=WARNING"]
        code = run_qtorch(["run", str(path), *words])
        failed += [path.stem] if code else []
        result = "FAILED" if code else "ok"
        print(f"{path.stem:<24} {result:<6} {time.perf_counter() - start:.1f} s", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "all are ok")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
