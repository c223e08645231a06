"""The `evaluate` stage: pictures for fixed prompts and seeds from the final EMA weights, looked at and scored.

Writes `samples/NNNNNN.tar` (every picture), `grid.png` (prompts), `training_grid.png` and `held_out_grid.png` (real
pictures above what their captions give) and `scores.json`.
"""

from __future__ import annotations

from typing import Any

from pipelines.stage import Section, Sections, Stage, StageContext
from pipelines.stages.diffusion.stage import check_sampling
from pipelines.stages.evaluate.config import EvaluateConfig
from pipelines.stages.evaluate.prompts import prompts_digest
from pipelines.store.ledger import Artifact

FORMAT_VERSION = 1


# `work` and `section` are imported when they are called: a recipe or a plan needs neither torch nor matplotlib.
def _run(context: StageContext[EvaluateConfig]) -> dict[str, Any]:
    from pipelines.stages.evaluate import work

    return work.run(context)


def _section(artifact: Artifact) -> Section:
    from pipelines.stages.evaluate.section import section

    return section(artifact)


def _check(sections: Sections) -> None:
    sampling = sections["evaluate"].sampling
    check_sampling(sampling, sections, "evaluate.sampling")
    sections["condition"].check_guidance(sampling.guidance_scale, "evaluate.sampling.guidance_scale")


STAGE = Stage(
    name="evaluate",
    format_version=FORMAT_VERSION,
    upstream=("pairs", "diffusion"),
    run=_run,
    section=_section,
    check=_check,
    inputs=prompts_digest,
    unit="pictures",
    headlines=("alignment_accuracy",),
    local_inputs=("prompts_file",),
    outputs={"grid": "grid.png"},
)
