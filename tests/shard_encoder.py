"""The three steps of the latents stage on one shard, one after the other in this process."""

from __future__ import annotations

from typing import Any

from pipelines.stages.latents.config import LatentsConfig
from pipelines.stages.latents.encoding.encode import EncodeShard
from pipelines.stages.latents.encoding.read import ReadShard
from pipelines.stages.latents.encoding.write import WriteShard
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact


class ShardEncoder:
    """Encodes shards of pairs, and commits them. Its parts are there for tests to change."""

    def __init__(
        self, *, pairs: Artifact, first_stage: Artifact, writer: ArtifactWriter, config: LatentsConfig, device: str
    ) -> None:
        self.pairs, self.writer, self.config = pairs, writer, config
        self.read = ReadShard(pairs=pairs, writer=writer, config=config)
        self.encode = EncodeShard(first_stage=first_stage, storage=writer.storage, config=config, device=device)
        self.write = WriteShard(pairs=pairs, writer=writer)

    @property
    def first_stage(self) -> Any:
        return self.encode.first_stage

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        return self.write(self.encode(self.read(item)))
