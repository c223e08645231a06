"""Which rows show a picture that was there before: exactly, by source bytes or URL, or nearly, by perceptual hash.

Every `ok` row gives a few *tokens*: digests of its bytes and of its URL, and, for near duplicates, bands of its hash.
Rows can only be duplicates of each other if they share a token, so that tokens may be dealt out to any number of
parts, each of which is looked through on its own. The answer depends on row numbers, not on the order of arrival.

Hashes within a distance of d bits agree, by the pigeonhole principle, in at least one of d + 1 bands; those that do are
compared bit by bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.stages.pairs.shard.files import read_table
from pipelines.stages.pairs.shard.outcome import OK
from pipelines.stages.pairs.shard.staged import read_made
from pipelines.store.storage import Storage

HASH_BITS = 64
# `rank` orders rows: rows of an earlier round stay where a later round finds the same picture.
_TOKEN = np.dtype([("high", "<u8"), ("low", "<u8"), ("rank", "<i8"), ("hash", "<u8")])
_ROUND_SHIFT = 48
# The low half of a band's token; the digest of a URL or a file is not this one by chance.
_BAND = np.uint64(0xBA4D_BA4D_BA4D_BA4D)
_VERDICT = np.dtype([("row", "<i8"), ("of", "<i8"), ("near", "?")])
_ROW_MASK = (1 << _ROUND_SHIFT) - 1
# Pairs of hashes compared at once.
_COMPARED = 1 << 22

Tokens = NDArray[np.void]
Verdicts = NDArray[np.void]
NO_VERDICTS: Verdicts = np.empty(0, _VERDICT)


@dataclass(frozen=True)
class Shards:
    """Shards of one round: published ones in the artifact's folder, or those in the making in its work folder."""

    folder: Storage
    numbers: Sequence[int]
    round: int = 0
    in_the_making: bool = False

    def read(self, shard: int, columns: list[str]) -> Any:
        """Columns of a shard's table."""
        folder = read_made(self.folder, shard).folder if self.in_the_making else self.folder
        return read_table(folder, shard, columns)


def tokens_a_row(distance: int | None) -> int:
    return 2 + (0 if distance is None else distance + 1)


def read_tokens(shards: Shards, distance: int | None) -> Tokens:
    """The tokens of all `ok` rows.

    Args:
        distance: bits in which near duplicates may differ; None where only exact ones count.
    """
    columns = ["row", "status", "url", "sha256", *(["phash"] if distance is not None else [])]
    parts = [np.empty(0, _TOKEN)]
    for shard in shards.numbers:
        table = shards.read(shard, columns)
        kept = table.filter([status == OK for status in table.column("status").to_pylist()])
        ranks = kept.column("row").to_numpy() + (shards.round << _ROUND_SHIFT)
        digests = [bytes.fromhex(value) for value in kept.column("sha256").to_pylist()]
        parts.append(_exact(digests, ranks))
        urls = [(url, rank) for url, rank in zip(kept.column("url").to_pylist(), ranks) if url is not None]
        parts.append(_exact([hashlib.sha256(f"url {url}".encode()).digest() for url, _ in urls], [r for _, r in urls]))
        if distance is not None:
            known = kept.filter(kept.column("phash").is_valid())
            hashes = known.column("phash").to_numpy().astype(np.int64).view(np.uint64)
            ranks = known.column("row").to_numpy() + (shards.round << _ROUND_SHIFT)
            parts += [_band(hashes, ranks, band, distance + 1) for band in range(distance + 1)]
    return np.concatenate(parts)


def split(tokens: Tokens, parts: int) -> list[Tokens]:
    """Deal tokens out, equal ones to the same part."""
    place = (tokens["high"] * np.uint64(0x9E37_79B9_7F4A_7C15) >> np.uint64(32)) % np.uint64(parts)
    return [tokens[place == part] for part in range(parts)]


def find_duplicates(tokens: Tokens, distance: int | None) -> Verdicts:
    """Rows (`row`) with an earlier row (`of`, the earliest) of the same bytes or URL, or `near`, of a similar hash.

    Sorted by row; one line a row, and an exact match counts before a near one.
    """
    tokens = tokens[np.lexsort((tokens["rank"], tokens["low"], tokens["high"]))]
    starts = np.flatnonzero(
        np.concatenate(
            [[True], (tokens["high"][1:] != tokens["high"][:-1]) | (tokens["low"][1:] != tokens["low"][:-1])]
        )
        if len(tokens)
        else np.empty(0, bool)
    )
    sizes = np.diff(np.append(starts, len(tokens)))
    banded = tokens["low"][starts] == _BAND
    found = [NO_VERDICTS]
    groups = np.repeat(starts, sizes)
    later = (np.arange(len(tokens)) != groups) & (np.repeat(~banded, sizes))
    found.append(_verdicts(tokens["rank"][later], tokens["rank"][groups[later]], near=False))
    if distance is not None:
        for start, size in zip(starts[banded & (sizes > 1)], sizes[banded & (sizes > 1)]):
            found.append(_near(tokens[start : start + size], distance))
    return merge([np.concatenate(found)])


def merge(verdicts: Sequence[Verdicts]) -> Verdicts:
    """Verdicts on the same rows, from several parts, made one."""
    every = np.concatenate([NO_VERDICTS, *verdicts])
    every = every[np.lexsort((every["of"], every["near"], every["row"]))]
    first = np.concatenate([[True], every["row"][1:] != every["row"][:-1]]) if len(every) else np.empty(0, bool)
    return every[first]


def parts_for(rows: int, distance: int | None, tokens_a_part: int) -> int:
    """How many parts keep each below a number of tokens."""
    return max(1, math.ceil(rows * tokens_a_row(distance) / tokens_a_part))


def _exact(digests: Sequence[bytes], ranks: Sequence[int] | NDArray[np.int64]) -> Tokens:
    tokens = np.zeros(len(digests), _TOKEN)
    halves = np.frombuffer(b"".join(digest[:16] for digest in digests), "<u8").reshape(-1, 2)
    tokens["high"], tokens["low"], tokens["rank"] = halves[:, 0], halves[:, 1], ranks
    return tokens


def _band(hashes: NDArray[np.uint64], ranks: NDArray[np.int64], band: int, bands: int) -> Tokens:
    first, last = HASH_BITS * band // bands, HASH_BITS * (band + 1) // bands
    tokens = np.zeros(len(hashes), _TOKEN)
    bits = (hashes >> np.uint64(first)) & np.uint64((1 << (last - first)) - 1)
    # Two bands of the same value are not the same token.
    tokens["high"] = (bits << np.uint64(8)) ^ np.uint64(band)
    tokens["low"], tokens["rank"], tokens["hash"] = _BAND, ranks, hashes
    return tokens


def _near(group: Tokens, distance: int) -> Verdicts:
    """Verdicts among rows that share a band, in order of rank."""
    # Rows of one hash (copies, mostly) are compared once.
    hashes, firsts, places = np.unique(group["hash"], return_index=True, return_inverse=True)
    earliest = group["rank"][firsts]
    best = earliest.copy()
    step = max(1, _COMPARED // len(hashes))
    for start in range(0, len(hashes), step):
        chunk = hashes[start : start + step, None] ^ hashes[None, :]
        similar = np.bitwise_count(chunk) <= distance
        ranks = np.where(similar, earliest[None, :], np.iinfo(np.int64).max)
        best[start : start + step] = ranks.min(axis=1)
    of = best[places]
    later = of < group["rank"]
    return _verdicts(group["rank"][later], of[later], near=True)


def _verdicts(ranks: NDArray[np.int64], of: NDArray[np.int64], *, near: bool) -> Verdicts:
    verdicts = np.zeros(len(ranks), _VERDICT)
    verdicts["row"], verdicts["of"], verdicts["near"] = ranks & _ROW_MASK, of & _ROW_MASK, near
    return verdicts
