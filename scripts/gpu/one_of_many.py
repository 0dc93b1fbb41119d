"""Train one model on the device beside other processes that do the same.

    python one_of_many.py NETWORK BATCH_SIZE SEED FOLDER [--small]

After a first epoch, which allocates memory, the process writes FOLDER/ready-SEED and waits for
FOLDER/go, so that all train at the same time. Prints the samples per second of its training.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from check import FLEET_SIZES, SMALL_SIZES, build_model, network_dataset

LIMIT_SECONDS = 120.0  # for the others to be ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network")
    parser.add_argument("batch_size", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dataset = network_dataset(args.network, **(SMALL_SIZES if args.small else FLEET_SIZES))
    models = [build_model(args.network, max_epochs=number) for number in (1, 3)]
    for model in models:
        model.batch["size"], model.seed = args.batch_size, args.seed
    models[0].fit(dataset)
    (args.folder / f"ready-{args.seed}").touch()
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (args.folder / "go").exists():
        if time.monotonic() > deadline:
            raise TimeoutError("the other processes were not ready in time")
        time.sleep(0.01)
    models[1].fit(dataset)
    print(models[1].fit_report_["samples_per_second"])


if __name__ == "__main__":
    main()
