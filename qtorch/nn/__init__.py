"""Networks in pure torch, one per file, independent of the training code."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.nn.adarnn import ADARNN as ADARNN
    from qtorch.nn.add import ADD as ADD
    from qtorch.nn.alstm import ALSTM as ALSTM
    from qtorch.nn.dlinear import DLinear as DLinear
    from qtorch.nn.gats import GATs as GATs
    from qtorch.nn.gru import GRU as GRU
    from qtorch.nn.hist import HIST as HIST
    from qtorch.nn.igmtf import IGMTF as IGMTF
    from qtorch.nn.itransformer import ITransformer as ITransformer
    from qtorch.nn.krnn import KRNN as KRNN
    from qtorch.nn.localformer import Localformer as Localformer
    from qtorch.nn.lstm import LSTM as LSTM
    from qtorch.nn.mamba import Mamba as Mamba
    from qtorch.nn.master import MASTER as MASTER
    from qtorch.nn.mlp import MLP as MLP
    from qtorch.nn.network import Network as Network
    from qtorch.nn.patchtst import PatchTST as PatchTST
    from qtorch.nn.recurrent import recurrent_layers as recurrent_layers
    from qtorch.nn.sandwich import Sandwich as Sandwich
    from qtorch.nn.sfm import SFM as SFM
    from qtorch.nn.stacked import call_stacked_members as call_stacked_members
    from qtorch.nn.stacked import stack_members as stack_members
    from qtorch.nn.stockmixer import StockMixer as StockMixer
    from qtorch.nn.tabnet import TabNet as TabNet
    from qtorch.nn.tcn import TCN as TCN
    from qtorch.nn.tcts import TCTS as TCTS
    from qtorch.nn.tra import TRA as TRA
    from qtorch.nn.transformer import Transformer as Transformer
    from qtorch.nn.tsmixer import TSMixer as TSMixer

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Sandwich": "qtorch.nn.sandwich",
        "KRNN": "qtorch.nn.krnn",
        "SFM": "qtorch.nn.sfm",
        "Localformer": "qtorch.nn.localformer",
        "TCN": "qtorch.nn.tcn",
        "ADARNN": "qtorch.nn.adarnn",
        "TabNet": "qtorch.nn.tabnet",
        "ALSTM": "qtorch.nn.alstm",
        "DLinear": "qtorch.nn.dlinear",
        "ITransformer": "qtorch.nn.itransformer",
        "Mamba": "qtorch.nn.mamba",
        "PatchTST": "qtorch.nn.patchtst",
        "TSMixer": "qtorch.nn.tsmixer",
        "GRU": "qtorch.nn.gru",
        "LSTM": "qtorch.nn.lstm",
        "MLP": "qtorch.nn.mlp",
        "Network": "qtorch.nn.network",
        "recurrent_layers": "qtorch.nn.recurrent",
        "stack_members": "qtorch.nn.stacked",
        "call_stacked_members": "qtorch.nn.stacked",
        "TCTS": "qtorch.nn.tcts",
        "TRA": "qtorch.nn.tra",
        "Transformer": "qtorch.nn.transformer",
        "ADD": "qtorch.nn.add",
        "GATs": "qtorch.nn.gats",
        "HIST": "qtorch.nn.hist",
        "MASTER": "qtorch.nn.master",
        "StockMixer": "qtorch.nn.stockmixer",
        "IGMTF": "qtorch.nn.igmtf",
    },
)
