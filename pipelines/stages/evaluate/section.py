"""The evaluation's section of the report."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pipelines.drawing.sections import picture

if TYPE_CHECKING:
    from pipelines.store.ledger import Artifact


def _evaluate(artifact: Artifact) -> dict[str, Any]:
    details = artifact.details
    names = {file.name for file in artifact.manifest.files}
    scores = artifact.storage.read_json("scores.json").get("alignment", {}) if "scores.json" in names else {}
    groups = [
        (f"{name.replace('_', ' ')}: {'yes' if value == 'true' else 'no'}", score["accuracy"], score["samples"])
        for name, group in scores.get("groups", {}).items()
        for value, score in group.items()
    ]
    return {
        "grid": picture(artifact, "grid.png"),
        "training_grid": picture(artifact, "training_grid.png"),
        "prompts": details.get("prompts", []) if isinstance(details.get("prompts"), list) else [],
        "attributes": [(name, share, scores.get("samples", 0)) for name, share in scores.get("attributes", {}).items()]
        + groups,
        "mistakes": [item for item in scores.get("items", []) if not item["right"]][:12],
    }


def wilson_interval(share: float, samples: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds the true share with 95 % confidence (Wilson, 1927)."""
    if samples == 0:
        return 0.0, 1.0
    center = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples**2))
    return max(center - half, 0.0), min(center + half, 1.0)
