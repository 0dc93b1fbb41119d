"""One network's epochs: the model's own `fit` and a hand-written loop, in turns.

    python network_side.py NAME --provider FOLDER --threads 1 --work DIR --repeats 3

prints one line of JSON, and in it the job that tells `zoo_qlib.py` to do the same. The task is
that of `scripts/zoo.py`, on fewer days; networks of a slow step get fewer still.
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
from zoo_cells import Settings, prepare, qlib_job, task_of

from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.session import session_context
from qtorch.data.batches import Batch, BatchLoader
from qtorch.model.feeding import Feeder

YEAR, QUARTER = ("2014-01-01", "2014-12-31"), ("2014-10-01", "2014-12-31")
SLOW = ("transformer", "gats")
CLIP = 3.0


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(
        provider=args.provider,
        folder=args.work,
        qlib_python=None,
        threads=args.threads,
        steps=0,
        universe="nyse500",
        instruments=100,
        train=QUARTER if args.name in SLOW else YEAR,
        valid=("2015-01-01", "2015-02-28"),
        test=("2015-03-01", "2015-03-31"),
        step_len=20,
        epochs=1,
        handler="alpha158_20",
    )


def ready(samples: Any, batch: dict[str, Any]) -> list[Batch]:
    """All batches of an epoch as ready tensors."""
    loader = BatchLoader(
        samples,
        batch_size=batch["size"],
        order=batch["order"],
        days_per_batch=batch["days_per_batch"],
    )
    return list(loader.batches(0))


def hand_epoch(network: nn.Module, optimizer: Any, batches: list[tuple[Any, Tensor, Any]]) -> float:
    """Seconds of a pass that holds nothing but the arithmetic."""
    network.train()
    begin = time.perf_counter()
    for arguments, label, mask in batches:
        wrong = (network(*arguments) - label).square()
        loss = wrong.mean() if mask is None else (wrong * mask).sum() / mask.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_value_(network.parameters(), CLIP)
        optimizer.step()
    return time.perf_counter() - begin


def measure(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_of(args)
    prepare(settings)
    task = task_of(args.name, 0, settings)
    dataset = init_instance_by_config(task["dataset"])
    config = task["model"]
    config["checkpoint"] = {"enabled": False}
    config["trainer"] |= {"enable_progress_bar": False, "gradient_clip_val": CLIP}
    samples = dataset.samples("train", data_key="learn").to("cpu")
    model = init_instance_by_config(config)
    train, hand, epoch = [], [], []
    with session_context(seed=0):
        model.fit(dataset)  # a warm one
        network: nn.Module = model.network_
        feeder = Feeder(network)
        batches = [
            (feeder.arguments(b)[0], b.y[..., 0].nan_to_num(), b.mask)
            for b in ready(samples, config["batch"])
        ]
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        hand_epoch(network, optimizer, batches[:5])
        for _ in range(args.repeats):
            model.fit(dataset)
            train.append(model.fit_report_["train_seconds"])
            epoch.append(model.fit_report_["seconds"])
            hand.append(hand_epoch(network, optimizer, batches))
    job = qlib_job(args.name, 0, settings)
    return {
        "train_rate": len(samples) / median(train),
        "epoch_rate": len(samples) / median(epoch),
        "hand_rate": len(samples) / median(hand),
        "hand_step": median(hand) / len(batches),
        "share": median(hand) / median(train),
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
