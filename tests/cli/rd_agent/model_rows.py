import torch
from torch import nn


class Rows(nn.Module):
    """Scores rows of features: [B, F] becomes [B, 1]."""

    def __init__(self, num_features, num_timesteps=None):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_features, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)
        )

    def forward(self, x):
        assert x.dim() == 2, x.shape
        return self.layers(torch.nan_to_num(x))


model_cls = Rows
