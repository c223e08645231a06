"""The held-out split: the samples of a pairs artifact that nothing is trained on.

They are those whose content (the source's bytes, by their sha256) has the smallest hashes. The split is therefore a
function of the set of contents alone: neither the order of the source's rows, its files, the size of shards nor the
number of workers changes it, and a set that grows keeps most of it.

It is chosen when the pairs are summarised, before anything is trained, and kept in `held_out/N.parquet`: N counts the
retries, because a committed file is never replaced, and `details["held_out"]` names the file that holds. The latents
have a copy of it, with the rows of their own shards: these mirror those of the pairs, but for what cannot be encoded.
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import UserError
from pipelines.shards.order import Place
from pipelines.stages.pairs.shard.files import tar_name
from pipelines.stages.pairs.shard.outcome import OK
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact

# One sample in 64 is held out, up to 4,096 of them; of fewer than 64 samples none.
SHARE = 64
LIMIT = 4096
# A picture that is there more often stands for missing ones, and would fill the split alone.
MOST_COPIES = 16
# Not the content's own digest: sets that were cut by it elsewhere would be held out whole, or not at all.
_SALT = b"ldm held out:"
# Above every hexadecimal digest.
_ABOVE_ALL = "g"


class HeldOutSample(NamedTuple):
    """A held-out sample.

    Attributes:
        hash: the salted sha256 of its content, hexadecimal; samples are held out in ascending order of it.
        shard: the name of its tar.
        row: its position in the tar.
        key: its key in the tar.
    """

    hash: str
    shard: str
    row: int
    key: str


class SmallestContents:
    """The contents with the smallest hashes that were added, LIMIT of them at most, each with its samples.

    Two of them can be merged, so that shards are looked at in parts, each in bounded memory.
    """

    def __init__(self, samples: Iterable[HeldOutSample] = ()) -> None:
        self._samples: dict[str, list[HeldOutSample]] = {}
        self._above = _ABOVE_ALL
        self.merge(samples)

    def add(self, shard: int, table: pa.Table) -> None:
        """Add the samples of one shard: its table, whose `ok` lines are in the order of its tars."""
        good = table.filter(pc.equal(table.column("status"), OK))
        contents = pc.coalesce(good.column("sha256"), good.column("url")).to_pylist()
        buckets = good.column("bucket").to_pylist() if "bucket" in good.column_names else [None] * len(contents)
        rows = Counter[str | None]()
        for content, key, bucket in zip(contents, good.column("key").to_pylist(), buckets, strict=True):
            if (digest := content_hash(content)) < self._above:
                self._keep(HeldOutSample(digest, tar_name(shard, bucket), rows[bucket], key))
            rows[bucket] += 1
        # Only once twice as many are kept: to sort after every table would cost more than to keep the rest.
        self._forget(2 * LIMIT)

    def merge(self, samples: Iterable[HeldOutSample]) -> None:
        """Add what another one has kept, of other shards."""
        for sample in samples:
            self._keep(sample)
        self._forget(2 * LIMIT)

    def kept(self) -> list[HeldOutSample]:
        """Return the samples that `merge` takes."""
        self._forget(LIMIT)
        return [sample for samples in self._samples.values() for sample in samples]

    def choose(self, count: int) -> list[HeldOutSample]:
        """Return the samples to hold out of `count`, by ascending hash.

        Of the contents with the smallest hashes, as many as one sample in SHARE comes to. Samples of equal content are
        held out together or not at all: a content is passed over if it has too many.
        """
        most = min(LIMIT, count // SHARE)
        chosen: list[HeldOutSample] = []
        for digest in heapq.nsmallest(most, self._samples):
            samples = self._samples[digest]
            if len(samples) <= min(MOST_COPIES, most - len(chosen)):
                chosen += sorted(samples)
        return chosen

    def _keep(self, sample: HeldOutSample) -> None:
        samples = self._samples.setdefault(sample.hash, [])
        # One more than counts: enough to know that there are too many.
        if len(samples) <= MOST_COPIES:
            samples.append(sample)

    def _forget(self, most: int) -> None:
        """Forget all contents but the first LIMIT, if there are more than `most`."""
        if len(self._samples) > most:
            smallest = heapq.nsmallest(LIMIT, self._samples)
            self._samples = {digest: self._samples[digest] for digest in smallest}
            # Just above the last one kept: contents of that hash have more samples to come.
            self._above = smallest[-1] + _ABOVE_ALL


def content_hash(content: str) -> str:
    """Return the hexadecimal hash that decides about a content: the sha256 of the source's bytes, or their URL."""
    return hashlib.sha256(_SALT + content.encode()).hexdigest()


def commit_held_out(writer: ArtifactWriter, number: int, samples: Iterable[HeldOutSample]) -> str:
    """Commit the split of a pairs artifact after a number of retries, and return the file's name."""
    name = f"held_out/{number}.parquet"
    writer.commit_once(name, lambda path: _write(samples, path))
    return name


def _write(samples: Iterable[HeldOutSample], path: Path) -> None:
    columns = {
        "shard": pa.string(),
        "row": pa.int64(),
        "key": pa.string(),
        "hash": pa.string(),
    }
    table = pa.Table.from_pylist([sample._asdict() for sample in samples], pa.schema(list(columns.items())))
    pq.write_table(table, path, compression="zstd", store_schema=False)


def copy_held_out(
    pairs: Artifact, writer: ArtifactWriter, left_out: Mapping[str, Collection[int]] | None = None
) -> str:
    """Commit the split of the pairs to an artifact whose shards mirror theirs, and return the file's name.

    Args:
        pairs: the finished artifact of the pairs.
        writer: the other artifact.
        left_out: by the name of a shard the rows of it that the other artifact lacks.
    """
    name: str = pairs.details["held_out"]
    if left_out and any(left_out.values()):
        samples = _without(held_out_samples(pairs), left_out)
        writer.commit_once(name, lambda path: _write(samples, path))
    else:
        writer.commit_once(name, lambda path: path.write_bytes(pairs.storage.read_bytes(name)))
    return name


def _without(samples: Iterable[HeldOutSample], left_out: Mapping[str, Collection[int]]) -> Iterator[HeldOutSample]:
    """Yield the samples that are there, each with its row among those that are."""
    rows = {shard: sorted(found) for shard, found in left_out.items()}
    for sample in samples:
        gone = rows.get(sample.shard, [])
        before = bisect.bisect_left(gone, sample.row)
        if gone[before : before + 1] != [sample.row]:
            yield sample._replace(row=sample.row - before)


def held_out_samples(artifact: Artifact) -> list[HeldOutSample]:
    """Read which samples of a pairs or latents artifact are held out, by ascending hash.

    Raises:
        UserError: the file that says so is missing or damaged.
    """
    name = artifact.details["held_out"]
    try:
        lines: list[dict[str, Any]] = pq.read_table(pa.BufferReader(artifact.storage.read_bytes(name))).to_pylist()
        return [HeldOutSample(**line) for line in lines]
    except (pa.ArrowException, TypeError) as error:
        raise UserError(
            f"{artifact.storage.url}/{name} is not a table of held-out samples ({error}): it was damaged after it was "
            f"committed; rebuild it with `ldm run RECIPE --force {artifact.stage}`"
        ) from error


def held_out_places(artifact: Artifact) -> list[Place]:
    """Read the places of the held-out samples among the artifact's shards, by ascending hash. Raises as above."""
    samples, files = held_out_samples(artifact), artifact.files
    shards = files.positions()
    places = ((files.position(sample.shard), sample.row) for sample in samples)
    # Latents leave out a shard that could not be encoded.
    return [(int(shards.searchsorted(position)), row) for position, row in places if position is not None]
