"""Random numbers that depend on what they are for, never on who draws them or when.

Philox is a counter-based generator (Salmon et al. 2011): the key is the run's seed and the purpose, the high word
of the counter is the place (a sample's position, an epoch). Any worker, after any restart, draws the same numbers
for the same place.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """The purpose that numbers are drawn for; purposes never share numbers."""

    SHARD_ORDER = 1
    SAMPLE_ORDER = 2
    SAMPLE = 3
    DROPOUT = 4
    VIEW = 5


def generator(seed: int, purpose: Purpose, place: int, inner: int = 0) -> np.random.Generator:
    """Return the generator of one place.

    Args:
        seed: the run's seed, modulo 2**64.
        purpose: what the numbers are for.
        place: sample position or epoch.
        inner: a place within the place, such as a window of an epoch.
    """
    key = np.array([seed % 2**64, purpose], dtype=np.uint64)
    # Word 0 counts the draws, so every (inner, place) has 2**128 of its own.
    counter = np.array([0, 0, inner, place], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
