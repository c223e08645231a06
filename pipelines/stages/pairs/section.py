"""The pairs' section of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines.drawing.charts import histogram
from pipelines.drawing.formatting import format_bytes, format_count
from pipelines.drawing.sections import _facts, _webp

if TYPE_CHECKING:
    from pipelines.store.ledger import Artifact


def _pairs(artifact: Artifact) -> dict[str, Any]:
    details = artifact.details
    rows = max(details.get("input_rows", 0), 1)
    charts = [
        (title, histogram(details[name]["edges"], details[name]["counts"], label))
        for name, title, label in (
            ("source_size", "Source size", "shorter side of the source picture, pixels"),
            ("aspect", "Aspect ratio", "width / height of the source picture"),
            ("caption_words", "Caption length in words", "words of the first caption"),
            ("caption_characters", "Caption length in characters", "characters of the first caption"),
        )
        if name in details
    ]
    samples = max(details.get("samples", 0), 1)
    return {
        "facts": _facts(
            ("Samples", format_count(details.get("samples"))),
            ("Size", format_bytes(details["bytes"]) if "bytes" in details else None),
            ("Size of one", format_bytes(details["bytes_per_sample"]) if "bytes_per_sample" in details else None),
            ("Image size", f"{details['image_size']} px" if "image_size" in details else None),
        ),
        "statuses": [(name, count, count / rows) for name, count in _descending(details.get("statuses", {}))],
        "buckets": [(name, count, count / samples) for name, count in _descending(details.get("buckets", {}))],
        "hosts": details.get("hosts", []),
        "hosts_exact": details.get("hosts_exact", True),
        "charts": [(title, chart) for title, chart in charts if chart],
        "contact_sheet": _contact_sheet(artifact),
        "examples": details.get("examples", []),
        "failures": details.get("failures", {}),
    }


def _descending(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _contact_sheet(artifact: Artifact) -> str | None:
    """Random samples with their captions as a data URL; None where there are none."""
    from PIL import Image

    from pipelines.stages.pairs.summary.contact_sheet import contact_sheet, tars_of

    sheet = contact_sheet(tars_of(artifact.storage))
    return None if sheet is None else _webp(Image.fromarray(sheet), quality=80)
