"""TCTS: a network for labels of several horizons, and a network that weights these labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.recurrent import GRULayers

MASKED_LOGIT = -1e9  # a logit that removes a task from a softmax but stays finite


class TCTS(Network):
    """GRU layers whose last state predicts the labels of all horizons.

    There is one output for all labels, or with `own_heads` one output for each.

    Wu et al., "Temporally Correlated Task Scheduling for Sequence Learning", ICML 2021.
    Corresponds to Qlib's pytorch_tcts.py, with the same layer names. The first label column is the
    main task, and its output is the score. `qtorch.model.TCTSModule` trains the network.
    Differences: the score is repeated for each label column, so that it can be compared with all
    labels; `own_heads`.
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
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        states, _ = self.rnn(x)  # [B, T, H]
        outputs = self.fc_out(states[:, -1])
        return self.scores(outputs.expand(-1, self.num_outputs))


class TaskWeights(nn.Module):
    """Compute the loss weight of each label of a sample; the weights of a sample sum to one.

    The inputs are the features, the errors, the labels and the main score, as in Qlib's MLPModel.
    Qlib also adds the index of the main task, which is the same for every sample and is covered by
    the bias here.
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
        """Map `x [B, T, F]`, `score [B, Q]`, `label [B, Q]` to weights `[B, Q]`.

        A NaN label gets weight zero; a sample without labels has weights of zero.
        """
        has_label = ~label.isnan()
        filled_label = label.nan_to_num()
        error = torch.where(has_label, score - filled_label, 0.0)
        features = x.transpose(1, 2).flatten(1)
        inputs = torch.cat((features, error, filled_label, score[:, :1]), -1)
        logits = self.mlp(inputs).masked_fill(~has_label, MASKED_LOGIT)
        return logits.softmax(-1) * has_label
