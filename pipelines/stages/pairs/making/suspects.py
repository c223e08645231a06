"""Rows that kill their worker: found by a note, written before each picture is decoded, of the row it belongs to."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.stages.pairs.shard.files import shard_name
from pipelines.stages.pairs.shard.outcome import POISON, Outcome
from pipelines.store.storage import Storage

# With the first death, of which no note was taken, that makes three.
_DEATHS = 2


class Suspects:
    """The deaths of the workers of one shard, by row. Kept in a file, which outlives them and the driver.

    Only for shards whose worker has died: a note a picture takes longer than the picture.

    Args:
        work: the folder of staged shards.
        shard: the shard's number.
    """

    def __init__(self, work: Storage, shard: int) -> None:
        self._storage, self._name = work / "suspects", f"{shard_name(shard)}.json"
        kept = self._storage.read_json(self._name) if self._storage.exists(self._name) else {}
        self._deaths: dict[str, int] = kept.get("deaths", {})
        # Whoever wrote this died before the picture was done.
        for row in kept.get("decoding", []):
            self._deaths[str(row)] = self._deaths.get(str(row), 0) + 1
        self.note([])

    def outcome(self, row: int) -> Outcome | None:
        """Return the outcome of a row that has killed its worker often enough; None of any other row."""
        return Outcome(POISON) if self._deaths.get(str(row), 0) >= _DEATHS else None

    def note(self, rows: Sequence[int]) -> None:
        """Note the rows whose picture is decoded now; none while no picture is."""
        self._storage.write_json(self._name, {"deaths": self._deaths, "decoding": list(rows)})
