"""What a few samples of latents show, as one picture: originals beside decoded latents, and charts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm_core.images import to_uint8, to_unit_range
from ldm_core.metrics import psnr
from ldm_core.networks.autoencoder import FirstStage
from pipelines.drawing.formatting import format_bytes, format_count
from pipelines.drawing.grids import Image8, grid, mounted, stacked
from pipelines.drawing.panels import Panel, draw_panels
from pipelines.errors import UserError
from pipelines.shards.format import decode_json
from pipelines.stages.autoencoder.artifact import load_first_stage
from pipelines.stages.latents.inspection.look import SAMPLES_A_SHARD, SHARDS, facts_of
from pipelines.stages.latents.inspection.samples import (
    Original,
    Sample,
    choose,
    gone,
    originals,
    read_index,
    read_samples,
)
from pipelines.stages.latents.inspection.view import tokens_title
from pipelines.store.file_table import FileRecord
from pipelines.store.ledger import Artifact
from pipelines.store.manifest import MANIFEST, read_manifest
from pipelines.store.storage import Storage

# In rows of four, an original and what its latent decodes to side by side.
SAMPLES = 16
COLUMNS = 8
CELL_PIXELS = 176
FONT_PIXELS = 12
CAPTION_LINES = 3
PANEL_COLUMNS = 4


def contact_sheet(storage: Storage, shard: str | None = None) -> Image8 | None:
    """Draw a finished artifact of latents, or one shard of it.

    Returns:
        uint8 (height, width, 3) RGB; None if it is not finished, or holds no samples.

    Raises:
        UserError: an artifact is damaged, or the shard is none of this one's.
    """
    if not storage.exists(MANIFEST):
        return None
    manifest = read_manifest(storage)
    artifact = Artifact(manifest.stage, manifest.key, storage)
    if shard is None:
        looked_at = choose(artifact, SHARDS * SAMPLES_A_SHARD, shards=SHARDS)
        drawn = choose(artifact, SAMPLES, shards=SHARDS)
    elif (record := artifact.files.get(shard)) is not None:
        looked_at, drawn = [(record, SHARDS * SAMPLES_A_SHARD)], [(record, SAMPLES)]
    else:
        raise UserError(f"{storage.url}/{shard} is missing, or not of that artifact")
    facts = facts_of(artifact, looked_at)
    if not facts["samples"]:
        return None
    pictures, notes = _pictures(artifact, drawn)
    width = COLUMNS * (CELL_PIXELS + 4) + 4
    title = "\n".join([_title(artifact, facts, shard), *notes])
    return stacked([*pictures, draw_panels(title, _panels(facts), columns=PANEL_COLUMNS, width=width)])


def _title(artifact: Artifact, facts: dict[str, Any], shard: str | None) -> str:
    parts = facts["bytes_a_sample"]
    return (
        f"latents {artifact.key}{f', {shard}' if shard else ''}: {format_count(artifact.manifest.rows)} samples, "
        f"{format_bytes(sum(parts.values()))} each; {facts['samples']} looked at"
    )


def _panels(facts: dict[str, Any]) -> list[Panel]:
    channels = [
        Panel(f"channel {number}", counts, edges=facts["edges"]) for number, counts in enumerate(facts["counts"])
    ]
    tokens = [
        Panel(tokens_title(name, each), each["counts"], edges=each["edges"]) for name, each in facts["tokens"].items()
    ]
    parts = facts["bytes_a_sample"]
    return [*channels, *tokens, Panel("bytes a sample", list(parts.values()), labels=list(parts))]


def _pictures(artifact: Artifact, chosen: list[tuple[FileRecord, int]]) -> tuple[list[Image8], list[str]]:
    """Draw what there is of originals and decoded latents; say what there is not."""
    autoencoder, pairs = artifact.upstream("autoencoder"), artifact.upstream("pairs")
    notes = [
        f"without {what}: {gone(artifact, stage)}"
        for what, stage, found in (
            ("decoded latents", "autoencoder", autoencoder),
            ("originals", "pairs", pairs),
        )
        if found is None
    ]
    if autoencoder is None and pairs is None:
        return [], notes
    first_stage = load_first_stage(autoencoder) if autoencoder else None
    cells, captions = [], []
    for record, count in chosen:
        samples = read_samples(artifact.storage, record, read_index(artifact.storage, record), count)
        found = originals(pairs, record.name, [sample.key for sample in samples]) if pairs else {}
        for sample in samples:
            original = found.get(sample.key)
            for pixels, caption in _cells(first_stage, sample, original):
                cells.append(mounted(Image.fromarray(pixels), CELL_PIXELS))
                captions.append(caption)
    sheet = grid(np.stack(cells), COLUMNS, captions, font_pixels=FONT_PIXELS, caption_lines=CAPTION_LINES)
    return [sheet], notes


@torch.inference_mode()
def _cells(first_stage: FirstStage | None, sample: Sample, original: Original | None) -> list[tuple[Image8, str]]:
    """Return the original with its caption, and what its latent decodes to with its key and PSNR."""
    cells = []
    if original is not None:
        captions = decode_json(sample.facts).get("captions") or [""]
        cells.append((original.pixels, str(captions[0])))
    if first_stage is not None:
        decoded = first_stage.decode(torch.from_numpy(sample.moments[None, 0]).float()).clamp(-1, 1)
        quality = ""
        if original is not None:
            x = to_unit_range(torch.from_numpy(original.pixels)[None].permute(0, 3, 1, 2))
            quality = f" {float(psnr(x, decoded)):.1f} dB" if x.shape == decoded.shape else " of another size"
        cells.append((to_uint8(decoded)[0].permute(1, 2, 0).numpy(), f"{sample.key}{quality}"))
    return cells
