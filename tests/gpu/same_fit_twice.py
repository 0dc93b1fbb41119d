"""Fit every network of conf/model twice on a pretended GPU whose atomic sums have a random order.

    python same_fit_twice.py FILE [NAME ...]

writes a JSON object to FILE: for each network what differs between the two fits. The network "sums"
is not one of qtorch: it adds atomically.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from pretended_cuda import PretendedCuda  # noqa: E402  # before torch

# isort: split
import torch  # noqa: E402
from small_networks import network_config, network_dataset, network_names  # noqa: E402
from torch import Tensor  # noqa: E402
from toy_training import model_weights, same_weights  # noqa: E402

from qtorch.core.instantiate import init_instance_by_config  # noqa: E402
from qtorch.nn import MLP  # noqa: E402

FEW_STEPS = {"deterministic": None, "limit_train_batches": 4, "limit_val_batches": 2}


class Sums(MLP):
    """An MLP with features that are sums over samples."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(len(x), device=x.device) % 3
        mean = x.new_zeros(3, x.shape[1]).index_add(0, rows, x) / len(x)
        return super().forward(x + mean[rows])


def fit_twice(name: str) -> dict[str, bool]:
    """Return whether weights, metrics and scores of two fits differ."""
    config = network_config("mlp" if name == "sums" else name, **FEW_STEPS)
    if name == "sums":
        config["network"] = {"_target_": f"{__name__}.Sums", "layers": [8]}
    dataset = network_dataset("mlp" if name == "sums" else name)
    models = [init_instance_by_config(config) for _ in range(2)]
    for model in models:
        model.fit(dataset)
    scores = [model.predict(dataset) for model in models]
    return {
        "weights": not same_weights(*map(model_weights, models)),
        "metrics": models[0].evals_result_ != models[1].evals_result_,
        "scores": not scores[0].equals(scores[1]),
    }


def main(path: str, *names: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    report: dict[str, Any] = {}
    with PretendedCuda(shuffle_sums=True):
        for name in names or ("sums", *network_names()):
            report[name] = fit_twice(name)
            print(name, report[name], flush=True)
    Path(path).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
