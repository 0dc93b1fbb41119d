"""LSTM: a recurrent network with long short-term memory cells."""

from __future__ import annotations

from qtorch.nn.last_state import LastState
from qtorch.nn.recurrent import LSTMLayers


class LSTM(LastState):
    """Stacked LSTM with a linear head on its last state.

    Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997. Corresponds to Qlib's
    pytorch_lstm.py and pytorch_lstm_ts.py, which differ only in their data loading. The layers
    have the same names, so that weights can be copied. Differences: `num_outputs`; a batch with
    one sample keeps its shape; no warning about dropout with a single layer (torch applies none).
    """

    layers = LSTMLayers
