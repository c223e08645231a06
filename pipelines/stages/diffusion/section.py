"""The diffusion stage's section of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.drawing.formatting import format_count
from pipelines.drawing.sections import _facts, _loss_chart, _previews, _rate

if TYPE_CHECKING:
    from pipelines.store.ledger import Artifact


def _diffusion(artifact: Artifact) -> dict[str, Any]:
    details = artifact.details
    parameters = details.get("parameters", {})
    counts = parameters.items() if isinstance(parameters, dict) else [("all", parameters)]
    return {
        "facts": _facts(
            *((f"Parameters: {name.replace('_', ' ')}", format_count(count)) for name, count in counts),
            ("Steps", format_count(details.get("steps"))),
            ("Throughput", _rate(details)),
            ("Workers", format_count(details.get("workers"))),
            ("Final loss", f"{details['final_loss']:.4g}" if "final_loss" in details else None),
        ),
        "loss": _loss_chart(artifact),
        "previews": _previews(artifact),
    }
