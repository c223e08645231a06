"""Duplicate detection on tokens: exact by source bytes or URL, near by perceptual hash.

Every `ok` row gives a few *tokens*: digests of its bytes and of its URL and, for near duplicates, bands of its hash.
Only rows that share a token can be duplicates, so the tokens can be dealt out to any number of parts, each of which is
searched on its own. The result depends on row numbers, never on the order of arrival.

Hashes that differ in at most d bits agree, by the pigeonhole principle, in at least one of d + 1 bands; rows that share
a band are then compared bit by bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.stages.pairs.shard.outcome import DUPLICATE, NEAR_DUPLICATE, OK

HASH_BITS = 64
_USABLE = frozenset({OK, DUPLICATE, NEAR_DUPLICATE, "filtered:clip_score", "filtered:aesthetic_score"})
# `high` and `low` identify the token, `hash` is the whole perceptual hash (bands only), `rank` orders rows: the run in
# the high bits, the row in the low ones. So a row that is committed keeps its place, and a later retry that finds the
# same picture at a smaller row number counts as the duplicate.
_TOKEN = np.dtype([("high", "<u8"), ("low", "<u8"), ("rank", "<i8"), ("hash", "<u8")])
_RUN_SHIFT = 48
_ROW_MASK = (1 << _RUN_SHIFT) - 1
# The low half of every band's token. Exact tokens are halves of sha256: none has this value by chance.
_BAND = np.uint64(0xBA4D_BA4D_BA4D_BA4D)
_VERDICT = np.dtype([("row", "<i8"), ("of", "<i8"), ("near", "?")])
# Hashes compared at once: a boolean matrix of this many entries stays within some ten megabytes.
_COMPARISONS_AT_ONCE = 1 << 22

Tokens = NDArray[np.void]
Verdicts = NDArray[np.void]
NO_TOKENS: Tokens = np.empty(0, _TOKEN)
NO_VERDICTS: Verdicts = np.empty(0, _VERDICT)


def tokens_per_row(distance: int | None) -> int:
    """Return the largest number of tokens that one row gives."""
    return 2 + (0 if distance is None else distance + 1)


def make_tokens(
    rows: Sequence[int],
    digests: Sequence[str],
    urls: Sequence[str | None],
    hashes: Sequence[int | None],
    distance: int | None,
) -> Tokens:
    """Make the tokens of `ok` rows.

    Args:
        rows: row numbers in the source.
        digests: hexadecimal sha256 of the pictures' source bytes.
        urls: where the pictures come from; rows without a URL give no token for it.
        hashes: perceptual hashes (64 bits, signed); None for pictures that are nearly flat. Not used without
            `distance`.
        distance: bits in which near duplicates may differ; None if only exact ones count.
    """
    parts = [_exact([bytes.fromhex(digest) for digest in digests], rows)]
    known = [(hashlib.sha256(f"url {url}".encode()).digest(), row) for url, row in zip(urls, rows) if url is not None]
    parts.append(_exact([digest for digest, _ in known], [row for _, row in known]))
    if distance is not None:
        hashed = [(value, row) for value, row in zip(hashes, rows, strict=True) if value is not None]
        values = np.array([value for value, _ in hashed], np.int64).view(np.uint64)
        numbers = np.array([row for _, row in hashed], np.int64)
        parts += [_band(values, numbers, band, distance + 1) for band in range(distance + 1)]
    return np.concatenate(parts)


def tokens_of_table(table: pa.Table, distance: int | None) -> Tokens:
    """Make the tokens of a shard's usable rows, for shards that were staged or committed without them.

    Usable is what had a picture and a caption: also what was left out later, as a duplicate or for its score. It hides
    its copies as it did in its own run.
    """
    kept = table.filter([status in _USABLE for status in table.column("status").to_pylist()])
    return make_tokens(
        kept.column("row").to_pylist(),
        kept.column("sha256").to_pylist(),
        kept.column("url").to_pylist(),
        kept.column("phash").to_pylist() if distance is not None else [],
        distance,
    )


def token_columns(distance: int | None) -> list[str]:
    """Name the columns of a table that `tokens_of_table` needs."""
    return ["row", "status", "url", "sha256", *(["phash"] if distance is not None else [])]


def with_run(tokens: Tokens, run: int) -> Tokens:
    """Mark tokens as found in the first run (0) or in a retry (1, 2, …): rows of earlier runs rank first."""
    ranked = tokens.copy()
    ranked["rank"] += run << _RUN_SHIFT
    return ranked


def split(tokens: Tokens, parts: int) -> list[Tokens]:
    """Deal tokens out to parts, equal ones to the same part."""
    # Fibonacci hashing: the bands' high halves are small numbers, whose remainders alone would fill few parts.
    place = (tokens["high"] * np.uint64(0x9E37_79B9_7F4A_7C15) >> np.uint64(32)) % np.uint64(parts)
    return [tokens[place == part] for part in range(parts)]


def find_duplicates(tokens: Tokens, distance: int | None) -> Verdicts:
    """Find the rows that show what an earlier row shows.

    Returns:
        One verdict for each duplicate, sorted by row: `row`, the row it is a duplicate `of` (the earliest), and whether
        it is only `near`, by its hash. An exact match counts before a near one.
    """
    # By token, then by rank: equal tokens become a group whose first row is the earliest.
    tokens = tokens[np.lexsort((tokens["rank"], tokens["low"], tokens["high"]))]
    changes = (tokens["high"][1:] != tokens["high"][:-1]) | (tokens["low"][1:] != tokens["low"][:-1])
    starts = np.flatnonzero(np.concatenate([[True], changes])) if len(tokens) else np.empty(0, np.int64)
    sizes = np.diff(np.append(starts, len(tokens)))
    is_band = tokens["low"][starts] == _BAND
    # Rows with one digest are duplicates as they are: all but the first of their group.
    group_start = np.repeat(starts, sizes)
    later = (np.arange(len(tokens)) != group_start) & np.repeat(~is_band, sizes)
    found = [_verdicts(tokens["rank"][later], tokens["rank"][group_start[later]], near=False)]
    if distance is not None:
        # Rows that share a band may still differ in too many bits of the others.
        candidates = is_band & (sizes > 1)
        for start, size in zip(starts[candidates], sizes[candidates]):
            found.append(_near(tokens[start : start + size], distance))
    return merge(found)


def merge(verdicts: Sequence[Verdicts]) -> Verdicts:
    """Merge verdicts from several parts: one a row, an exact match before a near one, then the earliest row."""
    every = np.concatenate([NO_VERDICTS, *verdicts])
    every = every[np.lexsort((every["of"], every["near"], every["row"]))]
    first = np.concatenate([[True], every["row"][1:] != every["row"][:-1]]) if len(every) else np.empty(0, bool)
    return every[first]


def parts_for(rows: int, distance: int | None, tokens_per_part: int) -> int:
    """Return how many parts keep each part below a number of tokens."""
    return max(1, math.ceil(rows * tokens_per_row(distance) / tokens_per_part))


def _exact(digests: Sequence[bytes], rows: Sequence[int]) -> Tokens:
    tokens = np.zeros(len(digests), _TOKEN)
    # 128 bits of sha256 are enough: with 10^10 rows a collision has a probability of about 10^-19.
    halves = np.frombuffer(b"".join(digest[:16] for digest in digests), "<u8").reshape(-1, 2)
    tokens["high"], tokens["low"], tokens["rank"] = halves[:, 0], halves[:, 1], rows
    return tokens


def _band(hashes: NDArray[np.uint64], rows: NDArray[np.int64], band: int, bands: int) -> Tokens:
    first, last = HASH_BITS * band // bands, HASH_BITS * (band + 1) // bands
    tokens = np.zeros(len(hashes), _TOKEN)
    bits = (hashes >> np.uint64(first)) & np.uint64((1 << (last - first)) - 1)
    # The number of the band is part of the token: two bands with the same bits are no match.
    tokens["high"] = (bits << np.uint64(8)) ^ np.uint64(band)
    tokens["low"], tokens["rank"], tokens["hash"] = _BAND, rows, hashes
    return tokens


def _near(group: Tokens, distance: int) -> Verdicts:
    """Compare rows that share a band, in order of rank, with each other."""
    # Rows with equal hashes (mostly copies) are compared once: a thousand of them are not a million comparisons.
    hashes, firsts, inverse = np.unique(group["hash"], return_index=True, return_inverse=True)
    earliest = group["rank"][firsts]
    best = earliest.copy()
    step = max(1, _COMPARISONS_AT_ONCE // len(hashes))
    for start in range(0, len(hashes), step):
        differing_bits = np.bitwise_count(hashes[start : start + step, None] ^ hashes[None, :])
        ranks = np.where(differing_bits <= distance, earliest[None, :], np.iinfo(np.int64).max)
        best[start : start + step] = ranks.min(axis=1)
    of = best[inverse]
    later = of < group["rank"]
    return _verdicts(group["rank"][later], of[later], near=True)


def _verdicts(ranks: NDArray[np.int64], of: NDArray[np.int64], *, near: bool) -> Verdicts:
    verdicts = np.zeros(len(ranks), _VERDICT)
    verdicts["row"], verdicts["of"], verdicts["near"] = ranks & _ROW_MASK, of & _ROW_MASK, near
    return verdicts
