"""Parts that the stages' report sections share: facts, a loss chart, and pictures as data URLs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from PIL import Image

from pipelines.drawing.charts import loss_chart
from pipelines.store.ledger import Artifact

MOST_PREVIEWS = 8

# Larger pictures are stored as WebP: the page stays small enough to mail.
LARGEST_PNG_BYTES = 300_000


def facts(*items: tuple[str, str | None]) -> list[tuple[str, str]]:
    """Return the (name, value) items that have a value."""
    return [(name, value) for name, value in items if value]


def rate(details: Mapping[str, Any]) -> str | None:
    """Return a training stage's throughput as text; None if its details do not tell."""
    return f"{details['images_per_s']:,.1f} images/s" if "images_per_s" in details else None


def loss_chart_of(artifact: Artifact) -> Markup:
    """Draw the loss history that a training stage committed; nothing if there is none."""
    if not _has(artifact, "history.json"):
        return Markup("")
    # A step at which only the held-out loss was measured has no other.
    history = [entry for entry in artifact.storage.read_json("history.json") if "loss" in entry]
    return loss_chart([entry["step"] for entry in history], [entry["loss"] for entry in history])


def previews(artifact: Artifact) -> list[tuple[int, str]]:
    """Return (step, data URL) of at most MOST_PREVIEWS preview grids, evenly spread, the last one among them."""
    names = sorted(name for name in artifact.files.names if name.startswith("previews/step_"))
    stride = max(math.ceil(len(names) / MOST_PREVIEWS), 1)
    kept = names[::-1][::stride][::-1]
    return [(int(name.removesuffix(".png").rpartition("_")[2]), _picture_url(artifact, name)) for name in kept]


def picture(artifact: Artifact, name: str) -> str | None:
    """Return a committed PNG as a data URL; None if the artifact has none of that name."""
    return _picture_url(artifact, name) if _has(artifact, name) else None


def webp_url(image: Image.Image, quality: int) -> str:
    """Encode a picture as WebP, `quality` from 0 to 100, in a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return data_url("webp", buffer.getvalue())


def data_url(kind: str, data: bytes) -> str:
    """Return an encoded picture as a URL that holds it; `kind` is its subtype of `image/`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _picture_url(artifact: Artifact, name: str) -> str:
    data = artifact.storage.read_bytes(name)
    if len(data) > LARGEST_PNG_BYTES:
        return webp_url(Image.open(io.BytesIO(data)), quality=88)
    return data_url("png", data)


def _has(artifact: Artifact, name: str) -> bool:
    return name in artifact.files
