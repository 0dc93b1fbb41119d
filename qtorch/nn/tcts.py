"""TCTS: one network for labels of several horizons, and one that weighs the labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.recurrent import GRULayers

NEVER = -1e9  # takes a task out of a softmax and stays finite


class TCTS(Network):
    """GRU layers whose last state answers for the labels of all horizons: with one output, or
    with `own_heads` one for each.

    Wu et al., "Temporally Correlated Task Scheduling for Sequence Learning", ICML 2021. Answers
    to Qlib's pytorch_tcts.py; the layers have the same names. The first label column is the main
    task and its output the score. `qtorch.model.TCTSModule` trains it. Differences: the score is
    given once for each label column, so that it can be held against all of them; `own_heads`.
    """

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        own_heads: bool = False,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        self.rnn = GRULayers(d_feat, hidden_size, num_layers, dropout)
        self.fc_out = nn.Linear(hidden_size, num_outputs if own_heads else 1)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, T, F]` to `[B]` or `[B, Q]`."""
        states, _ = self.rnn(x)  # [B, T, H]
        outputs = self.fc_out(states[:, -1])
        return self.scores(outputs.expand(-1, self.num_outputs))


class TaskWeights(nn.Module):
    """How much each sample should teach by each of its labels: shares of one.

    It sees the features, the errors, the labels and the main score, as Qlib's MLPModel does; the
    main task's number, which Qlib adds, is the same for every sample and left to the bias.
    """

    def __init__(
        self,
        num_inputs: int,
        num_tasks: int,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential()
        width = num_inputs + 2 * num_tasks + 1
        for k in range(num_layers):
            if k:
                self.mlp.add_module(f"drop_{k}", nn.Dropout(dropout))
            self.mlp.add_module(f"fc_{k}", nn.Linear(width, hidden_size))
            self.mlp.add_module(f"relu_{k}", nn.ReLU())
            width = hidden_size
        self.mlp.add_module("fc_out", nn.Linear(width, num_tasks))

    def forward(self, x: Tensor, score: Tensor, label: Tensor) -> Tensor:
        """`x [B, T, F]`, `score [B, Q]`, `label [B, Q]` to `[B, Q]`; a label that is NaN gets
        nothing, and a sample without any label gives nothing."""
        there = ~label.isnan()
        known = label.nan_to_num()
        error = torch.where(there, score - known, 0.0)
        flat = x.transpose(1, 2).flatten(1)
        seen = torch.cat((flat, error, known, score[:, :1]), -1)
        share: Tensor = self.mlp(seen).masked_fill(~there, NEVER).softmax(-1) * there
        return share
