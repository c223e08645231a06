"""The pictures of the pairs as arrays: which of them are held out from training, and quick access to the others.

pixels: (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import UserError
from pipelines.shards.format import IMAGE_EXTENSIONS, PAIRS_FORMAT, decode_image, image_of
from pipelines.shards.reader import ShardReader
from pipelines.store.ledger import Artifact

HELD_OUT_SHARE = 64  # one in so many
HELD_OUT_LIMIT = 64
CACHE_BYTES = 1 << 30

Place = tuple[int, int]


def open_pairs(pairs: Artifact) -> ShardReader:
    """A reader of the pairs' shards. Raises UserError for another stage, another format, or no samples at all."""
    reader = ShardReader(pairs.storage, pairs.require("pairs", PAIRS_FORMAT).shards())
    if not sum(reader.rows_per_shard):
        raise UserError(f"{pairs.storage.url} holds no samples: see its parquet files for what became of each row")
    return reader


def held_out(reader: ShardReader) -> list[Place]:
    """(shard, row) of the pictures kept from training: one in 64 by hash of the sample key, the first 64 of them.

    The hash decides, so that the choice depends neither on order nor on what else is in the set. Reads no more
    shards than it must.
    """
    found: list[Place] = []
    for shard, rows in enumerate(reader.rows_per_shard):
        if rows == 0:
            continue
        for row, key in enumerate(reader.keys(shard)):
            if int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % HELD_OUT_SHARE == 0:
                found.append((shard, row))
                if len(found) == HELD_OUT_LIMIT:
                    return found
    # A set of one picture can hold none out.
    return found if len(found) < sum(reader.rows_per_shard) else []


class Pictures:
    """Decoded pictures by (shard, row), kept in memory as long as they fit. Safe to use from several threads."""

    def __init__(self, reader: ShardReader, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._reader = reader
        self._room = cache_bytes
        self._kept: dict[Place, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def stack(self, places: Sequence[Place]) -> NDArray[np.uint8]:
        """(N, H, W, 3) uint8.

        Raises:
            UserError: where pictures differ in size.
        """
        pixels = [self.get(place) for place in places]
        if len(sizes := {picture.shape for picture in pixels}) > 1:
            raise UserError(
                f"pictures must have one size to be trained on, got {sorted(sizes)}: set pairs.resize=center_crop"
            )
        return np.stack(pixels)

    def get(self, place: Place) -> NDArray[np.uint8]:
        """(H, W, 3) uint8."""
        if (picture := self._kept.get(place)) is not None:
            return picture
        picture = decode_image(image_of(self._reader.read(*place, IMAGE_EXTENSIONS)))
        with self._lock:
            if picture.nbytes <= self._room and place not in self._kept:
                self._kept[place] = picture
                self._room -= picture.nbytes
        return picture
