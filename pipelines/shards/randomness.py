"""Random numbers that depend on what they are for, never on who draws them or when.

Philox is a counter-based generator (Salmon et al. 2011): the key is the run's seed, the counter the purpose and the
place (a sample's position, an epoch). Any worker, after any restart, draws the same numbers for the same place.

`generator` gives a NumPy generator for one place; `words` gives a few words for each of many places at once, with
NumPy; `philox` is the function itself on whatever computes with integers, which training uses on its device.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Philox4x32: multipliers, and what is added to the key each round (Salmon et al. 2011, Table 2).
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 0xFFFFFFFF


class Purpose(IntEnum):
    """The purpose that numbers are drawn for; purposes never share numbers."""

    SHARD_ORDER = 1
    SAMPLE_ORDER = 2
    SAMPLE = 3
    DROPOUT = 4
    CHOICES = 5
    NOISE = 6
    POSTERIOR = 7


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


def words(seed: int, purpose: Purpose, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return four words of 32 random bits for each of many places.

    Args:
        seed: the run's seed, modulo 2**64.
        purpose: what they are for.
        places: (n,) sample positions.

    Returns:
        (4, n), each from 0 to 2**32 - 1.
    """
    return np.stack(philox(counter(purpose, places, np.zeros_like(places)), key(seed)))


def key(seed: int) -> tuple[int, int]:
    """Return Philox's key for a seed, modulo 2**64."""
    return seed & _WORD, seed >> 32 & _WORD


def counter(purpose: Purpose, places: Any, index: Any) -> tuple[Any, Any, Any, Any]:
    """Return Philox's counter: the `index`-th of each place, for one purpose.

    Args:
        purpose: what the numbers are for.
        places: sample positions, int64.
        index: from 0 to 2**32 - 1, of a shape that broadcasts with `places`.
    """
    return index, index * 0 + int(purpose), places & _WORD, places >> 32 & _WORD


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Return Philox4x32-10 of many counters: four random words for each.

    Works on NumPy arrays and on tensors of any device alike, since it takes integer arithmetic and nothing else.

    Args:
        counter: four arrays of words, int64, of shapes that broadcast.
        key: two words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two words wraps around in int64. Its bits are right, and the sign is masked away.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (second >> 32 & _WORD) ^ c1 ^ k0, second & _WORD
        c2, c3 = (first >> 32 & _WORD) ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3
