"""The pictures of the pairs as arrays: which of them are held out from training, and quick access to the others.

pixels: (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

import hashlib

from pipelines.shards.reader import ShardReader
from pipelines.stages.pairs.artifact import Place

HELD_OUT_SHARE = 64  # one in so many
HELD_OUT_LIMIT = 64


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
