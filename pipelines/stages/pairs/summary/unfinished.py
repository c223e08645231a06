"""How far a pairs artifact is that is not finished: what is committed, what is made, of how much."""

from __future__ import annotations

from typing import Any

from pipelines.shards.tar_windows import Tar
from pipelines.stages.pairs.shard.staged import read_made
from pipelines.stages.pairs.summary.summary import summarise_shards
from pipelines.store.ledger import COMMITS, WORK
from pipelines.store.storage import Storage

PLAN = "plan.json"
# Of more tables than this, some are read: those of a long run are for the stage's own workers.
TABLES_READ = 1024


def write_plan(work: Storage, rows: int, rows_per_shard: int) -> None:
    """Leave a note of how much is to be made: it is gone when it is made."""
    work.write_json(PLAN, {"rows": rows, "shards": -(-rows // rows_per_shard)})


def survey(storage: Storage) -> dict[str, Any]:
    """What is there of an unfinished pairs artifact.

    Args:
        storage: the artifact's folder.

    Returns:
        As `summarise` says it of a finished one, of the shards that are there, and `shards`: how many are `committed`,
        how many `made` and waiting for that, and of the `planned` ones, where that is known; `tables_read` of them.
    """
    work = storage / WORK
    committed = [int(name.split(".")[0]) for name in (storage / COMMITS).names("*.parquet.json")]
    made = sorted({int(name.split(".")[0]) for name in work.names("[0-9]*.json")} - set(committed))
    stride = -(-(len(committed) + len(made)) // TABLES_READ) or 1
    partial = summarise_shards(storage, committed[::stride])
    for shard in made[::stride]:
        partial.merge(summarise_shards(read_made(work, shard).folder, [shard]))
    plan = work.read_json(PLAN) if work.exists(PLAN) else {}
    return {
        "shards": {"committed": len(committed), "made": len(made), "planned": plan.get("shards")},
        "planned_rows": plan.get("rows"),
        "tables_read": len(committed[::stride]) + len(made[::stride]),
        **partial.details(),
    }


def tars_in_the_making(work: Storage) -> list[Tar]:
    """The tars of at most so many shards that are made and not published."""
    shards = [int(name.split(".")[0]) for name in work.names("[0-9]*.json")]
    made = [read_made(work, shard) for shard in shards[:TABLES_READ]]
    return [
        Tar(each.folder, file.name, file.bytes) for each in made for file in each.files if file.name.endswith(".tar")
    ]
