"""A step of a fleet reads no number, and its operations do not grow with the members."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from toy_training import ToyDataset, make_model

from qtorch.model import fit_fleet
from qtorch.model.fleet.training import FleetTraining

pytestmark = pytest.mark.slow

# Operations whose result the host reads, or whose shape depends on values.
HOST_READS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_consecutive",
}
# Operations that start no kernel on a GPU.
VIEWS = {
    "aten::view",
    "aten::_unsafe_view",
    "aten::detach",
    "aten::t",
    "aten::transpose.int",
    "aten::slice.Tensor",
    "aten::select.int",
    "aten::expand",
    "aten::unsqueeze",
    "aten::squeeze.dim",
    "aten::permute",
    "aten::split.Tensor",
    "aten::split_with_sizes",
    "aten::as_strided",
    "aten::alias",
    "aten::empty.memory_format",
    "aten::unbind.int",
}


class OperationCounter(TorchDispatchMode):
    """Counts the operations below vmap and autograd, as a device would receive them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def num_kernels(self) -> int:
        return sum(n for name, n in self.counts.items() if name not in VIEWS)


NETWORKS: dict[str, dict[str, Any]] = {
    "LSTM": {"hidden_size": 8, "num_layers": 2, "dropout": 0.2},
    "GRU": {"hidden_size": 8, "num_layers": 2, "dropout": 0.2},
    "MLP": {"layers": [8], "dropout": 0.1},
    "Transformer": {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "dropout": 0.1},
    "DLinear": {},
    "TCN": {"num_layers": 2, "n_chans": 8, "dropout": 0.1},
}


def count_step(name: str, num_members: int, monkeypatch: pytest.MonkeyPatch) -> OperationCounter:
    """Count the operations of a training step of all members at once, as on a GPU."""
    counter, original_step = OperationCounter(), FleetTraining._train_step
    has_counted = False

    def counting_step(self: FleetTraining, batch: Any) -> Any:
        nonlocal has_counted
        self.cache_bytes = 1 << 40  # no parts
        if self.num_rounds == 0 or has_counted or batch.rows is not None:
            return original_step(self, batch)
        has_counted = True
        with counter:
            return original_step(self, batch)

    monkeypatch.setattr(FleetTraining, "_train_step", counting_step)
    network = {"_target_": f"qtorch.nn.{name}", **NETWORKS[name]}
    models = [make_model(network, seed=seed, epochs=2) for seed in range(num_members)]
    fit_fleet(models, ToyDataset())
    monkeypatch.undo()
    assert has_counted
    return counter


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_reads_nothing_and_its_operations_do_not_grow_with_members(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_fleet, large_fleet = (count_step(name, count, monkeypatch) for count in (2, 5))
    assert not HOST_READS & set(small_fleet.counts)
    assert small_fleet.num_kernels == large_fleet.num_kernels, (
        small_fleet.counts - large_fleet.counts,
        large_fleet.counts - small_fleet.counts,
    )
