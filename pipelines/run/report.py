"""The report of a pipeline run: one HTML page that needs no script, no network and no other file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.drawing.formatting import format_bytes, format_count, format_seconds
from pipelines.drawing.printable import printable
from pipelines.stages.autoencoder.section import _autoencoder
from pipelines.stages.diffusion.section import _diffusion
from pipelines.stages.evaluate.section import _evaluate, wilson_interval
from pipelines.stages.export.section import _export
from pipelines.stages.latents.section import _latents
from pipelines.stages.pairs.section import _pairs

if TYPE_CHECKING:
    from pipelines.run.results import StageRow
    from pipelines.store.ledger import Artifact
    from pipelines.store.storage import Storage

TEMPLATE = "report.html.j2"


def build_report(root: Storage, recipe_yaml: str, stages: Sequence[StageRow], artifacts: Mapping[str, Artifact]) -> str:
    """The report as HTML. What a stage that did not run would show is left out.

    Args:
        root: of the pipeline run.
        recipe_yaml: the resolved recipe.
        stages: what happened, in order.
        artifacts: finished ones, by stage name.

    Raises:
        UserError: a committed picture or history cannot be read.
    """
    import jinja2
    import yaml

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "size": format_bytes,
        "duration": format_seconds,
        "count": format_count,
        "printable": printable,
    }
    longest = max((row.seconds for row in stages), default=0.0)
    return environment.get_template(TEMPLATE).render(
        name=(yaml.safe_load(recipe_yaml) or {}).get("name", "run"),
        root=root.url,
        time=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        headlines=_headlines(stages, artifacts),
        stages=[(row, row.seconds / longest if longest else 0.0) for row in stages],
        sections={name: build(artifacts[name]) for name, build in SECTIONS.items() if name in artifacts},
        recipe=recipe_yaml,
    )


def _headlines(stages: Sequence[StageRow], artifacts: Mapping[str, Artifact]) -> list[tuple[str, str, str]]:
    """(value, what it is, a remark) of the few figures that a reader looks for first."""
    facts = {name: artifact.details for name, artifact in artifacts.items()}
    evaluate, diffusion = facts.get("evaluate", {}), facts.get("diffusion", {})
    headlines = []
    if (accuracy := evaluate.get("alignment_accuracy")) is not None:
        samples = evaluate.get("alignment_samples", 0)
        low, high = wilson_interval(accuracy, samples)
        remark = f"of {samples} held-out prompts; 95 % interval {100 * low:.0f}–{100 * high:.0f} %"
        headlines.append((f"{100 * accuracy:.1f} %", "alignment accuracy", remark))
    if "samples" in facts.get("pairs", {}):
        remark = f"of {format_count(facts['pairs'].get('input_rows'))} input rows"
        headlines.append((format_count(facts["pairs"]["samples"]), "image–text pairs", remark))
    if "images_per_s" in diffusion:
        remark = f"{diffusion.get('steps', 0):,} steps, final loss {diffusion.get('final_loss', math.nan):.3g}"
        headlines.append((f"{diffusion['images_per_s']:.1f}", "images/s in training", remark))
    if "psnr_db" in facts.get("autoencoder", {}):
        headlines.append((f"{facts['autoencoder']['psnr_db']:.1f} dB", "reconstruction PSNR", "of the first stage"))
    if stages:
        remark = f"{sum(row.state != 'cached' and row.seconds > 0 for row in stages)} of {len(stages)} stages worked"
        headlines.append((format_seconds(sum(row.seconds for row in stages)), "time of this run", remark))
    return headlines


SECTIONS = {
    "pairs": _pairs,
    "autoencoder": _autoencoder,
    "latents": _latents,
    "diffusion": _diffusion,
    "evaluate": _evaluate,
    "export": _export,
}
