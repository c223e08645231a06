"""The declaration of the `pairs` stage: raw image-text pairs to WebDataset shards."""

from __future__ import annotations

from typing import Any

from pipelines.stage import Stage, StageContext
from pipelines.stages.pairs.artifact import PAIRS_FORMAT
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.shard.outcome import is_transient
from pipelines.store.ledger import Artifact


# The functions below import their modules when they are called. `ldm --help` and the validation of a recipe declare
# every stage, and must not wait for the libraries that read tables, decode pictures and talk to Ray.
def run(context: StageContext) -> dict[str, Any]:
    """Make every shard that is not committed yet; returns the manifest's details."""
    from pipelines.stages.pairs import work

    return work.run(context)


def source_digests(config: PairsConfig) -> dict[str, str]:
    """Digest the source and the files of models, for the artifact's key."""
    from pipelines.stages.pairs import inputs

    return inputs.source_digests(config)


def count_rows(config: PairsConfig) -> int | None:
    """Count the input rows for estimates; None if that would mean reading the whole source over a network."""
    from pipelines.stages.pairs import inputs

    return inputs.count_rows(config)


def may_grow(config: PairsConfig, finished: Artifact) -> bool:
    """Tell whether a retry is asked for and a finished artifact has rows to try again."""
    statuses = finished.details.get("statuses", {})
    return config.retry == "failed" and any(count and is_transient(status) for status, count in statuses.items())


STAGE = Stage(
    name="pairs",
    format_version=PAIRS_FORMAT,
    upstream=(),
    inputs=source_digests,
    run=run,
    uses_seed=False,
    may_grow=may_grow,
)
