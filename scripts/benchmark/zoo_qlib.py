"""Train Qlib's own network on the zoo's data; needs a Python with pyqlib.

    python zoo_qlib.py JOB.json

JOB holds the network, its arguments, the data and the seed (see zoo_cells.py). Writes the scores
to a CSV file beside it, and prints one line of JSON: samples per second of training and
prediction, number of parameters.
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
# Arguments of qtorch's networks that Qlib's constructors name differently or do not have.
OMITTED_ARGUMENTS = ("_target_", "dim_feedforward")


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


def build_dataset(job: dict):
    """Qlib's window dataset with selected columns of Alpha158, as in its recurrent benchmarks."""
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


def build_model(job: dict):
    """Qlib's model class with qtorch's hyperparameters under Qlib's names."""
    import importlib

    module, name, _ = CLASSES[job["network"]]
    cls = getattr(importlib.import_module(f"qlib.contrib.model.{module}"), name)
    arguments = {k: v for k, v in job["arguments"].items() if k not in OMITTED_ARGUMENTS}
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


def add_timing(model, name: str, seconds: dict[str, float]) -> None:
    """Wrap a method of the model so that its time is added to `seconds`."""
    method = getattr(model, name)

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = method(*args, **kwargs)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return result

    setattr(model, name, wrapper)


def shorten_segments(dataset, job: dict) -> dict:
    """Shorten the train segment to about `steps` batches per epoch, and valid to 30 days."""
    import pandas as pd

    index = dataset.prepare("train", data_key="learn").get_index()
    days = pd.DatetimeIndex(index.get_level_values("datetime").unique()).sort_values()
    count = -(-job["steps"] * job["batch_size"] // max(1, len(index) // len(days)))
    train = (days[max(0, len(days) - count)], days[-1])
    valid = dataset.segments["valid"]
    short_valid = (valid[0], str(pd.Timestamp(valid[0]) + pd.Timedelta(days=30))[:10])
    return {**dataset.segments, "train": train, "valid": short_valid}


def main() -> None:
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    import torch

    torch.set_num_threads(job["threads"])
    init(job)
    dataset = build_dataset(job)
    if job["steps"]:
        job["epochs"] = 1
        dataset.config(segments=shorten_segments(dataset, job))
    num_samples = len(dataset.prepare("train", data_key="learn"))
    num_valid = len(dataset.prepare("valid", data_key="learn"))
    model = build_model(job)
    seconds: dict[str, float] = {}
    history: dict[str, list] = {}
    for name in ("train_epoch", "test_epoch"):
        add_timing(model, name, seconds)
    model.fit(dataset, evals_result=history, save_path=f"{job['work']}/weights.pt")
    start = time.perf_counter()
    scores = model.predict(dataset)
    predict_seconds = time.perf_counter() - start
    scores.rename("score").to_csv(path.with_suffix(".csv"))
    network = getattr(model, CLASSES[job["network"]][2])
    epochs = len(history["valid"])
    print(json.dumps({
        "train_rate": num_samples * epochs / seconds["train_epoch"],
        # The epoch includes the metric on the train and valid segments.
        "epoch_rate": num_samples * epochs / sum(seconds.values()),
        "predict_rate": len(scores) / predict_seconds,
        "parameters": sum(p.numel() for p in network.parameters()),
        "epochs": epochs,
        "samples": num_samples,
        "valid_samples": num_valid,
        "seconds": sum(seconds.values()),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
