"""The choice of pictures that are held out from training, to measure reconstructions on."""

from __future__ import annotations

import hashlib

from pipelines.shards.reader import ShardReader
from pipelines.stages.pairs.artifact import Place

# One picture in 64 is held out, up to 64 pictures.
HELD_OUT_SHARE = 64
HELD_OUT_LIMIT = 64


def held_out(reader: ShardReader) -> list[Place]:
    """Return (shard, row) of the pictures kept from training: one in 64 by hash of its key, the first 64 of them.

    A hash decides, so that a picture's fate depends neither on the order nor on what else is in the set. Shards after
    the 64th such picture are not read.
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
