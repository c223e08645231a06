"""Parts that the stages' report sections share: facts, charts and pictures as HTML."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from pipelines.drawing.charts import loss_chart

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.store.ledger import Artifact


MOST_PREVIEWS = 8

# Larger pictures are stored as WebP: the page stays small enough to mail.
LARGEST_PNG_BYTES = 300_000


def _facts(*facts: tuple[str, str | None]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in facts if value]


def _rate(details: Mapping[str, Any]) -> str | None:
    return f"{details['images_per_s']:,.1f} images/s" if "images_per_s" in details else None


def _loss_chart(artifact: Artifact) -> Markup:
    if "history.json" not in {file.name for file in artifact.manifest.files}:
        return Markup("")
    history = artifact.storage.read_json("history.json")
    return loss_chart([entry["step"] for entry in history], [entry["loss"] for entry in history])


def _previews(artifact: Artifact) -> list[tuple[int, str]]:
    """(step, picture) of at most MOST_PREVIEWS grids, evenly spread, the last one among them."""
    names = sorted(f.name for f in artifact.manifest.files if f.name.startswith("previews/step_"))
    stride = math.ceil(len(names) / MOST_PREVIEWS)
    kept = names[::-1][:: max(stride, 1)][::-1]
    return [
        (int(name.removesuffix(".png").rpartition("_")[2]), picture)
        for name in kept
        if (picture := _picture(artifact, name))
    ]


def _picture(artifact: Artifact, name: str) -> str | None:
    """A committed PNG as a data URL; None where the artifact has none of that name."""
    from PIL import Image

    if name not in {file.name for file in artifact.manifest.files}:
        return None
    data = artifact.storage.read_bytes(name)
    if len(data) > LARGEST_PNG_BYTES:
        return _webp(Image.open(io.BytesIO(data)), quality=88)
    return _data_url("png", data)


def _webp(image: Image.Image, quality: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return _data_url("webp", buffer.getvalue())


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
