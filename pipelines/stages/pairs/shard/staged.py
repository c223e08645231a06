"""Staged shards: made by a worker, complete, and not yet published.

Each attempt at a shard writes to a folder of its own under `work/`, and the first attempt that is complete counts: two
processes may make the same shard, if one of them was wrongly taken for dead, and servers may answer them differently.
The record `work/000042.json` is therefore created once, and only the files that it names are ever published.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.errors import UserError
from pipelines.shards.format import decode_npy, encode_npy, read_shard
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.rows import Row, fit
from pipelines.stages.pairs.shard.files import (
    ShardTars,
    Spool,
    encode_facts,
    read_table,
    sample_key,
    shard_name,
    tar_name,
    write_table,
)
from pipelines.stages.pairs.shard.outcome import Outcome
from pipelines.store.commits import ArtifactWriter
from pipelines.store.file_table import FileRecord
from pipelines.store.storage import Storage, encode_json

# Characters that the table keeps of a caption that is too long for a sample.
_SHOWN_CHARACTERS = 1000


@dataclass(frozen=True)
class Change:
    """A change that publishing makes to one row of a staged shard.

    Attributes:
        scores: what models say of the sample, by name.
        status: the reason why the row gives no sample after all; None if it still does.
        duplicate_of: the row that shows the same picture, if that is the reason.
    """

    scores: Mapping[str, float] = field(default_factory=dict)
    status: str | None = None
    duplicate_of: int | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """The values to replace in the table, by column."""
        others = {"status": self.status, "duplicate_of": self.duplicate_of}
        return {**self.scores, **{name: value for name, value in others.items() if value is not None}}


@dataclass(frozen=True)
class StagedShard:
    """One staged shard; opened once, then passed around.

    Attributes:
        number: the shard's number in the artifact.
        work: the folder of all staged shards.
        folder: the folder of the attempt that counts.
        files: the tars and then the parquet.
        statuses: rows by status.
        has_tokens: whether its duplicate tokens were written too.
    """

    number: int
    work: Storage
    folder: Storage
    files: tuple[FileRecord, ...]
    statuses: Mapping[str, int]
    has_tokens: bool = False

    @classmethod
    def open(cls, work: Storage, number: int) -> StagedShard:
        """Read the record of a staged shard."""
        record = work.read_json(_record_name(number))
        return cls(
            number,
            work,
            folder=work / record["folder"],
            files=tuple(FileRecord.model_validate(file) for file in record["files"]),
            statuses=record["statuses"],
            # Earlier versions wrote no tokens.
            has_tokens=record.get("has_tokens", False),
        )

    @classmethod
    def record(
        cls,
        work: Storage,
        number: int,
        attempt: str,
        files: Sequence[FileRecord],
        statuses: Mapping[str, int],
        *,
        has_tokens: bool = False,
    ) -> StagedShard:
        """Record a shard whose files are complete in the folder `attempt`.

        Returns:
            The shard that counts: this one, or another attempt's that was recorded before.
        """
        record = {
            "folder": attempt,
            "files": [file.model_dump() for file in files],
            "statuses": dict(sorted(statuses.items())),
            "has_tokens": has_tokens,
        }
        # Created, never replaced: another attempt's record may have been read, or even published, already.
        work.create(_record_name(number), encode_json(record))
        return cls.open(work, number)

    @functools.cached_property
    def table(self) -> pa.Table:
        """Read the whole table."""
        return self.read_columns(None)

    def read_columns(self, columns: list[str] | None) -> pa.Table:
        return read_table(self.folder, self.number, columns)

    @property
    def tokens(self) -> NDArray[np.void]:
        """The duplicate tokens of its `ok` rows; only if `has_tokens`."""
        return decode_npy(self.folder.read_bytes(_tokens_name(self.number)))

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """The scores of its samples, by key and name; only after `write_scores`."""
        scores: dict[str, dict[str, float]] = self.work.read_json(_scores_name(self.number))
        return scores

    def write_scores(self, scores: Mapping[str, Mapping[str, float]]) -> None:
        self.work.write_json(_scores_name(self.number), scores)

    @property
    def tars(self) -> list[FileRecord]:
        return [file for file in self.files if file.name.endswith(".tar")]

    @contextlib.contextmanager
    def open_tar(self, tar: FileRecord) -> Iterator[Iterator[dict[str, Any]]]:
        """Open one of its tars as an iterator of samples."""
        with self.folder.open(tar.name) as file:
            yield read_shard(file)

    def publish(self, writer: ArtifactWriter, changes: Mapping[str, Change] | None = None) -> list[FileRecord]:
        """Put the final files into the artifact and commit them; return their records.

        Args:
            writer: writes the artifact.
            changes: rows that change, by sample key. Without any the files are published as they are.

        Raises:
            UserError: a staged file was damaged since it was written.
        """
        files = self._rewrite(writer.storage, changes) if changes else self._copy(writer.storage)
        # The parquet comes last: once it is committed, the whole shard is.
        return [writer.commit(file.name, rows=file.rows, sha256=file.sha256, content=file.content) for file in files]

    def _copy(self, target: Storage) -> Sequence[FileRecord]:
        for file in self.files:
            # Sizes alone: the digests were taken while the files were written, and reading them again would cost as
            # much as making a copy.
            if (size := self.folder.size(file.name)) != file.bytes:
                raise UserError(
                    f"{self.folder.url}/{file.name} was made with {file.bytes} bytes but has {max(size, 0)}: it was "
                    f"damaged afterwards; remove {self.work.url} and run the same command again"
                )
            self.folder.copy(file.name, target)
        return self.files

    def _rewrite(self, target: Storage, changes: Mapping[str, Change]) -> list[FileRecord]:
        # From the staged tars into the artifact, not in place: a publication that is killed starts again from the same
        # bytes and the same changes, so that it ends with the same files.
        unbucketed = tar_name(self.number)
        by_bucket = all(tar.name != unbucketed for tar in self.tars)
        with ShardTars(target, self.number, by_bucket=by_bucket) as tars:
            for tar in self.tars:
                with self.open_tar(tar) as samples:
                    for sample in samples:
                        key = sample.pop("__key__")
                        change = changes.get(key, Change())
                        if change.status is not None:
                            continue
                        facts = json.loads(sample["json"])
                        if change.scores:
                            sample["json"] = encode_facts({**facts, **change.scores})
                        tars.add(facts["bucket"] if by_bucket else None, key, sample)
        return [*tars.records, write_table(target, self.number, _with_changes(self.table, changes))]


def is_staged(work: Storage, number: int) -> bool:
    """Tell whether a complete attempt at a shard is recorded."""
    return work.exists(_record_name(number))


def staged_shards(work: Storage) -> list[int]:
    """List the numbers of the shards that are staged, ascending."""
    return [int(name.partition(".")[0]) for name in work.names("[0-9]*.json")]


def scored_shards(work: Storage) -> list[int]:
    """List the numbers of the staged shards that have scores, ascending."""
    return [int(name.partition(".")[0]) for name in work.names("[0-9]*.scores")]


def stage_shard(
    work: Storage,
    number: int,
    attempt: str,
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    *,
    spool: Spool,
    tokens: NDArray[np.void] | None,
    extra_types: Mapping[str, pa.DataType],
    config: PairsConfig,
) -> StagedShard:
    """Write all files of a shard into the folder `attempt`, then record them.

    The files depend on the rows and their outcomes alone: another attempt with the same outcomes gives the same bytes.

    Args:
        work: the folder of all staged shards.
        number: the shard's number.
        attempt: a name that no other process uses.
        rows, outcomes: one each a row, in order.
        spool: holds the encoded pictures.
        tokens: duplicate tokens of the `ok` rows; None if duplicates are not looked for.
        extra_types: Arrow types of the columns carried over from the source.
        config: the stage's section of the recipe.
    """
    target = work / attempt
    keys = [sample_key(number, position) for position in range(len(rows))]
    with ShardTars(target, number, by_bucket=config.resize == "buckets") as tars:
        for key, row, outcome in zip(keys, rows, outcomes, strict=True):
            if outcome.picture is not None and outcome.stored is not None:
                files = {
                    config.encode: spool.get(outcome.stored),
                    **({"txt": row.captions[0].encode()} if row.captions else {}),
                    "json": encode_facts(_facts(row, outcome)),
                }
                tars.add(outcome.picture.bucket, key, files)
    table = write_table(target, number, _table(keys, rows, outcomes, extra_types, config))
    if tokens is not None:
        target.write_bytes(_tokens_name(number), encode_npy(tokens))
    statuses = Counter(outcome.status for outcome in outcomes)
    return StagedShard.record(work, number, attempt, [*tars.records, table], statuses, has_tokens=tokens is not None)


def _record_name(number: int) -> str:
    return f"{shard_name(number)}.json"


def _scores_name(number: int) -> str:
    return f"{shard_name(number)}.scores"


def _tokens_name(number: int) -> str:
    return f"{shard_name(number)}.tokens.npy"


def score_names(config: PairsConfig) -> list[str]:
    """Name the scores that each sample gets by this recipe."""
    if config.scoring is None:
        return []
    return ["clip_score", *(["aesthetic_score"] if config.scoring.aesthetic_head else [])]


def _facts(row: Row, outcome: Outcome) -> dict[str, Any]:
    picture = outcome.picture
    assert picture is not None
    facts: dict[str, Any] = {
        **row.extra,
        "captions": list(row.captions),
        "sha256": outcome.sha256,
        "original_width": picture.original_width,
        "original_height": picture.original_height,
        "width": picture.width,
        "height": picture.height,
    }
    if row.url is not None:
        facts["url"] = row.url
    if picture.bucket is not None:
        facts["bucket"] = picture.bucket
    return facts


def _table(
    keys: Sequence[str],
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    extra_types: Mapping[str, pa.DataType],
    config: PairsConfig,
) -> pa.Table:
    pictures = [outcome.picture for outcome in outcomes]
    columns: dict[str, Any] = {
        "row": pa.array([row.index for row in rows], pa.int64()),
        "key": pa.array(keys, pa.string()),
        "status": pa.array([outcome.status for outcome in outcomes], pa.string()),
        "url": pa.array([row.url for row in rows], pa.string()),
        "caption": pa.array([_caption(row, outcome) for row, outcome in zip(rows, outcomes)], pa.string()),
        "sha256": pa.array([outcome.sha256 for outcome in outcomes], pa.string()),
        "width": pa.array([picture and picture.original_width for picture in pictures], pa.int32()),
        "height": pa.array([picture and picture.original_height for picture in pictures], pa.int32()),
    }
    if any(len(row.captions) > 1 for row in rows):
        # All captions of the samples; in other shards `caption` holds them all.
        all_captions = [list(row.captions) if outcome.picture else None for row, outcome in zip(rows, outcomes)]
        columns["captions"] = pa.array(all_captions, pa.list_(pa.string()))
    if config.resize == "buckets":
        columns["bucket"] = pa.array([picture and picture.bucket for picture in pictures], pa.string())
    if config.near_duplicates is not None:
        columns["phash"] = pa.array([picture and picture.phash for picture in pictures], pa.int64())
    # Empty until the shard is published: which rows are duplicates depends on all other shards.
    if config.deduplicate:
        columns["duplicate_of"] = pa.nulls(len(rows), pa.int64())
    for name in score_names(config):
        columns[name] = pa.nulls(len(rows), pa.float64())
    for name, kind in extra_types.items():
        columns[name] = pa.array([fit(row.extra.get(name), kind) for row in rows], kind)
    return pa.table(columns)


def _caption(row: Row, outcome: Outcome) -> str | None:
    if not row.captions:
        return None
    return row.captions[0][:_SHOWN_CHARACTERS] if outcome.status == "caption_too_long" else row.captions[0]


def _with_changes(table: pa.Table, changes: Mapping[str, Change]) -> pa.Table:
    keys = table.column("key").to_pylist()
    columns = {key: change.columns for key, change in changes.items()}
    for name in sorted({name for values in columns.values() for name in values}):
        old = table.column(name)
        values = [columns.get(key, {}).get(name, value) for key, value in zip(keys, old.to_pylist())]
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, old.type))
    return table
