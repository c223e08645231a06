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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ldm_core.configs.model import config_to_dict
from pipelines.compute.tasks import chunks, for_each
from pipelines.conditions.config import Condition
from pipelines.conditions.kind import Encoder, Kind, Pair
from pipelines.conditions.kinds import kind_of
from pipelines.shards.format import ShardWriter, decode_json, read_shard
from pipelines.stages.autoencoder.artifact import first_stage_config
from pipelines.stages.latents.artifact import FORMAT_VERSION
from pipelines.stages.latents.config import LatentsConfig
from pipelines.stages.latents.statistics import statistics_name
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
        settings = {name: value for name, value in config.settings().items() if name != "condition"}
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
class Identity:
    """What a latents shard is known by: see `FileRecord`."""

    origin: str
    content: str | None


@dataclass(frozen=True)
class _Source:
    """A shard of another artifact, and how its latents are taken over: `same_bytes`, or under other keys."""

    storage: Storage
    record: FileRecord
    sums: FileRecord
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
        plan = [_Step(shard, files[shard].sha256, pending[shard], source).to_json() for shard, source in groups[number]]
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
            if name and better and (sums := files.get(statistics_name(record.name))) is not None:
                here[name] = _Source(storage, record, sums, same_bytes)
        if here:
            sizes = file_sizes(storage, [source.record.name for source in here.values()])
            found |= {name: each for name, each in here.items() if sizes.get(each.record.name) == each.record.bytes}
    return found


@dataclass(frozen=True)
class _Step:
    """A shard to take over: its name, the digest of its pairs shard, what it is known by, and where its latents lie."""

    shard: str
    pairs_sha256: str
    identity: Identity
    source: _Source

    def to_json(self) -> dict[str, Any]:
        source = self.source
        return {
            "shard": self.shard,
            "pairs_sha256": self.pairs_sha256,
            "identity": asdict(self.identity),
            "folder": source.storage.url,
            "record": source.record.model_dump(),
            "sums": source.sums.model_dump(),
            "same_bytes": source.same_bytes,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> _Step:
        record, sums = (FileRecord.model_validate(values[name]) for name in ("record", "sums"))
        source = _Source(Storage(values["folder"]), record, sums, values["same_bytes"])
        return cls(values["shard"], values["pairs_sha256"], Identity(**values["identity"]), source)


@dataclass(frozen=True)
class _Take:
    """Commits shards and their sums from other artifacts; without an encoder, their conditions as they are."""

    pairs: Artifact
    writer: ArtifactWriter
    kind: Kind
    encoder: Encoder | None

    def __call__(self, step: _Step) -> list[FileRecord]:
        """Commit one shard, and return the records; none if what was found is damaged or gone by now."""
        source, target = step.source, self.writer.storage
        sha256: str | None
        try:
            sums = source.storage.read_bytes(source.sums.name)
            if hashlib.sha256(sums).hexdigest() != source.sums.sha256:
                return []
            if source.same_bytes:
                source.storage.copy(source.record.name, target, step.shard)
                sha256 = source.record.sha256
            else:
                with source.storage.local_copy(source.record.name) as latents:
                    if sha256_file(latents) != source.record.sha256:
                        return []
                    sha256 = self._write_again(step, latents)
        except MissingFileError:
            return []
        target.write_bytes(statistics_name(step.shard), sums)
        identity = step.identity
        shard = self.writer.commit(
            step.shard, rows=source.record.rows, sha256=sha256, origin=identity.origin, content=identity.content
        )
        return [shard, self.writer.commit(statistics_name(step.shard), sha256=source.sums.sha256)]

    def _write_again(self, step: _Step, latents_path: Path) -> str | None:
        """Write latents under the keys and with the conditions of a pairs shard.

        Returns:
            Their sha256; None if another writer was quicker.
        """

        def write(path: Path) -> str:
            latents = read_shard(latents_path)
            with whole_shard(self.pairs, step.shard, step.pairs_sha256) as pairs_shard, ShardWriter(path) as shard:
                # As many in both: the digest of the samples is the same.
                for pair, latent in zip(read_shard(pairs_shard), latents, strict=True):
                    if self.encoder is not None:
                        condition = self.encoder.encode([Pair(pair["__key__"], decode_json(pair["json"]))])[0]
                    else:
                        condition = {name: latent[name] for name in self.kind.files}
                    files = {"latent.npy": latent["latent.npy"], **condition, "json": pair["json"]}
                    shard.add(pair["__key__"], files)
            return shard.sha256

        return self.writer.storage.write_once(step.shard, write)
