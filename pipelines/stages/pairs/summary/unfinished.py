"""The state of an unfinished pairs artifact: what is committed, what is staged, of how much."""

from __future__ import annotations

from typing import Any

from pipelines.shards.tar_windows import Tar
from pipelines.stages.pairs.shard.staged import StagedShard, staged_shards
from pipelines.stages.pairs.summary.summary import summarise_shards
from pipelines.store.commits import COMMITS
from pipelines.store.ledger import WORK
from pipelines.store.storage import Storage
from pipelines.store.threads import map_in_threads

PLAN = "plan.json"
# Of more tables than this only some are read: looking at a long run must not take minutes.
TABLES_READ = 1024


def write_plan(work: Storage, rows: int, shards: int) -> None:
    """Write down how much is going to be made; removed with the work folder once it is."""
    work.write_json(PLAN, {"rows": rows, "shards": shards})


def survey(storage: Storage) -> dict[str, Any]:
    """Summarise what there is of an unfinished pairs artifact.

    Args:
        storage: the artifact's folder.

    Returns:
        The details that `summarise` gives for a finished artifact, about the shards that are there, and `shards`: how
        many are `committed`, how many are `made` (staged, not committed), and how many are `planned`, if that is
        known. `tables_read` is the number of shards that the details are about.
    """
    work = storage / WORK
    committed = [int(name.split(".")[0]) for name in (storage / COMMITS).names("[0-9]*.parquet.json")]
    staged = sorted(set(staged_shards(work)) - set(committed))
    stride = -(-(len(committed) + len(staged)) // TABLES_READ) or 1
    partial = summarise_shards(storage, committed[::stride])
    read = map if storage.is_local else map_in_threads
    for later in read(lambda shard: summarise_shards(StagedShard.open(work, shard).folder, [shard]), staged[::stride]):
        partial.merge(later)
    plan = work.read_json(PLAN) if work.exists(PLAN) else {}
    return {
        "shards": {"committed": len(committed), "made": len(staged), "planned": plan.get("shards")},
        "planned_rows": plan.get("rows"),
        "tables_read": len(committed[::stride]) + len(staged[::stride]),
        **partial.details(),
    }


def staged_tars(work: Storage) -> list[Tar]:
    """List the tars of the staged shards; of the first TABLES_READ of them if there are more."""
    read = map if work.is_local else map_in_threads
    shards = read(lambda number: StagedShard.open(work, number), staged_shards(work)[:TABLES_READ])
    return [Tar(shard.folder, tar.name, tar.bytes) for shard in shards for tar in shard.tars]
