"""Publication of staged shards, without duplicates and without what a model scored too low.

Everything that is left out stays in the table, with the reason as its status.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.filters import check_values
from pipelines.stages.pairs.publishing.duplicate_search import DuplicateSearch
from pipelines.stages.pairs.rows import RejectedError
from pipelines.stages.pairs.shard.duplicate_tokens import NO_VERDICTS, Verdicts
from pipelines.stages.pairs.shard.outcome import DUPLICATE, NEAR_DUPLICATE, OK
from pipelines.stages.pairs.shard.staged import Change, StagedShard
from pipelines.store.commits import ArtifactWriter
from pipelines.store.file_table import FileRecord


def publish(
    shards: Sequence[StagedShard], config: PairsConfig, writer: ArtifactWriter, search: DuplicateSearch | None
) -> list[FileRecord]:
    """Decide what is left out of each shard, then put the rest into the artifact and commit it; return the records.

    Args:
        shards: consecutive shards, so that the verdicts are read once for all of them.
        config: the stage's section of the recipe.
        writer: writes the artifact.
        search: a finished search; None if duplicates are kept.
    """
    verdicts = NO_VERDICTS
    if search:
        # Rows ascend within a shard, and a shard is never empty.
        ends = [shard.table.column("row").to_numpy()[[0, -1]] for shard in shards]
        verdicts = search.verdicts(min(first for first, _ in ends), max(last for _, last in ends))
    records: list[FileRecord] = []
    for shard in shards:
        records += shard.publish(writer, _changes(shard, config, verdicts))
    return records


def _changes(shard: StagedShard, config: PairsConfig, verdicts: Verdicts) -> dict[str, Change]:
    """Decide what changes about the rows of a shard, by sample key."""
    scores = shard.scores if config.scoring is not None else {}
    changes = {key: Change(values, status=_rejection(values, config)) for key, values in scores.items()}
    keys, rows = shard.table.column("key").to_pylist(), shard.table.column("row").to_numpy()
    statuses = shard.table.column("status").to_pylist()
    places = np.searchsorted(verdicts["row"], rows)
    for place, key, row, status in zip(places, keys, rows, statuses):
        if status == OK and place < len(verdicts) and verdicts["row"][place] == row:
            reason = NEAR_DUPLICATE if verdicts["near"][place] else DUPLICATE
            # Before the status by score: the search did not look at scores, so neither may the reason.
            changes[key] = Change(scores.get(key, {}), reason, int(verdicts["of"][place]))
    return changes


def _rejection(scores: Mapping[str, float], config: PairsConfig) -> str | None:
    """Return the status of a sample that a filter on scores rejects."""
    try:
        check_values(scores, config)
    except RejectedError as error:
        return error.status
    return None
