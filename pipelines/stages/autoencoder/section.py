"""The autoencoder's section of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.drawing.formatting import format_count
from pipelines.drawing.sections import facts, loss_chart_of, picture, previews, rate

if TYPE_CHECKING:
    from pipelines.store.ledger import Artifact


def _autoencoder(artifact: Artifact) -> dict[str, Any]:
    details = artifact.details
    return {
        "facts": facts(
            ("Parameters", format_count(details.get("parameters"))),
            ("PSNR", f"{details['psnr_db']:.2f} dB" if "psnr_db" in details else None),
            ("Steps", format_count(details.get("steps"))),
            ("Throughput", rate(details)),
            ("Weights", details.get("encoder_sha256", "")[:16]),
        ),
        "loss": loss_chart_of(artifact),
        "reconstructions": picture(artifact, "reconstructions.png"),
        "previews": previews(artifact),
    }
