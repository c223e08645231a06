"""The `diffusion` stage's section of the report."""

import math

from pipelines.drawing.formatting import format_count
from pipelines.drawing.html import render
from pipelines.drawing.sections import facts, loss_chart_of, previews, rate
from pipelines.stage import Headline, Section
from pipelines.store.ledger import Artifact


def section(artifact: Artifact) -> Section:
    """Return facts, the loss, and samples drawn during training."""
    details = artifact.details
    parameters = details.get("parameters", {})
    counts = parameters.items() if isinstance(parameters, dict) else [("all", parameters)]
    headlines: tuple[Headline, ...] = ()
    if "images_per_s" in details:
        remark = f"{details.get('steps', 0):,} steps, final loss {details.get('final_loss', math.nan):.3g}"
        headlines = (Headline(f"{details['images_per_s']:.1f}", "images/s in training", remark),)
    html = render(
        "stages/diffusion/section.html.j2",
        facts=facts(
            *((f"Parameters: {name.replace('_', ' ')}", format_count(count)) for name, count in counts),
            ("Steps", format_count(details.get("steps"))),
            ("Throughput", rate(details)),
            ("Workers", format_count(details.get("workers"))),
            ("Final loss", f"{details['final_loss']:.4g}" if "final_loss" in details else None),
            ("Loss on held-out samples", f"{details['held_out_loss']:.4g}" if "held_out_loss" in details else None),
            *(
                (f"Latents {mixed['key']}", f"{100 * mixed['weight']:g} % of the samples")
                for mixed in details.get("mix", ())
            ),
        ),
        loss=loss_chart_of(artifact),
        previews=previews(artifact),
    )
    return Section(html, headlines)
