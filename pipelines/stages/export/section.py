"""The `export` stage's section of the report."""

from pipelines.drawing.html import render
from pipelines.drawing.sections import facts
from pipelines.stage import Section
from pipelines.store.ledger import Artifact


def section(artifact: Artifact) -> Section:
    """Return where the model is, and its files."""
    html = render(
        "stages/export/section.html.j2",
        facts=facts(("Layouts", ", ".join(artifact.details.get("layouts", [])))),
        place=artifact.storage.url,
        files=[(file.name, file.bytes) for file in artifact.files],
    )
    return Section(html, appendix=True)
