"""Memory that a batch is written into by one process and read from by another, without a copy.

A slot is an anonymous file in memory (memfd). It has no name that could be left behind: it is gone when the last
process that has it open or mapped is, however that ends. It grows to what the largest batch takes.
"""

from __future__ import annotations

import mmap
import os
import pickle
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

# Where arrays begin: whole cache lines, and whole words for a copy by the GPU.
_ALIGNMENT = 256

# Name, dtype, shape and first byte of each array of a batch.
Layout = list[tuple[str, str, tuple[int, ...], int]]


def new_slot() -> int:
    """Return the file descriptor of an empty slot."""
    return os.memfd_create("ldm-batch")


class SlotWriter:
    """Makes the arrays of one batch after the other in a slot.

    Args:
        file: the slot's file descriptor.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._memory: mmap.mmap | None = None
        self._bytes = self._used = 0
        self._layout: Layout = []

    def begin(self) -> None:
        """Begin a batch; the arrays of the one before must not be in use any more."""
        self._used, self._layout = 0, []

    def new(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array of the batch, to be filled."""
        kind = np.dtype(dtype)
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        end = start + prod(shape) * kind.itemsize
        if self._memory is None or end > self._bytes:
            # The arrays made so far keep the old mapping, of the same bytes. A half more, so that it seldom grows.
            self._bytes = (1 + (end + end // 2) // mmap.PAGESIZE) * mmap.PAGESIZE
            os.ftruncate(self._file, self._bytes)
            self._memory = mmap.mmap(self._file, self._bytes)
        self._used = end
        self._layout.append((name, kind.str, shape, start))
        return np.ndarray(shape, kind, self._memory, start)

    def layout(self) -> bytes:
        """Return where the arrays of the batch are, for `SlotReader`."""
        return pickle.dumps((self._bytes, self._layout))


class SlotReader:
    """Maps a slot that another process writes.

    Args:
        file: the slot's file descriptor.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._known: bytes | None = None
        self._arrays: dict[str, NDArray[Any]] = {}
        self._bytes = 0
        self.memory: mmap.mmap | None = None

    def arrays(self, layout: bytes) -> tuple[dict[str, NDArray[Any]], bool]:
        """Return the arrays of the batch in the slot, and whether they are other memory than those before."""
        if layout == self._known:
            return self._arrays, False
        size, arrays = pickle.loads(layout)
        if size != self._bytes:
            self.memory, self._bytes = mmap.mmap(self._file, size), size
        self._arrays = {
            name: np.ndarray(shape, np.dtype(kind), self.memory, start) for name, kind, shape, start in arrays
        }
        self._known = layout
        return self._arrays, True
