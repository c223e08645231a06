"""The `pairs` stage's section of the report."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from pipelines.drawing.charts import histogram
from pipelines.drawing.formatting import format_bytes, format_count
from pipelines.drawing.html import render
from pipelines.drawing.sections import facts, webp_url
from pipelines.stage import Headline, Section
from pipelines.stages.pairs.summary.contact_sheet import contact_sheet, tars_of
from pipelines.store.ledger import Artifact

HISTOGRAMS = (
    ("source_size", "Source size", "shorter side of the source picture, pixels"),
    ("aspect", "Aspect ratio", "width / height of the source picture"),
    ("caption_words", "Caption length in words", "words of the first caption"),
    ("caption_characters", "Caption length in characters", "characters of the first caption"),
)


def section(artifact: Artifact) -> Section:
    """Return what became of the input rows, random samples, histograms, hosts and examples."""
    details = artifact.details
    rows, samples = max(details.get("input_rows", 0), 1), max(details.get("samples", 0), 1)
    charts = [
        (title, histogram(details[name]["edges"], details[name]["counts"], label))
        for name, title, label in HISTOGRAMS
        if name in details
    ]
    html = render(
        "stages/pairs/section.html.j2",
        facts=facts(
            ("Samples", format_count(details.get("samples"))),
            ("Size", format_bytes(details["bytes"]) if "bytes" in details else None),
            ("Size of one", format_bytes(details["bytes_per_sample"]) if "bytes_per_sample" in details else None),
            ("Image size", f"{details['image_size']} px" if "image_size" in details else None),
        ),
        statuses=[(name, count, count / rows) for name, count in _most_frequent_first(details.get("statuses", {}))],
        buckets=[(name, count, count / samples) for name, count in _most_frequent_first(details.get("buckets", {}))],
        hosts=details.get("hosts", []),
        hosts_exact=details.get("hosts_exact", True),
        charts=[(title, chart) for title, chart in charts if chart],
        contact_sheet=_contact_sheet(artifact),
        examples=[example for example in details.get("examples", []) if "caption" in example],
        failures=details.get("failures", {}),
    )
    return Section(html, _headlines(details))


def _headlines(details: Mapping[str, Any]) -> tuple[Headline, ...]:
    if "samples" not in details:
        return ()
    remark = f"of {format_count(details.get('input_rows'))} input rows"
    return (Headline(format_count(details["samples"]), "image–text pairs", remark),)


def _most_frequent_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _contact_sheet(artifact: Artifact) -> str | None:
    """Return random samples with their captions as a data URL; None if there are none."""
    sheet = contact_sheet(tars_of(artifact.storage))
    return None if sheet is None else webp_url(Image.fromarray(sheet), quality=80)
