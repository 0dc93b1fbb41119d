"""Weight sharding over the ranks (FSDP2), for a network too large for one device."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from qtorch.core.errors import ConfigError
from qtorch.model.loop.lightning_internals import shard_over_all_ranks


class Sharded(ModelParallelStrategy):
    """Lightning's model-parallel strategy, with the weights sharded over all ranks."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        shard_over_all_ranks(self)
        super().setup_environment()


def shard(network: nn.Module, strategy: Any, mesh: Any) -> None:
    """Shard a network's weights if the strategy is a sharding one.

    Each layer in an nn.ModuleList is sharded separately, so that only one of them is gathered at a
    time; the remaining weights are sharded together. Raises ConfigError for tensor parallelism: it
    expects the same samples on several ranks, but each rank gets other samples here, so their
    weights would diverge.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if mesh["data_parallel"].size() != strategy.world_size:
        raise ConfigError(
            f"the strategy shards weights over {mesh['data_parallel'].size()} of "
            f"{strategy.world_size} devices: use strategy={{'_target_': "
            "'qtorch.model.Sharded'}, which takes all of them (trainer=fsdp)."
        )
    for part in network.modules():
        if isinstance(part, nn.ModuleList):
            for layer in part:
                fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(network, mesh=mesh["data_parallel"])


def is_sharded(network: nn.Module) -> bool:
    """Whether a network's weights are sharded over several ranks."""
    return isinstance(network, FSDPModule)


def gather_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a network's weights.

    Sharded weights are gathered on the first rank's CPU; the other ranks get an empty dict. Every
    rank must call this.
    """
    if not is_sharded(network):
        return {k: v.detach().clone() for k, v in network.state_dict().items()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(network, options=options)
    return weights


def gather_optimizer_state(
    strategy: Any, optimizer: Optimizer, network: nn.Module
) -> dict[str, Any]:
    """Return an optimizer's state, gathered in the same way."""
    if not is_sharded(network):
        return optimizer.state_dict()
    state: dict[str, Any] = strategy.optimizer_state(optimizer)
    return state
