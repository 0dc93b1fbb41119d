"""A network too large for one device, its weights sharded over the ranks (FSDP2)."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from qtorch.core.errors import ConfigError


class Sharded(ModelParallelStrategy):
    """Lightning's strategy with the weights sharded over all ranks, however many there are."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.world_size  # Lightning's own "auto" is that of the nodes
        super().setup_environment()


def shard(network: nn.Module, strategy: Any, mesh: Any) -> None:
    """Shard a network's weights where Lightning's strategy is to shard: each entry of its lists
    of layers by itself, so that one of them is whole at a time, and what is left together.

    Raises ConfigError for tensor parallelism: it wants the same samples at several ranks, whose
    weights would drift apart here.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if mesh["data_parallel"].size() != strategy.world_size:
        raise ConfigError(
            f"the strategy shards weights over {mesh['data_parallel'].size()} of "
            f"{strategy.world_size} devices: use strategy={{'_target_': "
            "'qtorch.model.sharding.Sharded'}, which takes all of them (trainer=fsdp)."
        )
    for part in network.modules():
        if isinstance(part, nn.ModuleList):
            for layer in part:
                fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(network, mesh=mesh["data_parallel"])


def is_sharded(network: nn.Module) -> bool:
    """Whether a network's weights lie on several ranks."""
    return isinstance(network, FSDPModule)


def whole_weights(network: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's weights; of a sharded one put together on the first rank's CPU, empty
    on the others. Every rank must ask."""
    if not is_sharded(network):
        return {k: v.detach().clone() for k, v in network.state_dict().items()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: dict[str, Any] = get_model_state_dict(network, options=options)
    return found


def whole_optimizer(strategy: Any, optimizer: Optimizer, network: nn.Module) -> dict[str, Any]:
    """An optimizer's state, put together likewise."""
    found: dict[str, Any]
    found = strategy.optimizer_state(optimizer) if is_sharded(network) else optimizer.state_dict()
    return found
