"""Random weights for networks whose zero-initialised layers would hide what comes before them."""

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def randomized(network: Network, *, std: float = 0.1) -> Network:
    """Draw every weight anew from N(0, std^2), the same at each call; return the network."""
    torch.manual_seed(0)
    for weight in network.parameters():
        nn.init.normal_(weight, std=std)
    return network


def without_zeros(network: Network, *, std: float = 0.05) -> Network:
    """Draw only the weights that are all zero from N(0, std^2); return the network."""
    for weight in network.parameters():
        if not weight.detach().any():
            nn.init.normal_(weight, std=std)
    return network
