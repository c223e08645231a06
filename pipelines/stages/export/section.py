"""The export's section of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.drawing.sections import facts

if TYPE_CHECKING:
    from pipelines.store.ledger import Artifact


def _export(artifact: Artifact) -> dict[str, Any]:
    return {
        "facts": facts(("Layouts", ", ".join(artifact.details.get("layouts", [])))),
        "place": artifact.storage.url,
        "files": [(file.name, file.bytes) for file in artifact.manifest.files],
    }
