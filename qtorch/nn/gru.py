"""GRU: a gated recurrent network, lighter than the LSTM."""

from __future__ import annotations

from qtorch.nn.last_state import LastState
from qtorch.nn.recurrent import GRULayers


class GRU(LastState):
    """Stacked GRU with a linear head on its last state.

    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014. Corresponds to
    Qlib's pytorch_gru.py and pytorch_gru_ts.py, with the same layer names. The differences are
    those of `LSTM`.
    """

    layers = GRULayers
