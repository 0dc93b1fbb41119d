"""Qlib's own network on the zoo's data; runs under a Python that has pyqlib.

    python zoo_qlib.py JOB.json

JOB says network, arguments, data and seed (see zoo_cells.py). Writes the scores beside it as CSV
and prints one line of JSON: samples a second of training and prediction, parameters.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

CLASSES = {
    "lstm": ("pytorch_lstm_ts", "LSTM", "LSTM_model"),
    "gru": ("pytorch_gru_ts", "GRU", "GRU_model"),
    "alstm": ("pytorch_alstm_ts", "ALSTM", "ALSTM_model"),
    "tcn": ("pytorch_tcn_ts", "TCN", "TCN_model"),
    "transformer": ("pytorch_transformer_ts", "TransformerModel", "model"),
    "gats": ("pytorch_gats_ts", "GATs", "GAT_model"),
}
# What their constructors call otherwise, or do not take.
FIXED = ("_target_", "dim_feedforward")


def init(job: dict) -> None:
    import qlib

    Path(job["work"]).mkdir(parents=True, exist_ok=True)
    qlib.init(
        provider_uri=job["provider"],
        region="us",
        kernels=job["threads"],
        logging_level=30,
        exp_manager={
            "class": "MLflowExpManager",
            "module_path": "qlib.workflow.expm",
            "kwargs": {"uri": f"sqlite:///{job['work']}/qlib.db", "default_exp_name": "zoo"},
        },
    )


def dataset_of(job: dict):
    """Qlib's dataset of windows: Alpha158's columns by name, as its recurrent benchmarks have."""
    from qlib.data.dataset import TSDatasetH

    fields = {"fields_group": "feature"}
    handler = {
        "class": "Alpha158",
        "module_path": "qlib.contrib.data.handler",
        "kwargs": {
            "instruments": job["instruments"],
            "start_time": job["start_time"],
            "end_time": job["end_time"],
            "fit_start_time": job["segments"]["train"][0],
            "fit_end_time": job["segments"]["train"][1],
            "infer_processors": [
                {"class": "FilterCol", "kwargs": {**fields, "col_list": job["columns"]}},
                {"class": "RobustZScoreNorm", "kwargs": {**fields, "clip_outlier": True}},
                {"class": "Fillna", "kwargs": fields},
            ],
            "learn_processors": [
                {"class": "DropnaLabel"},
                {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}},
            ],
        },
    }
    segments = {k: tuple(v) for k, v in job["segments"].items()}
    return TSDatasetH(handler=handler, segments=segments, step_len=job["step_len"])


def model_of(job: dict):
    """Their class with our hyperparameters under their names."""
    import importlib

    module, name, _ = CLASSES[job["network"]]
    cls = getattr(importlib.import_module(f"qlib.contrib.model.{module}"), name)
    arguments = {k: v for k, v in job["arguments"].items() if k not in FIXED}
    batch = {} if job["network"] == "gats" else {"batch_size": job["batch_size"]}
    extra = {"reg": job["weight_decay"]} if job["network"] == "transformer" else {}
    return cls(
        d_feat=len(job["columns"]),
        n_epochs=job["epochs"],
        lr=job["lr"],
        n_jobs=0,
        GPU=-1,
        early_stop=job["patience"],
        seed=job["seed"],
        **batch,
        **extra,
        **arguments,
    )


def timed(model, name: str, seconds: dict[str, float]) -> None:
    """Add up what a method of the model takes."""
    whole = getattr(model, name)

    def measured(*args, **kwargs):
        begin = time.perf_counter()
        result = whole(*args, **kwargs)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
        return result

    setattr(model, name, measured)


def shortened(dataset, job: dict) -> dict:
    """Segments of so few days that an epoch has about `steps` batches."""
    import pandas as pd

    index = dataset.prepare("train", data_key="learn").get_index()
    days = pd.DatetimeIndex(index.get_level_values("datetime").unique()).sort_values()
    count = -(-job["steps"] * job["batch_size"] // max(1, len(index) // len(days)))
    train = (days[max(0, len(days) - count)], days[-1])
    valid = dataset.segments["valid"]
    short = (valid[0], str(pd.Timestamp(valid[0]) + pd.Timedelta(days=30))[:10])
    return {**dataset.segments, "train": train, "valid": short}


def main() -> None:
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    import torch

    torch.set_num_threads(job["threads"])
    init(job)
    dataset = dataset_of(job)
    if job["steps"]:
        job["epochs"] = 1
        dataset.config(segments=shortened(dataset, job))
    samples = len(dataset.prepare("train", data_key="learn"))
    valid = len(dataset.prepare("valid", data_key="learn"))
    model = model_of(job)
    seconds: dict[str, float] = {}
    evaluated: dict[str, list] = {}
    for name in ("train_epoch", "test_epoch"):
        timed(model, name, seconds)
    model.fit(dataset, evals_result=evaluated, save_path=f"{job['work']}/weights.pt")
    begin = time.perf_counter()
    scores = model.predict(dataset)
    predict = time.perf_counter() - begin
    scores.rename("score").to_csv(path.with_suffix(".csv"))
    network = getattr(model, CLASSES[job["network"]][2])
    epochs = len(evaluated["valid"])
    print(json.dumps({
        "train_rate": samples * epochs / seconds["train_epoch"],
        "epoch_rate": samples * epochs / sum(seconds.values()),  # with the train and valid metric
        "predict_rate": len(scores) / predict,
        "parameters": sum(p.numel() for p in network.parameters()),
        "epochs": epochs,
        "samples": samples,
        "valid_samples": valid,
        "seconds": sum(seconds.values()),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
