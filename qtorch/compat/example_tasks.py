"""The tasks that Qlib's examples import from `qlib.tests.config`, in Qlib's names.

The settings are those of Qlib 0.9.7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CSI300_MARKET, CSI100_MARKET, CSI300_BENCH = "csi300", "csi100", "SH000300"
DATASET_ALPHA158_CLASS, DATASET_ALPHA360_CLASS = "Alpha158", "Alpha360"

Config = dict[str, Any]
Dates = Sequence[str]

GBDT_MODEL: Config = {
    "class": "LGBModel",
    "module_path": "qlib.contrib.model.gbdt",
    "kwargs": {
        "loss": "mse",
        "colsample_bytree": 0.8879,
        "learning_rate": 0.0421,
        "subsample": 0.8789,
        "lambda_l1": 205.6999,
        "lambda_l2": 580.9768,
        "max_depth": 8,
        "num_leaves": 210,
        "num_threads": 20,
    },
}
SA_RC: Config = {"class": "SigAnaRecord", "module_path": "qlib.workflow.record_temp"}
RECORD_CONFIG: list[Config] = [
    {
        "class": "SignalRecord",
        "module_path": "qlib.workflow.record_temp",
        "kwargs": {"dataset": "<DATASET>", "model": "<MODEL>"},
    },
    SA_RC,
]


def get_data_handler_config(
    start_time: str = "2008-01-01",
    end_time: str = "2020-08-01",
    fit_start_time: str = "<dataset.kwargs.segments.train.0>",
    fit_end_time: str = "<dataset.kwargs.segments.train.1>",
    instruments: Any = CSI300_MARKET,
) -> Config:
    """Return the arguments of a handler; its fit window is the train segment of the task."""
    return {
        "start_time": start_time,
        "end_time": end_time,
        "fit_start_time": fit_start_time,
        "fit_end_time": fit_end_time,
        "instruments": instruments,
    }


def get_dataset_config(
    dataset_class: str = DATASET_ALPHA158_CLASS,
    train: Dates = ("2008-01-01", "2014-12-31"),
    valid: Dates = ("2015-01-01", "2016-12-31"),
    test: Dates = ("2017-01-01", "2020-08-01"),
    handler_kwargs: Mapping[str, Any] | None = None,
) -> Config:
    """Return a dataset of the handler `dataset_class`."""
    handler = {
        "class": dataset_class,
        "module_path": "qlib.contrib.data.handler",
        "kwargs": get_data_handler_config(**(handler_kwargs or {})),
    }
    segments = {"train": train, "valid": valid, "test": test}
    return {
        "class": "DatasetH",
        "module_path": "qlib.data.dataset",
        "kwargs": {"handler": handler, "segments": segments},
    }


def get_gbdt_task(
    dataset_kwargs: Mapping[str, Any] | None = None,
    handler_kwargs: Mapping[str, Any] | None = None,
) -> Config:
    """Return a task of LightGBM without records."""
    dataset = get_dataset_config(**(dataset_kwargs or {}), handler_kwargs=handler_kwargs)
    return {"model": GBDT_MODEL, "dataset": dataset}


def get_record_lgb_config(
    dataset_kwargs: Mapping[str, Any] | None = None,
    handler_kwargs: Mapping[str, Any] | None = None,
) -> Config:
    """Return a task of LightGBM with its default settings and records of the scores."""
    return _add_records("LGBModel", "qlib.contrib.model.gbdt", dataset_kwargs, handler_kwargs)


def get_record_xgboost_config(
    dataset_kwargs: Mapping[str, Any] | None = None,
    handler_kwargs: Mapping[str, Any] | None = None,
) -> Config:
    """Return a task of XGBoost, which qtorch does not have: its model is an error that says so."""
    return _add_records("XGBModel", "qlib.contrib.model.xgboost", dataset_kwargs, handler_kwargs)


def _add_records(
    title: str,
    module: str,
    dataset_kwargs: Mapping[str, Any] | None,
    handler_kwargs: Mapping[str, Any] | None,
) -> Config:
    dataset = get_dataset_config(**(dataset_kwargs or {}), handler_kwargs=handler_kwargs)
    model = {"class": title, "module_path": module}
    return {"model": model, "dataset": dataset, "record": RECORD_CONFIG}


_CSI100 = {"instruments": CSI100_MARKET}
CSI300_DATASET_CONFIG = get_dataset_config()
CSI300_GBDT_TASK = get_gbdt_task()
CSI100_RECORD_LGB_TASK_CONFIG = get_record_lgb_config(handler_kwargs=_CSI100)
CSI100_RECORD_XGBOOST_TASK_CONFIG = get_record_xgboost_config(handler_kwargs=_CSI100)

ROLLING_HANDLER_CONFIG: Config = {
    "start_time": "2013-01-01",
    "end_time": "2020-09-25",
    "fit_start_time": "2013-01-01",
    "fit_end_time": "2014-12-31",
    **_CSI100,
}
ROLLING_DATASET_CONFIG: Config = {
    "train": ("2013-01-01", "2014-12-31"),
    "valid": ("2015-01-01", "2015-12-31"),
    "test": ("2016-01-01", "2020-07-10"),
}
CSI100_RECORD_LGB_TASK_CONFIG_ROLLING = get_record_lgb_config(
    ROLLING_DATASET_CONFIG, ROLLING_HANDLER_CONFIG
)
CSI100_RECORD_XGBOOST_TASK_CONFIG_ROLLING = get_record_xgboost_config(
    ROLLING_DATASET_CONFIG, ROLLING_HANDLER_CONFIG
)
ONLINE_HANDLER_CONFIG: Config = {
    "start_time": "2018-01-01",
    "end_time": "2018-10-31",
    "fit_start_time": "2018-01-01",
    "fit_end_time": "2018-03-31",
    **_CSI100,
}
ONLINE_DATASET_CONFIG: Config = {
    "train": ("2018-01-01", "2018-03-31"),
    "valid": ("2018-04-01", "2018-05-31"),
    "test": ("2018-06-01", "2018-09-10"),
}
CSI100_RECORD_LGB_TASK_CONFIG_ONLINE = get_record_lgb_config(
    ONLINE_DATASET_CONFIG, ONLINE_HANDLER_CONFIG
)
CSI100_RECORD_XGBOOST_TASK_CONFIG_ONLINE = get_record_xgboost_config(
    ONLINE_DATASET_CONFIG, ONLINE_HANDLER_CONFIG
)
