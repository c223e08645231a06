"""The `export` stage: the final EMA weights in the layouts that other programs load.

Writes `model.safetensors`, `config.json`, `vocab.txt` (what `ldm_core.load` reads) and, if asked for, the
folder `diffusers/` (what `diffusers.LDMTextToImagePipeline` reads).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.stage import Estimate, Section, Sections, Stage, StageContext
from pipelines.stages.export.config import ExportConfig
from pipelines.store.ledger import Artifact

FORMAT_VERSION = 1


# `work` and `section` are imported when they are called: a recipe or a plan needs neither torch nor matplotlib.
def _run(context: StageContext[ExportConfig]) -> dict[str, Any]:
    from pipelines.stages.export import work

    return work.run(context)


def _section(artifact: Artifact) -> Section:
    from pipelines.stages.export.section import section

    return section(artifact)


def _estimate(sections: Sections, before: Mapping[str, Estimate]) -> Estimate:
    """Return the size of the trained model, once for each layout."""
    size = before["diffusion"].bytes
    return Estimate(rows=0, bytes=None if size is None else size * (2 if sections["export"].diffusers else 1))


STAGE = Stage(
    name="export",
    format_version=FORMAT_VERSION,
    upstream=("diffusion",),
    run=_run,
    section=_section,
    estimate=_estimate,
    uses_seed=False,
)
