"""Latents that an earlier artifact under the same root holds already: taken over instead of encoded.

A latents shard is known by its *origin*, a digest of the pairs shard, the first stage, the tokenizer and the config.
Where the origin is the same the bytes are, so that a link or a copy by the store is enough. It is also known by its
*content*, a digest of the pictures and captions and of the first stage. Where only that is the same (the samples have
other keys, since data before them was added or reordered, or the vocabulary is another one), the latents are written
again beside new tokens: without decoding a picture, and without the first stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ldm_core.configs.model import config_to_dict
from ldm_core.tokenizers.tokenizer import Tokenizer
from pipelines.compute.tasks import chunks, for_each
from pipelines.errors import UserError
from pipelines.shards.format import ShardWriter, encode_npy, read_shard
from pipelines.stages.autoencoder.artifact import first_stage_config
from pipelines.stages.latents.artifact import FORMAT_VERSION
from pipelines.stages.latents.config import LatentsConfig, TokenizerConfig
from pipelines.stages.latents.statistics import statistics_name
from pipelines.stages.latents.vocabulary import load_vocabulary
from pipelines.stages.pairs.artifact import sample_captions
from pipelines.store.commits import file_sizes
from pipelines.store.failures import MissingFileError
from pipelines.store.file_table import FileRecord, FileTable
from pipelines.store.ledger import Artifact, ArtifactWriter, digest_json
from pipelines.store.storage import Storage, sha256_file

SHARDS_PER_TASK = 64


@dataclass(frozen=True)
class Encoding:
    """All that decides the bytes of a latents shard besides the pairs shard itself.

    Attributes:
        pictures: digest of what decides the latents.
        captions: digest of what decides the tokens.
    """

    pictures: str
    captions: str

    @classmethod
    def of(cls, first_stage: Artifact, tokenizer: Tokenizer, config: LatentsConfig) -> Encoding:
        settings = {name: value for name, value in config.settings().items() if name != "tokenizer"}
        pictures = {
            "format_version": FORMAT_VERSION,
            "first_stage": config_to_dict(first_stage_config(first_stage)),
            "weights": first_stage.details["encoder_sha256"],
            "config": settings,
        }
        return cls(digest_json(pictures), digest_json([tokenizer.digest, tokenizer.max_length]))

    def identify(self, pairs_shard: FileRecord) -> Identity:
        """Return what the latents of a pairs shard are known by."""
        content = digest_json([self.pictures, pairs_shard.content]) if pairs_shard.content else None
        return Identity(digest_json([self.pictures, self.captions, pairs_shard.sha256]), content)


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
    tokenizer: TokenizerConfig,
    check: Callable[[], None],
) -> Iterator[FileRecord]:
    """Take over what other artifacts hold of the pending shards; yield the records of the files committed.

    Args:
        pairs: the finished artifact of the pairs.
        pending: the shards that are not committed, by name.
        siblings: folders and files of the other latents artifacts.
        writer: the artifact of latents being made.
        tokenizer: the tokenizer's section of the recipe; its vocabulary is committed.
        check: whatever it raises ends the work.
    """
    found = _find(pending, siblings)
    if not found:
        return
    groups = list(chunks(sorted(found.items()), SHARDS_PER_TASK))
    group_files = [[(name, source, pending[name]) for name, source in group] for group in groups]

    def take_group(number: int) -> list[dict[str, object]]:
        take, records = _Take(pairs, writer, load_vocabulary(writer.storage, tokenizer)), []
        for name, source, identity in group_files[number]:
            # `ldm gc` may remove an artifact of no more use at any time.
            with contextlib.suppress(MissingFileError):
                records += take(name, source, identity)
        return [record.model_dump() for record in records]

    for records in for_each(take_group, range(len(groups)), check):
        yield from map(FileRecord.model_validate, records)


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
class _Take:
    """Commits shards and their sums from other artifacts."""

    pairs: Artifact
    writer: ArtifactWriter
    tokenizer: Tokenizer

    def __call__(self, name: str, source: _Source, identity: Identity) -> list[FileRecord]:
        """Commit one shard, and return the records; none if what was found turns out to be damaged."""
        target = self.writer.storage
        if source.same_bytes:
            source.storage.copy(source.record.name, target, name)
            sha256 = source.record.sha256
        elif (written := self._write_again(name, source)) is not None:
            sha256 = written
        else:
            return []
        source.storage.copy(source.sums.name, target, statistics_name(name))
        shard = self.writer.commit(
            name, rows=source.record.rows, sha256=sha256, origin=identity.origin, content=identity.content
        )
        return [shard, self.writer.commit(statistics_name(name), sha256=source.sums.sha256)]

    def _write_again(self, name: str, source: _Source) -> str | None:
        """Write latents under the keys and with the captions of a pairs shard; return their sha256, None if damaged."""
        target = self.writer.storage
        with source.storage.local_copy(source.record.name) as latents_path:
            if sha256_file(latents_path) != source.record.sha256:
                return None
            with self.pairs.storage.open(name) as file, target.writer(name) as path, ShardWriter(path) as shard:
                latents = read_shard(latents_path)
                for pair in read_shard(file):
                    if (latent := next(latents, None)) is None:
                        break
                    tokens = encode_npy(self.tokenizer.encode(sample_captions(pair)))
                    files = {"latent.npy": latent["latent.npy"], "tokens.npy": tokens, "json": pair["json"]}
                    shard.add(pair["__key__"], files)
                if shard.rows != source.record.rows:
                    raise UserError(
                        f"{self.pairs.storage.url}/{name} should hold {source.record.rows} samples but holds "
                        f"{shard.rows}: it is damaged; run `ldm run RECIPE --force pairs` to rebuild it"
                    )
        return shard.sha256
