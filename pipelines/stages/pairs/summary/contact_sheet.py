"""A contact sheet: randomly chosen pictures of a data set with their captions."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipelines.drawing.grids import Image8, grid, mounted
from pipelines.errors import UserError
from pipelines.shards.tar_windows import Tar, random_samples
from pipelines.stages.pairs.pictures.formats import DECODED, IN_TARS
from pipelines.stages.pairs.summary.unfinished import staged_tars
from pipelines.store.ledger import WORK
from pipelines.store.manifest import MANIFEST, read_files, read_manifest
from pipelines.store.storage import Storage

SAMPLES = 48
COLUMNS = 8
CELL_PIXELS = 176
FONT_PIXELS = 12
CAPTION_LINES = 4
# The tars may be other people's: larger pictures are not decoded.
MOST_PIXELS = 100_000_000
_UNREADABLE = (200, 120, 120)


def tars_of(storage: Storage) -> list[Tar]:
    """List the shards of an artifact, finished or not."""
    if storage.exists(MANIFEST):
        files = read_files(storage, read_manifest(storage).table).shards()
        sizes = {record.name: record.bytes for record in files if record.rows}
    else:
        sizes = storage.sizes()
    return [Tar(storage, name, size) for name, size in sorted(sizes.items()) if name.endswith(".tar")]


def find_tars(storage: Storage, shard: str | None = None) -> list[Tar]:
    """Return one shard of a folder, or all shards of the artifact in it, finished or not.

    Raises:
        UserError: the shard is missing.
    """
    if shard is not None:
        if (size := storage.size(shard)) < 0:
            raise UserError(f"{storage.url}/{shard} is missing")
        return [Tar(storage, shard, size)]
    # Before anything is committed there are only staged shards.
    return tars_of(storage) or staged_tars(storage / WORK)


def contact_sheet(tars: Sequence[Tar], count: int = SAMPLES) -> Image8 | None:
    """Draw at most `count` samples, always the same ones of the same tars.

    Each picture is as large as its cell allows, on grey if it has another shape; what cannot be decoded is a red cell.

    Args:
        tars: the tars to choose from.
        count: the largest number of samples.

    Returns:
        uint8 (height, width, 3) RGB; None if no sample has a picture.

    Raises:
        UserError: an object store does not answer.
    """
    samples = [(sample, name) for _, sample in random_samples(tars, count) if (name := _picture_name(sample))]
    if not samples:
        return None
    cells = np.stack([_cell(sample[name]) for sample, name in samples])
    captions = [_caption(sample) for sample, _ in samples]
    return grid(cells, COLUMNS, captions, font_pixels=FONT_PIXELS, caption_lines=CAPTION_LINES)


def _picture_name(sample: Mapping[str, bytes]) -> str | None:
    return next((name for kind in IN_TARS for name in sample if name.rpartition(".")[2] == kind), None)


def _caption(sample: Mapping[str, bytes]) -> str:
    if "txt" in sample:
        return sample["txt"].decode("utf-8", "replace")
    try:
        facts: Any = json.loads(sample.get("json", b"{}"))
    except (ValueError, RecursionError):
        return ""
    captions = facts.get("captions") if isinstance(facts, dict) else None
    return next((text for text in captions if isinstance(text, str)), "") if isinstance(captions, list) else ""


def _cell(data: bytes) -> Image8:
    """Draw one picture as uint8 (CELL_PIXELS, CELL_PIXELS, 3)."""
    try:
        with Image.open(io.BytesIO(data), formats=DECODED) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError("too many pixels")
            image.draft("RGB", (CELL_PIXELS, CELL_PIXELS))
            return mounted(_flat(image), CELL_PIXELS)
    # Decoders raise anything on hostile bytes.
    except Exception:
        return np.full((CELL_PIXELS, CELL_PIXELS, 3), _UNREADABLE, np.uint8)


def _flat(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
