"""`qtorch new`: write a small project: a configuration, a network, its test, and a README."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qtorch.core.errors import ArgumentError, ConfigError
from qtorch.core.files import atomic_write
from qtorch.core.session import resolve_path

USAGE = """\
qtorch new: write a small project that trains a network of your own

usage: qtorch new FOLDER

  conf/experiment/@NAME@.yaml   settings on top of qtorch's own
  conf/model/mean.yaml          the network's settings
  mean_network.py               the network
  test_mean_network.py          its test (pytest)
  README.md                     the commands, to begin with
""".replace("@NAME@", "FOLDER")

FILES = {
    "conf/experiment/@NAME@.yaml": """\
# @package _global_
# What this study changes in qtorch's settings; `qtorch train --cfg job` shows all of them.
defaults:
  - override /data: synthetic_tiny # your bars: table or qlib, see the README
  - override /model: mean

experiment_name: @NAME@
dataset:
  step_len: 10
trainer:
  max_epochs: 5
""",
    "conf/model/mean.yaml": """\
# The network of mean_network.py with the usual settings of a training.
defaults:
  - lightning
  - _self_

network:
  _target_: mean_network.MeanNetwork
  hidden_size: 16
""",
    "mean_network.py": '''\
"""A network to start from."""

import torch
from torch import nn


class MeanNetwork(nn.Module):
    """A function of the mean of the window's features; `d_feat` is filled in from the data."""

    def __init__(self, d_feat: int, hidden_size: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(d_feat, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, F]
        return self.layers(x.mean(1))[:, 0]  # [B]
''',
    "test_mean_network.py": '''\
"""A score for each sample, and a gradient for each weight."""

import torch
from mean_network import MeanNetwork


def test_scores_and_gradients():
    network = MeanNetwork(d_feat=3)
    scores = network(torch.randn(5, 10, 3))
    assert scores.shape == (5,)
    scores.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
''',
    "README.md": """\
# @NAME@

```bash
export QTORCH_TRUSTED=mean_network                         # saved runs may name your module
qtorch train --config-dir conf experiment=@NAME@           # on a small made market
qtorch runs
qtorch predict run=latest segment=test out=scores.parquet
qtorch train --config-dir conf experiment=@NAME@ record=full portfolio.topk=5 portfolio.n_drop=1
qtorch train -m --config-dir conf experiment=@NAME@ model.network.hidden_size=8,16 seed=0,1
python -m pytest                                           # pip install pytest
```

Your own bars: `data=table data.path=bars.parquet`, or `data=qlib data.provider_uri=FOLDER
universe=NAME`; write them into `conf/experiment/@NAME@.yaml` once they work.
""",
}


def main(argv: Sequence[str]) -> int:
    """Write the project."""
    if len(argv) != 1:
        raise ArgumentError("qtorch new needs the folder of the project: qtorch new study/")
    folder = resolve_path(argv[0])
    if not re.fullmatch(r"[A-Za-z][\w-]*", folder.name):
        raise ConfigError(
            f"{folder.name!r} cannot be the name of a study: use letters, digits, - and _."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; choose a new folder.")
    for name, text in FILES.items():
        with atomic_write(folder / name.replace("@NAME@", folder.name)) as path:
            path.write_text(text.replace("@NAME@", folder.name), encoding="utf-8")
    print(f"wrote {len(FILES)} files to {folder}; begin with README.md, or with:")
    print(f"  cd {argv[0]}")
    print(f"  qtorch train --config-dir conf experiment={folder.name}")
    return 0
