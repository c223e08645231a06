"""Shards that kill their worker each time: recorded in `poison/NNNNNN.json`, and left out while they are few."""

from __future__ import annotations

from typing import Any

from pipelines.errors import UserError
from pipelines.notices import tell
from pipelines.store.commits import ArtifactWriter
from pipelines.store.storage import Storage

FOLDER = "poison"


def poisoned_shards(storage: Storage) -> set[str]:
    """Return the names of the pairs shards that an artifact of latents leaves out: `000000.tar`."""
    return {name.replace(".json", ".tar") for name in (storage / FOLDER).names("*.json")}


class Poisoned:
    """The poisoned shards of an artifact that is being made.

    Args:
        writer: the artifact's.
        total: number of all pairs shards.
        max_share: share of them that may be poisoned.
    """

    def __init__(self, writer: ArtifactWriter, total: int, max_share: float) -> None:
        self._writer, self._total, self._max_share = writer, total, max_share
        self.shards = poisoned_shards(writer.storage)

    def set_aside(self, item: dict[str, Any]) -> dict[str, Any]:
        """Record a shard; return what stands in for its result.

        Args:
            item: `shard` and `rows`.

        Raises:
            UserError: there are now more than may be, or its latents are committed.
        """
        shard = item["shard"]
        if self._writer.is_committed(shard):
            # Readers would find it, and nothing beside it.
            raise UserError(
                f"{shard} of latents is committed, but reading it back kills its worker each time: out of memory? Set "
                "latents.workers lower and run the same command again"
            )
        found = len(self.shards) + 1
        if found > self._max_share * self._total:
            raise UserError(
                f"encoding {shard} kills its worker each time, and {found} of {self._total} shards are more than "
                f"latents.max_poisoned_share={self._max_share:g} allows: out of memory? Set latents.workers or "
                "latents.shards_in_flight lower, or allow a larger share"
            )
        self._writer.storage.write_json(f"{FOLDER}/{shard.removesuffix('.tar')}.json", {"rows": item["rows"]})
        record = self._writer.commit(f"{FOLDER}/{shard.removesuffix('.tar')}.json")
        self.shards.add(shard)
        tell(f"latents: encoding {shard} kills its worker each time: left out, with its {item['rows']} rows")
        return {"rows": item["rows"], "unencodable": [], "records": [record.model_dump()]}
