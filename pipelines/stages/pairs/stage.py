"""The `pairs` stage: raw image-text pairs to WebDataset shards, in parallel, one shard at a time.

Writes `NNNNNN.tar` (`KEY.jpg|png|webp`, `KEY.txt`, `KEY.json`) and beside each `NNNNNN.parquet`, one row for every
input row with its status.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines.stage import Estimate, Section, Sections, Stage, StageContext
from pipelines.stages.pairs.artifact import PAIRS_FORMAT
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.shard.outcome import is_transient
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import RenderableType

# Of a JPEG at quality 95, bits a pixel are about 2.5 for photographs; the tar adds three headers and the caption.
JPEG_BYTES_PER_PIXEL = 0.31
TAR_OVERHEAD_BYTES = 3_500


# The modules that do the work are imported when they are called: a recipe or a plan needs neither Ray nor matplotlib.
def _run(context: StageContext[PairsConfig]) -> dict[str, Any]:
    from pipelines.stages.pairs import work

    return work.run(context)


def _inputs(config: PairsConfig) -> dict[str, str]:
    from pipelines.stages.pairs import inputs

    return inputs.source_digests(config)


def _section(artifact: Artifact) -> Section:
    from pipelines.stages.pairs.section import section

    return section(artifact)


def _survey(storage: Storage) -> dict[str, Any]:
    from pipelines.stages.pairs.summary.unfinished import survey

    return survey(storage)


def _view(facts: Mapping[str, Any]) -> RenderableType:
    from pipelines.stages.pairs.summary.view import view

    return view(facts)


def _contact_sheet(storage: Storage, shard: str | None) -> NDArray[np.uint8] | None:
    from pipelines.stages.pairs.summary.contact_sheet import contact_sheet, find_tars

    return contact_sheet(find_tars(storage, shard))


def _may_grow(config: PairsConfig, existing: Artifact) -> bool:
    """Return whether a retry is asked for and a finished artifact has rows to try again."""
    statuses = existing.details.get("statuses", {})
    return config.retry == "failed" and any(count and is_transient(status) for status, count in statuses.items())


def _estimate(sections: Sections, before: Mapping[str, Estimate]) -> Estimate:
    from pipelines.stages.pairs import inputs

    config = sections["pairs"]
    rows = inputs.count_rows(config)
    if rows is None:
        return Estimate()
    return Estimate(rows, round(rows * (config.image_size**2 * JPEG_BYTES_PER_PIXEL + TAR_OVERHEAD_BYTES)))


STAGE = Stage(
    name="pairs",
    format_version=PAIRS_FORMAT,
    run=_run,
    section=_section,
    inputs=_inputs,
    estimate=_estimate,
    uses_seed=False,
    may_grow=_may_grow,
    unit="rows",
    headlines=("samples",),
    local_inputs=("source", "scoring.clip", "scoring.aesthetic_head"),
    survey=_survey,
    view=_view,
    contact_sheet=_contact_sheet,
)
