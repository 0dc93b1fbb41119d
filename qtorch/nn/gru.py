"""GRU: the LSTM's lighter sister."""

from __future__ import annotations

from qtorch.nn.last_state import LastState
from qtorch.nn.recurrent import GRULayers


class GRU(LastState):
    """Stacked GRU whose last state gives the score.

    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014. Answers to
    Qlib's pytorch_gru.py and pytorch_gru_ts.py; the layers have the same names. Differences as
    in `LSTM`.
    """

    layers = GRULayers
