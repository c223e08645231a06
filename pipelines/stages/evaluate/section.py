"""The `evaluate` stage's section of the report."""

import math
from typing import Any

from pipelines.drawing.html import render
from pipelines.drawing.sections import picture
from pipelines.stage import Headline, Section
from pipelines.store.ledger import Artifact

MOST_MISTAKES = 12


def section(artifact: Artifact) -> Section:
    """Return the grids, and what the detector saw in them."""
    details = artifact.details
    names = {file.name for file in artifact.files}
    scores = artifact.storage.read_json("scores.json").get("alignment", {}) if "scores.json" in names else {}
    groups = [
        (f"{name.replace('_', ' ')}: {'yes' if value == 'true' else 'no'}", score["accuracy"], score["samples"])
        for name, group in scores.get("groups", {}).items()
        for value, score in group.items()
    ]
    attributes = [(name, share, scores.get("samples", 0)) for name, share in scores.get("attributes", {}).items()]
    html = render(
        "stages/evaluate/section.html.j2",
        grid=picture(artifact, "grid.png"),
        training_grid=picture(artifact, "training_grid.png"),
        prompts=details.get("prompts", []) if isinstance(details.get("prompts"), list) else [],
        attributes=attributes + groups,
        mistakes=[item for item in scores.get("items", []) if not item["right"]][:MOST_MISTAKES],
    )
    return Section(html, _headlines(details))


def _headlines(details: dict[str, Any]) -> tuple[Headline, ...]:
    accuracy = details.get("alignment_accuracy")
    if accuracy is None:
        return ()
    samples = details.get("alignment_samples", 0)
    low, high = wilson_interval(accuracy, samples)
    remark = f"of {samples} held-out prompts; 95 % interval {100 * low:.0f}–{100 * high:.0f} %"
    return (Headline(f"{100 * accuracy:.1f} %", "alignment accuracy", remark),)


def wilson_interval(share: float, samples: int, z: float = 1.96) -> tuple[float, float]:
    """Return the interval that holds the true share with 95 % confidence (Wilson, 1927)."""
    if samples == 0:
        return 0.0, 1.0
    center = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples**2))
    return max(center - half, 0.0), min(center + half, 1.0)
