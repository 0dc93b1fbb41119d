"""Networks in pure torch, one per file, independent of the training code."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.nn.cross_section.add import ADD as ADD
    from qtorch.nn.cross_section.gats import GATs as GATs
    from qtorch.nn.cross_section.hist import HIST as HIST
    from qtorch.nn.cross_section.igmtf import IGMTF as IGMTF
    from qtorch.nn.cross_section.master import MASTER as MASTER
    from qtorch.nn.cross_section.stockmixer import StockMixer as StockMixer
    from qtorch.nn.flat import FlatInput as FlatInput
    from qtorch.nn.mlp import MLP as MLP
    from qtorch.nn.network import Network as Network
    from qtorch.nn.recurrent import GRU as GRU
    from qtorch.nn.recurrent import LSTM as LSTM
    from qtorch.nn.recurrent import recurrent_layers as recurrent_layers
    from qtorch.nn.stacked import call_stacked_members as call_stacked_members
    from qtorch.nn.stacked import stack_members as stack_members
    from qtorch.nn.tabnet import TabNet as TabNet
    from qtorch.nn.temporal.adarnn import ADARNN as ADARNN
    from qtorch.nn.temporal.alstm import ALSTM as ALSTM
    from qtorch.nn.temporal.dlinear import DLinear as DLinear
    from qtorch.nn.temporal.itransformer import ITransformer as ITransformer
    from qtorch.nn.temporal.krnn import KRNN as KRNN
    from qtorch.nn.temporal.localformer import Localformer as Localformer
    from qtorch.nn.temporal.mamba import Mamba as Mamba
    from qtorch.nn.temporal.patchtst import PatchTST as PatchTST
    from qtorch.nn.temporal.sandwich import Sandwich as Sandwich
    from qtorch.nn.temporal.sfm import SFM as SFM
    from qtorch.nn.temporal.tcn import TCN as TCN
    from qtorch.nn.temporal.tcts import TCTS as TCTS
    from qtorch.nn.temporal.tra import TRA as TRA
    from qtorch.nn.temporal.tsmixer import TSMixer as TSMixer
    from qtorch.nn.transformer import Transformer as Transformer

__getattr__, __dir__ = lazy_names(__name__, __file__)
