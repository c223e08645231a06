"""A shard on its way through the operators of the encoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class DecodedShard:
    """A shard of pairs, decoded.

    Attributes:
        item: what is known of the shard; see `ReadShard`.
        keys: of its samples, in order.
        pictures: (views, samples, H, W, 3) uint8; None if its latents are in place, and need no encoding.
        facts: json of each sample.
        files: files of each sample by extension, without picture and json: the encoded condition, or those that it is
            encoded from.
    """

    item: dict[str, Any]
    keys: list[str] = field(default_factory=list)
    pictures: NDArray[np.uint8] | None = None
    facts: list[bytes] = field(default_factory=list)
    files: list[dict[str, bytes]] = field(default_factory=list)


@dataclass(frozen=True)
class EncodedShard:
    """A shard of pairs, encoded.

    Attributes:
        item, keys, facts: as decoded.
        moments: (views, samples, 2 or 1, C, h, w) float16, not all of them finite; None if its latents are in place.
        files: files of the encoded condition of each sample, by extension.
    """

    item: dict[str, Any]
    keys: list[str] = field(default_factory=list)
    moments: NDArray[np.float16] | None = None
    facts: list[bytes] = field(default_factory=list)
    files: list[dict[str, bytes]] = field(default_factory=list)
