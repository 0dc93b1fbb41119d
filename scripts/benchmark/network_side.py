"""Benchmark the epochs of one network: the model's `fit` and a hand-written loop, alternately.

    python network_side.py NAME --provider FOLDER --threads 1 --work DIR --repeats 3

Prints one line of JSON, which includes the path of a job file for the same training with
`zoo_qlib.py`. The task is that of `scripts/zoo.py` on fewer days; networks with slow steps get
even fewer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from zoo_cells import Settings, build_task, prepare_worker, write_qlib_job

from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.session import session_context
from qtorch.data.dataset.batch import Batch
from qtorch.data.dataset.batches import BatchLoader
from qtorch.model.loop.scoring import ForwardAdapter

YEAR, QUARTER = ("2014-01-01", "2014-12-31"), ("2014-10-01", "2014-12-31")
SLOW_NETWORKS = ("transformer", "gats")
GRADIENT_CLIP = 3.0


def build_settings(args: argparse.Namespace) -> Settings:
    return Settings(
        provider=args.provider,
        folder=args.work,
        qlib_python=None,
        threads=args.threads,
        steps=0,
        universe="nyse500",
        instruments=100,
        train=QUARTER if args.name in SLOW_NETWORKS else YEAR,
        valid=("2015-01-01", "2015-02-28"),
        test=("2015-03-01", "2015-03-31"),
        step_len=20,
        epochs=1,
        handler="alpha158_20",
    )


def load_batches(samples: Any, batch: dict[str, Any]) -> list[Batch]:
    """All batches of an epoch, gathered in advance."""
    loader = BatchLoader(
        samples,
        batch_size=batch["size"],
        order=batch["order"],
        days_per_batch=batch["days_per_batch"],
    )
    return list(loader.batches(0))


def run_manual_epoch(
    network: nn.Module, optimizer: Any, batches: list[tuple[Any, Tensor, Any]]
) -> float:
    """Seconds of a training pass that does only the arithmetic."""
    network.train()
    start = time.perf_counter()
    for arguments, label, mask in batches:
        squared_error = (network(*arguments) - label).square()
        loss = squared_error.mean() if mask is None else (squared_error * mask).sum() / mask.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_value_(network.parameters(), GRADIENT_CLIP)
        optimizer.step()
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    settings = build_settings(args)
    prepare_worker(settings)
    task = build_task(args.name, 0, settings)
    dataset = init_instance_by_config(task["dataset"])
    config = task["model"]
    config["checkpoint"] = {"enabled": False}
    config["trainer"] |= {"enable_progress_bar": False, "gradient_clip_val": GRADIENT_CLIP}
    samples = dataset.samples("train", data_key="learn").to("cpu")
    model = init_instance_by_config(config)
    train, manual, epoch = [], [], []
    with session_context(seed=0):
        model.fit(dataset)  # warm-up
        network: nn.Module = model.network_
        forward_adapter = ForwardAdapter(network)
        batches = [
            (forward_adapter.arguments(b)[0], b.y[..., 0].nan_to_num(), b.mask)
            for b in load_batches(samples, config["batch"])
        ]
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        run_manual_epoch(network, optimizer, batches[:5])
        for _ in range(args.repeats):
            model.fit(dataset)
            train.append(model.fit_report_["train_seconds"])
            epoch.append(model.fit_report_["seconds"])
            manual.append(run_manual_epoch(network, optimizer, batches))
    job = write_qlib_job(args.name, 0, settings)
    return {
        "train_rate": len(samples) / median(train),
        "epoch_rate": len(samples) / median(epoch),
        "hand_rate": len(samples) / median(manual),
        "hand_step": median(manual) / len(batches),
        "share": median(manual) / median(train),
        "instruments": settings.instruments,
        "days": samples.num_days,
        "job": str(job),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--provider", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
