"""Networks: pure torch, one a file; they know nothing of training."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.nn.gru import GRU as GRU
    from qtorch.nn.lstm import LSTM as LSTM
    from qtorch.nn.mlp import MLP as MLP
    from qtorch.nn.network import Network as Network
    from qtorch.nn.transformer import Transformer as Transformer

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "GRU": "qtorch.nn.gru",
        "LSTM": "qtorch.nn.lstm",
        "MLP": "qtorch.nn.mlp",
        "Network": "qtorch.nn.network",
        "Transformer": "qtorch.nn.transformer",
    },
)
