"""Train fleets on a pretended GPU, and count what a training step starts and waits for.

    python fleet_launches.py

Prints a JSON object: for each network and number of members the kernels of a step of all members
and what the host waited for in the steps ("steps"), and for networks without dropout the largest
difference of a member's weights from those of its training by itself ("differences").
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "model")]

from pretended_cuda import PretendedCuda  # noqa: E402  # before torch

# isort: split
import torch  # noqa: E402
from toy_training import ToyDataset, make_model, model_weights  # noqa: E402

from qtorch.model import fit_fleet  # noqa: E402
from qtorch.model.fleet.training import FleetTraining  # noqa: E402

NETWORKS: dict[str, dict[str, Any]] = {
    "MLP": {"layers": [8], "dropout": 0.1},
    "GRU": {"hidden_size": 8, "num_layers": 2, "dropout": 0.2},
    "Transformer": {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "dropout": 0.1},
}
WITHOUT_DROPOUT = ("MLP", "GRU")


def build_models(name: str, num_members: int, **arguments: Any) -> list[Any]:
    """Return models with seeds of their own."""
    config = {"_target_": f"qtorch.nn.{name}", **NETWORKS[name], **arguments}
    optimizer = {"_target_": "torch.optim.SGD", "lr": 3e-3}
    options = {"epochs": 2, "trainer": {"accelerator": "gpu"}, "optimizer": optimizer}
    return [make_model(config, seed=seed, **options) for seed in range(num_members)]


def count_steps(gpu: PretendedCuda, name: str, num_members: int) -> dict[str, Any]:
    """Return the kernels of one step of a fleet, and the waits of all its steps."""
    stage, train_step = f"{name}, {num_members} members", FleetTraining._train_step

    def counting_step(self: FleetTraining, batch: Any) -> Any:
        if self.num_rounds == 0 or batch.rows is not None:
            return train_step(self, batch)
        before, gpu.stage = gpu.stage, stage
        try:
            return train_step(self, batch)
        finally:
            gpu.stages[stage].calls += 1
            gpu.stage = before

    FleetTraining._train_step = counting_step  # type: ignore[method-assign]  # restored below
    try:
        fit_fleet(build_models(name, num_members), ToyDataset(num_days=40))
    finally:
        FleetTraining._train_step = train_step  # type: ignore[method-assign]  # as above
    counts = gpu.stages[stage]
    return {"kernels": counts.num_kernels / counts.calls, "waits": dict(counts.waits)}


def weight_difference(name: str) -> float:
    """Return the largest difference between members and the same trainings by themselves."""
    fleet, single = (build_models(name, 2, dropout=0.0) for _ in range(2))
    dataset = ToyDataset(num_days=40)
    fit_fleet(fleet, dataset)
    differences = []
    for member, model in zip(fleet, single, strict=True):
        model.fit(dataset)
        weights = model_weights(member), model_weights(model)
        differences += [float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0]]
    return max(differences)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with PretendedCuda() as gpu:
        steps = {name: {m: count_steps(gpu, name, m) for m in (2, 4)} for name in NETWORKS}
        differences = {name: weight_difference(name) for name in WITHOUT_DROPOUT}
    print(json.dumps({"steps": steps, "differences": differences}))


if __name__ == "__main__":
    main()
