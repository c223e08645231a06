"""From shards in the making to the artifact's own: without duplicates and without what a model scored too low."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.errors import UserError
from pipelines.shards.format import read_shard
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.filters import check_values
from pipelines.stages.pairs.publishing.duplicate_search import DuplicateSearch
from pipelines.stages.pairs.publishing.duplicate_tokens import NO_VERDICTS, Verdicts
from pipelines.stages.pairs.publishing.scoring import read_scores
from pipelines.stages.pairs.rows import RejectedError
from pipelines.stages.pairs.shard.files import ShardTars, encode_facts, read_table, score_names, write_table
from pipelines.stages.pairs.shard.outcome import DUPLICATE, NEAR_DUPLICATE, OK
from pipelines.stages.pairs.shard.staged import Made, read_made
from pipelines.store.ledger import ArtifactWriter, FileRecord
from pipelines.store.storage import Storage


@dataclass(frozen=True)
class Publisher:
    """Publishes shards; cheap to pickle.

    Args:
        config: of the stage.
        work: the folder of the shards in the making.
        writer: of the artifact.
    """

    config: PairsConfig
    work: Storage
    writer: ArtifactWriter

    def publish_all(self, shards: Sequence[int], search: DuplicateSearch | None) -> None:
        """Publish shards; duplicates among their rows are left out where they were looked for."""
        made = {shard: read_made(self.work, shard) for shard in shards}
        tables = {shard: read_table(made[shard].folder, shard) for shard in shards}
        ends = [table.column("row").to_numpy()[[0, -1]] for table in tables.values()]
        verdicts = search.verdicts(min(e[0] for e in ends), max(e[1] for e in ends)) if search else NO_VERDICTS
        for shard, table in tables.items():
            self._publish(shard, made[shard], table, verdicts)

    def publish_as_made(self, made: Made) -> None:
        """Publish a shard from which nothing is left out."""
        for file in made.files:
            if (size := made.folder.size(file.name)) != file.bytes:
                raise UserError(
                    f"{made.folder.url}/{file.name} was made with {file.bytes} bytes but has {max(size, 0)}: it was "
                    f"damaged afterwards; remove {self.work.url} and run the same command again"
                )
            made.folder.copy(file.name, self.writer.storage)
        self._commit(made.files)

    def _publish(self, shard: int, made: Made, table: Any, verdicts: Verdicts) -> None:
        """Write the final files of a shard and commit them."""
        if changes := self._changes(shard, table, verdicts):
            self._commit(self._rewrite(shard, made, table, changes))
        else:
            self.publish_as_made(made)

    def _commit(self, files: Sequence[FileRecord]) -> None:
        # The parquet comes last: where it is committed, the whole shard is.
        for file in files:
            self.writer.commit(file.name, rows=file.rows, sha256=file.sha256)

    def _changes(self, shard: int, table: Any, verdicts: Verdicts) -> dict[str, dict[str, Any]]:
        """New columns of the rows that change, by key."""
        keys, rows = table.column("key").to_pylist(), table.column("row").to_numpy()
        statuses = table.column("status").to_pylist()
        changes: dict[str, dict[str, Any]] = {}
        if self.config.scoring is not None:
            for key, scores in read_scores(self.work, shard).items():
                changes[key] = {**scores, **self._judged(scores)}
        places = np.searchsorted(verdicts["row"], rows)
        for place, key, row, status in zip(places, keys, rows, statuses):
            if status == OK and place < len(verdicts) and verdicts["row"][place] == row:
                of, near = int(verdicts["of"][place]), bool(verdicts["near"][place])
                change = {"status": NEAR_DUPLICATE if near else DUPLICATE, "duplicate_of": of}
                changes[key] = changes.get(key, {}) | change
        return changes

    def _judged(self, scores: Mapping[str, float]) -> dict[str, str]:
        try:
            check_values(scores, self.config)
        except RejectedError as error:
            return {"status": error.status}
        return {}

    def _rewrite(self, shard: int, made: Made, table: Any, changes: Mapping[str, dict[str, Any]]) -> list[FileRecord]:
        with ShardTars(self.writer.storage, shard, self.config) as tars:
            for file in made.files:
                if file.name.endswith(".tar"):
                    self._refill(tars, made.folder, file.name, changes)
        return [*tars.records, write_table(self.writer.storage, shard, _with_changes(table, changes))]

    def _refill(self, tars: ShardTars, folder: Storage, name: str, changes: Mapping[str, dict[str, Any]]) -> None:
        with folder.open(name) as file:
            for sample in read_shard(file):
                key = sample.pop("__key__")
                change = changes.get(key, {})
                if "status" in change:
                    continue
                facts = json.loads(sample["json"])
                if scores := {name: change[name] for name in score_names(self.config) if name in change}:
                    sample["json"] = encode_facts({**facts, **scores})
                tars.add(facts["bucket"] if self.config.resize == "buckets" else None, key, sample)


def _with_changes(table: Any, changes: Mapping[str, dict[str, Any]]) -> Any:
    import pyarrow as pa

    keys = table.column("key").to_pylist()
    for name in sorted({name for change in changes.values() for name in change}):
        old = table.column(name)
        values = [changes.get(key, {}).get(name, value) for key, value in zip(keys, old.to_pylist())]
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, old.type))
    return table
