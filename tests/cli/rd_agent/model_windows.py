from torch import nn


class Windows(nn.Module):
    """Scores windows of features: [B, T, F] becomes [B, 1]."""

    def __init__(self, num_features, num_timesteps):
        super().__init__()
        self.num_timesteps = num_timesteps
        self.gru = nn.GRU(num_features, 8, batch_first=True)
        self.score = nn.Linear(8, 1)

    def forward(self, x):
        assert x.shape[1] == self.num_timesteps, x.shape
        return self.score(self.gru(x)[0][:, -1])


model_cls = Windows
