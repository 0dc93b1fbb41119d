"""What a network is, in words."""

from __future__ import annotations

from torch import nn

from qtorch.model.network_description import describe_network


def test_description_of_a_network():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1), nn.LazyLinear(2))
    network[0].requires_grad_(False)
    assert describe_network(network).splitlines() == [
        "network Sequential: 21 parameters, 5 of them trained",
        "  0  Linear              16",
        "  1  ReLU                 0",
        "  2  Linear               5",
        "  3  LazyLinear           0",
    ]
    deep = nn.Sequential(*(nn.Linear(1, 1) for _ in range(20)))
    assert describe_network(deep).splitlines()[-1] == "  and 9 more layers"
