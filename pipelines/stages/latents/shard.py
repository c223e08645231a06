"""A shard of latents, and what is kept beside it: the index of its files, and the statistics of its latents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import UserError
from pipelines.shards.format import decode_npy, read_shard
from pipelines.shards.index import MOST_INDEX_BYTES, ShardIndex, index_name, scan_shard
from pipelines.shards.tar_headers import TarError
from pipelines.stages.latents.encoding.names import latent_files
from pipelines.stages.latents.statistics import ShardStatistics, statistics_name
from pipelines.stages.pairs.artifact import whole_shard
from pipelines.store.commits import ArtifactWriter
from pipelines.store.file_table import FileRecord, FileTable
from pipelines.store.ledger import Artifact
from pipelines.store.storage import encode_json, sha256_file


@dataclass(frozen=True)
class Identity:
    """What a latents shard is known by: see `FileRecord`."""

    origin: str | None
    content: str | None


@dataclass(frozen=True)
class Written:
    """What is known of a shard once it is written; `index` has the json of its samples.

    `sha256` is None if nobody has computed it.
    """

    sha256: str | None
    index: ShardIndex
    statistics: ShardStatistics


@dataclass(frozen=True)
class Committed:
    """The records of a shard and of what is kept beside it."""

    records: list[FileRecord]
    statistics: ShardStatistics


def complete_shards(committed: FileTable) -> set[str]:
    """Return the shards that are committed, and all that is kept beside them."""
    shards = committed.shards().names
    beside = (committed.holds(map(name_of, shards)) for name_of in (index_name, statistics_name))
    return {shard for shard, *are_there in zip(shards, *beside, strict=True) if all(are_there)}


def _names(shard: str) -> tuple[str, str, str]:
    return shard, index_name(shard), statistics_name(shard)


@dataclass(frozen=True)
class ShardCommit:
    """Commits one shard of latents.

    Attributes:
        pairs: the finished artifact of the pairs.
        writer: the artifact of latents being made.
        shard: name of the shard, the same in both.
        pairs_sha256: of the pairs shard, as committed.
        pairs_rows: samples in the pairs shard.
        identity: what the latents are known by.
    """

    pairs: Artifact
    writer: ArtifactWriter
    shard: str
    pairs_sha256: str
    pairs_rows: int
    identity: Identity

    def __call__(self, write: Callable[[Path], Written]) -> Committed:
        """Commit the shard, its index and its statistics, as far as they are not committed.

        A file that stands already is never replaced, whatever `write` would have made of it, and index and statistics
        are always those of the file that stands.

        Args:
            write: writes the shard to the path that it is given.

        Raises:
            UserError: as `write` does; the shard that stands is damaged; or an index is committed of another one.
        """
        names, written = _names(self.shard), None
        # Looked up again: Ray repeats what a dead worker had finished.
        if all(map(self.writer.is_committed, names)):
            statistics = ShardStatistics.from_json(self.writer.storage.read_json(statistics_name(self.shard)))
            return Committed([self.writer.commit(name) for name in names], statistics)
        if not self.writer.is_committed(self.shard):
            # There may be two writers of one shard, where a node was taken for dead, and on another kind of GPU the
            # last bits differ: the first file stands.
            written = self.writer.storage.write_once(self.shard, write)
        return self.of(written or self._read_back())

    def of(self, written: Written) -> Committed:
        """Commit a shard that is in place, and what is kept beside it. Raises as above."""
        records = [
            self.writer.commit(
                self.shard,
                rows=len(written.index),
                sha256=written.sha256,
                origin=self.identity.origin,
                content=self.identity.content,
            )
        ]
        if written.sha256 is not None:
            self._require(self.shard, records[0], written.sha256)
        beside = {
            index_name(self.shard): self._encoded(written.index),
            statistics_name(self.shard): encode_json(written.statistics.to_json()),
        }
        records += [self._commit_beside(name, data) for name, data in beside.items()]
        return Committed(records, written.statistics)

    def _encoded(self, index: ShardIndex) -> bytes:
        data = index.encode()
        # No reader would take it.
        if len(data) > MOST_INDEX_BYTES:
            raise UserError(
                f"the captions and other facts of the {len(index)} samples of {self.shard} take {len(data) >> 20} MiB, "
                f"more than {MOST_INDEX_BYTES >> 20}: set pairs.rows_per_shard lower"
            )
        return data

    def _commit_beside(self, name: str, data: bytes) -> FileRecord:
        if not self.writer.is_committed(name):
            self.writer.storage.write_bytes(name, data)
        digest = hashlib.sha256(data).hexdigest()
        record = self.writer.commit(name, sha256=digest)
        self._require(name, record, digest)
        return record

    def _require(self, name: str, record: FileRecord, digest: str) -> None:
        """Refuse a file that was committed with other bytes than stand there, or go with the shard, now."""
        if record.sha256 != digest:
            url = self.writer.storage.url
            raise UserError(
                f"{url}/{name} is committed, but not of the {self.shard} that is there: that was damaged or replaced? "
                f"Run `ldm run RECIPE --force latents` to rebuild all of {url}"
            )

    def _read_back(self) -> Written:
        """Return what is known of the shard that another writer has put there."""
        storage, statistics = self.writer.storage, ShardStatistics()
        with storage.local_copy(self.shard) as path:
            try:
                with open(path, "rb") as file:
                    index = scan_shard(file, checksums=True)
            except TarError as error:
                raise UserError(
                    f"{storage.url}/{self.shard} is not a whole tar ({error}): remove it and run the same command again"
                ) from error
            sha256 = sha256_file(path)
            for sample in read_shard(path):
                for latent in latent_files(sample).values():
                    statistics.add(sample["__key__"], decode_npy(latent))
        facts, encoded = [], set(index.keys)
        with whole_shard(self.pairs, self.shard, self.pairs_sha256) as path:
            for row, pair in enumerate(read_shard(path)):
                if pair["__key__"] in encoded:
                    facts.append(pair["json"])
                else:
                    statistics.unencodable[pair["__key__"]] = row
        if len(facts) != len(index):
            raise UserError(
                f"{storage.url}/{self.shard} holds samples that its pairs do not: remove it and run the same command "
                "again"
            )
        return Written(sha256, index.with_facts(facts), statistics)
