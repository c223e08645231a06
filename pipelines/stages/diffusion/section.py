"""The diffusion stage's section of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.drawing.formatting import format_count
from pipelines.drawing.sections import facts, loss_chart_of, previews, rate

if TYPE_CHECKING:
    from pipelines.store.ledger import Artifact


def _diffusion(artifact: Artifact) -> dict[str, Any]:
    details = artifact.details
    parameters = details.get("parameters", {})
    counts = parameters.items() if isinstance(parameters, dict) else [("all", parameters)]
    return {
        "facts": facts(
            *((f"Parameters: {name.replace('_', ' ')}", format_count(count)) for name, count in counts),
            ("Steps", format_count(details.get("steps"))),
            ("Throughput", rate(details)),
            ("Workers", format_count(details.get("workers"))),
            ("Final loss", f"{details['final_loss']:.4g}" if "final_loss" in details else None),
        ),
        "loss": loss_chart_of(artifact),
        "previews": previews(artifact),
    }
