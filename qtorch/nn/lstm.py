"""LSTM: a recurrent network that reads the window from its oldest step to its newest."""

from __future__ import annotations

from qtorch.nn.last_state import LastState
from qtorch.nn.recurrent import LSTMLayers


class LSTM(LastState):
    """Stacked LSTM whose last state gives the score.

    Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997. Answers to Qlib's
    pytorch_lstm.py and pytorch_lstm_ts.py, which differ only in how they are fed; the layers
    have the same names, so that weights can be copied. Differences: `num_outputs`; a batch of
    one stays a batch; no warning about dropout with a single layer (torch applies none there).
    """

    layers = LSTMLayers
