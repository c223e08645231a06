"""Latents that an earlier artifact under the same root holds already: taken over instead of encoded.

A latents shard is known by its *origin*, a digest of the pairs shard, the first stage, the condition and the config.
Where the origin is the same the bytes are, so that a link or a copy by the store is enough. It is also known by its
*content*, a digest of the pictures and captions and of the first stage. Where only that is the same (the samples have
other keys, since data before them was added or reordered, or the condition is another one), the latents are written
again, beside new tokens for example: without decoding a picture, and without the first stage. What is not as quickly
made as tokens are is taken over with the latents; then the content stands for the condition too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ldm_core.configs.model import config_to_dict
from pipelines.compute.tasks import chunks, for_each
from pipelines.conditions.config import Condition
from pipelines.conditions.kind import Encoder, Kind, Pair
from pipelines.conditions.kinds import kind_of
from pipelines.shards.format import ShardWriter, decode_json, read_shard
from pipelines.shards.index import IndexBuilder, ShardIndex, index_name
from pipelines.stages.autoencoder.artifact import first_stage_config
from pipelines.stages.latents.artifact import FORMAT_VERSION
from pipelines.stages.latents.config import LatentsConfig
from pipelines.stages.latents.encoding.names import latent_files
from pipelines.stages.latents.shard import Identity, ShardCommit, Written
from pipelines.stages.latents.statistics import ShardStatistics, statistics_name
from pipelines.stages.pairs.artifact import whole_shard
from pipelines.store.commits import ArtifactWriter, file_sizes
from pipelines.store.failures import MissingFileError
from pipelines.store.file_table import FileRecord, FileTable
from pipelines.store.ledger import WORK, Artifact, digest_json
from pipelines.store.storage import Storage, sha256_file
from pipelines.store.threads import map_in_threads

SHARDS_PER_TASK = 256


@dataclass(frozen=True)
class Encoding:
    """All that decides the bytes of a latents shard besides the pairs shard itself.

    Attributes:
        pictures: digest of what decides the latents.
        condition: digest of what decides the files of the condition.
        condition_again: whether these are quickly made again.
    """

    pictures: str
    condition: str
    condition_again: bool

    @classmethod
    def of(cls, first_stage: Artifact, config: LatentsConfig, storage: Storage) -> Encoding:
        """Return it for an artifact of latents, whose files of the condition are prepared."""
        # Settings that came later are left out as they are by default, as they are in keys.
        settings = {"batch_size": config.batch_size, "precision": config.precision} | config.identity()
        del settings["condition"]
        pictures = {
            "format_version": FORMAT_VERSION,
            "first_stage": config_to_dict(first_stage_config(first_stage)),
            "weights": first_stage.details["encoder_sha256"],
            "config": settings,
        }
        kind = kind_of(config.condition)
        condition = digest_json([config.condition.kind, kind.digest(storage)])
        return cls(digest_json(pictures), condition, kind.from_facts)

    def identify(self, pairs_shard: FileRecord) -> Identity:
        """Return what the latents of a pairs shard are known by."""
        kept = [] if self.condition_again else [self.condition]
        content = digest_json([self.pictures, *kept, pairs_shard.content]) if pairs_shard.content else None
        return Identity(digest_json([self.pictures, self.condition, pairs_shard.sha256]), content)


@dataclass(frozen=True)
class _Source:
    """A shard of another artifact, and how its latents are taken over: `same_bytes`, or under other keys."""

    storage: Storage
    record: FileRecord
    index: FileRecord
    statistics: FileRecord
    same_bytes: bool


def take_over(
    pairs: Artifact,
    pending: Mapping[str, Identity],
    siblings: Iterable[tuple[Storage, FileTable]],
    writer: ArtifactWriter,
    condition: Condition,
    check: Callable[[], None],
) -> Iterator[FileRecord]:
    """Take over what other artifacts hold of the pending shards; yield the records of the files committed.

    Args:
        pairs: the finished artifact of the pairs.
        pending: the shards that are not committed, by name.
        siblings: folders and files of the other latents artifacts.
        writer: the artifact of latents being made.
        condition: the recipe's; what it needs once for all samples is committed.
        check: whatever it raises ends the work.
    """
    found = _find(pending, siblings)
    if not found:
        return
    # Each task reads the part that concerns it: sent along, the plan would go to every task as a whole.
    place, groups = writer.storage / WORK / "takeover", list(chunks(sorted(found.items()), SHARDS_PER_TASK))

    def write_plan(number: int) -> None:
        files = pairs.files
        plan = [_Step(files[shard], pending[shard], source).to_json() for shard, source in groups[number]]
        place.write_json(_plan_name(number), plan)

    list(map_in_threads(write_plan, range(len(groups))))
    take_group = partial(_take_group, pairs, writer, condition, place)
    for records in for_each(take_group, range(len(groups)), check):
        yield from map(FileRecord.model_validate, records)
    place.remove()


def _plan_name(number: int) -> str:
    return f"{number:06d}.json"


def _take_group(
    pairs: Artifact, writer: ArtifactWriter, condition: Condition, place: Storage, number: int
) -> list[dict[str, object]]:
    """Take over the shards of one plan; return the records of the files committed."""
    kind = kind_of(condition)
    take = _Take(pairs, writer, kind, kind.encoder(writer.storage, "cpu", None) if kind.from_facts else None)
    steps = map(_Step.from_json, place.read_json(_plan_name(number)))
    return [record.model_dump() for step in steps for record in take(step)]


def _find(pending: Mapping[str, Identity], siblings: Iterable[tuple[Storage, FileTable]]) -> dict[str, _Source]:
    """Return where the latents of pending shards lie, by shard; equal bytes are preferred."""
    by_origin = {identity.origin: name for name, identity in pending.items()}
    by_content = {identity.content: name for name, identity in pending.items() if identity.content}
    found: dict[str, _Source] = {}
    for storage, files in siblings:
        here: dict[str, _Source] = {}
        for record in files.shards():
            name = by_origin.get(record.origin or "")
            same_bytes = name is not None
            name = name or by_content.get(record.content or "")
            better = name is not None and (name not in found or (same_bytes and not found[name].same_bytes))
            if not name or not better:
                continue
            index, statistics = files.get(index_name(record.name)), files.get(statistics_name(record.name))
            if index and statistics:
                here[name] = _Source(storage, record, index, statistics, same_bytes)
        if here:
            sizes = file_sizes(storage, [source.record.name for source in here.values()])
            found |= {name: each for name, each in here.items() if sizes.get(each.record.name) == each.record.bytes}
    return found


@dataclass(frozen=True)
class _Step:
    """A shard to take over: the record of its pairs shard, what it is known by, and where its latents lie."""

    pairs_shard: FileRecord
    identity: Identity
    source: _Source

    def to_json(self) -> dict[str, Any]:
        source = self.source
        return {
            "pairs_shard": self.pairs_shard.model_dump(),
            "identity": asdict(self.identity),
            "folder": source.storage.url,
            "record": source.record.model_dump(),
            "index": source.index.model_dump(),
            "statistics": source.statistics.model_dump(),
            "same_bytes": source.same_bytes,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> _Step:
        names = ("pairs_shard", "record", "index", "statistics")
        pairs_shard, record, index, statistics = (FileRecord.model_validate(values[name]) for name in names)
        source = _Source(Storage(values["folder"]), record, index, statistics, values["same_bytes"])
        return cls(pairs_shard, Identity(**values["identity"]), source)


class _Damaged(Exception):
    """What was found in another artifact is not what it has committed."""


@dataclass(frozen=True)
class _Take:
    """Commits shards, their indexes and their statistics from other artifacts; without an encoder, their conditions as
    they are.
    """

    pairs: Artifact
    writer: ArtifactWriter
    kind: Kind
    encoder: Encoder | None

    def __call__(self, step: _Step) -> list[FileRecord]:
        """Commit one shard, and return the records; none if what was found is damaged or gone by now."""
        source, shard = step.source, step.pairs_shard
        commit = ShardCommit(self.pairs, self.writer, shard.name, shard.sha256, shard.rows, step.identity)
        try:
            statistics = ShardStatistics.from_json(json.loads(_read(source, source.statistics)))
            if source.same_bytes:
                # Not written once: a link or a copy by the store.
                source.storage.copy(source.record.name, self.writer.storage, shard.name)
                index = ShardIndex.decode(_read(source, source.index), shard_bytes=source.record.bytes, facts=True)
                return commit.of(Written(source.record.sha256, index, statistics)).records
            with source.storage.local_copy(source.record.name) as latents:
                if sha256_file(latents) != source.record.sha256:
                    raise _Damaged
                return commit(partial(self._write_again, step, latents, statistics)).records
        except (MissingFileError, _Damaged):
            return []

    def _write_again(self, step: _Step, latents_path: Path, statistics: ShardStatistics, path: Path) -> Written:
        """Write latents under the keys and with the conditions of a pairs shard."""
        index, facts, latents = IndexBuilder(), list[bytes](), read_shard(latents_path)
        missing, unencodable = set(statistics.unencodable.values()), {}
        with (
            whole_shard(self.pairs, step.pairs_shard.name, step.pairs_shard.sha256) as pairs_shard,
            ShardWriter(path, index) as shard,
        ):
            for row, pair in enumerate(read_shard(pairs_shard)):
                if row in missing:
                    unencodable[pair["__key__"]] = row
                    continue
                # There is one for each: the digest of the samples is the same.
                latent = next(latents)
                if self.encoder is not None:
                    condition = self.encoder.encode([Pair(pair["__key__"], decode_json(pair["json"]))])[0]
                else:
                    condition = {name: latent[name] for name in self.kind.files}
                shard.add(pair["__key__"], {**latent_files(latent), **condition})
                facts.append(pair["json"])
        return Written(shard.sha256, index.index().with_facts(facts), replace(statistics, unencodable=unencodable))


def _read(source: _Source, record: FileRecord) -> bytes:
    """Read a small file of another artifact, which must be what was committed."""
    data = source.storage.read_bytes(record.name)
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise _Damaged
    return data
