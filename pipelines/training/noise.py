"""Gaussian noise drawn on the device: a pure function of (seed, purpose, position), on whatever device.

A batch takes a few launches, and nothing of it is uploaded but the positions. CPU and GPU agree to the last bits of
log, sine and cosine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.shards.randomness import Purpose, counter, key, philox


def standard_normal(seed: int, purpose: Purpose, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Return standard normal numbers for each sample of a batch.

    Args:
        seed: the run's seed.
        purpose: what they are for.
        positions: (B,) int64 positions of the samples in the sequence of all batches; the result is on their device.
        shape: of one sample's numbers, at most 2**34 of them.

    Returns:
        (B, *shape) fp32; a sample's numbers depend on its own position alone.
    """
    elements = math.prod(shape)
    index = torch.arange(-(-elements // 4), device=positions.device)[None]
    words = [word.float() for word in philox(counter(purpose, positions[:, None], index), key(seed))]
    normal = []
    for first, second in (words[:2], words[2:]):
        # Box and Muller (1958), of numbers in (0, 1]: 2**-33 keeps the logarithm's away from 0.
        radius = torch.sqrt(-2.0 * torch.log(first * 2.0**-32 + 2.0**-33))
        angle = second * (2.0 * math.pi * 2.0**-32)
        normal += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.cat(normal, dim=1)[:, :elements].reshape(len(positions), *shape)
