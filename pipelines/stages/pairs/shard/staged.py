"""Shards in the making: each attempt writes to a folder of its own, and the first whole one is what counts.

Two processes may make the same shard, where one of them was thought dead; what servers answer may differ between them.
The record of a shard is created once, and whatever is published is copied from the files that it names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.stages.pairs.shard.files import shard_name
from pipelines.store.ledger import FileRecord
from pipelines.store.storage import Storage, encode_json


@dataclass(frozen=True)
class Made:
    """A whole shard that is not published yet: its files (the parquet last), where they are, and counts by status."""

    folder: Storage
    files: tuple[FileRecord, ...]
    statuses: Mapping[str, int]


def record_name(shard: int) -> str:
    """The file that says that a shard in the making is whole, and what it consists of."""
    return f"{shard_name(shard)}.json"


def keep_made(
    work: Storage, shard: int, attempt: str, files: Sequence[FileRecord], statuses: Mapping[str, int]
) -> Made:
    """Record a shard whose files are in the folder `attempt`; returns the first one recorded, ours or another's."""
    record = {
        "folder": attempt,
        "files": [file.model_dump() for file in files],
        "statuses": dict(sorted(statuses.items())),
    }
    work.create(record_name(shard), encode_json(record))
    return read_made(work, shard)


def read_made(work: Storage, shard: int) -> Made:
    """What was recorded of a shard."""
    record = work.read_json(record_name(shard))
    files = tuple(FileRecord.model_validate(file) for file in record["files"])
    return Made(work / record["folder"], files, record["statuses"])


# Shards in the making; removed when all are published.
WORK = "work"
