"""The `pairs` stage: raw image-text pairs to WebDataset shards, in parallel, one shard at a time."""

from __future__ import annotations

from pipelines.stage import Stage
from pipelines.stages.pairs.artifact import PAIRS_FORMAT
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.shard.outcome import may_pass
from pipelines.stages.pairs.work import run, source_digests
from pipelines.store.ledger import Artifact


def may_grow(config: PairsConfig, finished: Artifact) -> bool:
    """Whether a finished artifact has rows that are to be tried again."""
    statuses = finished.details.get("statuses", {})
    return config.retry == "failed" and any(count and may_pass(status) for status, count in statuses.items())


STAGE = Stage(
    name="pairs",
    format_version=PAIRS_FORMAT,
    upstream=(),
    inputs=source_digests,
    run=run,
    uses_seed=False,
    may_grow=may_grow,
)
