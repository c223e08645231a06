"""A root with pairs of real pictures, a first stage, and latents that it made of them, or that something else made."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.demo.captions import caption
from jobs.demo.scenes import render, training_scenes
from ldm_core.images import to_unit_range
from pipelines.shards.format import ShardWriter, encode_npy, read_shard
from pipelines.shards.index import IndexBuilder, index_name
from pipelines.stages.autoencoder.artifact import load_first_stage
from pipelines.stages.latents.artifact import FORMAT_VERSION
from pipelines.stages.pairs.artifact import PAIRS_FORMAT, decode_image
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from tests.tiny_artifacts import finish

Moments = list[NDArray[np.float16]]
MAX_LENGTH, PAD_ID = 8, 0


def pictures(root: Path, rows: tuple[int, ...] = (6, 0, 5), name: str = "pairs", first: int = 0) -> Artifact:
    """Make pairs of rendered scenes with two captions each, from the scene of that number on."""
    writer = ArtifactWriter("pairs", name, Storage(str(root)) / "pairs" / name)
    scenes = enumerate(training_scenes(first, sum(rows)))
    for shard, count in enumerate(rows):
        with writer.storage.writer(f"{shard:06d}.tar") as path, ShardWriter(path) as tar:
            for row in range(count):
                number, scene = next(scenes)
                data = io.BytesIO()
                render(scene, number, side=32).save(data, "PNG")
                facts = {"captions": [caption(scene, number), caption(scene, number + 1)]}
                tar.add(f"{shard:05d}{row:04d}", {"png": data.getvalue(), "json": json.dumps(facts).encode()})
        writer.commit(f"{shard:06d}.tar", rows=count, sha256=tar.sha256, content=tar.content)
    return finish(writer, {"samples": sum(rows), "image_size": 32}, PAIRS_FORMAT)


def latents(
    root: Path,
    pairs: Artifact,
    first_stage: Artifact,
    *,
    change: Callable[[str, Moments], Moments] = lambda shard, moments: moments,
    name: str = "latents",
    **manifest: Any,
) -> Artifact:
    """Make latents as the stage does, but for what `change` makes of a shard's moments; tokens are as long as the row.

    Args:
        root, pairs, first_stage, name: where, of what, by what and under which key.
        change: takes a shard's name and the moments of its samples in order, and returns those to be written.
        manifest: fields of the manifest to be set otherwise.
    """
    writer = ArtifactWriter("latents", name, Storage(str(root)) / "latents" / name)
    network = load_first_stage(first_stage)
    for record in pairs.shards():
        samples = list(read_shard(Path(pairs.storage.path(record.name))))
        moments = change(record.name, moments_of(pairs, record.name, network))
        index = IndexBuilder()
        with writer.storage.writer(record.name) as path, ShardWriter(path, index) as tar:
            for row, (sample, encoded) in enumerate(zip(samples, moments, strict=True)):
                tokens = np.full((2, MAX_LENGTH), PAD_ID, np.uint16)
                tokens[:, : row + 2] = 5
                files = {"latent.npy": encode_npy(encoded), "tokens.npy": encode_npy(tokens)}
                tar.add(sample["__key__"], files)
        writer.commit(record.name, rows=tar.rows, sha256=tar.sha256, content=tar.content)
        facts = [sample["json"] for sample in samples]
        writer.storage.write_bytes(index_name(record.name), index.index().with_facts(facts).encode())
        writer.commit(index_name(record.name))
    fields: dict[str, Any] = {
        "config": {"precision": "fp32"},
        "upstream": {"pairs": pairs.key, "autoencoder": first_stage.key},
        "details": {
            "samples": pairs.manifest.rows,
            "encoder_sha256": first_stage.details["encoder_sha256"],
            "condition": {"kind": "text"},
            "latent_shape": [4, 4, 4],
            "max_length": MAX_LENGTH,
            "pad_id": PAD_ID,
        },
    }
    writer.finish(
        format_version=FORMAT_VERSION, identity={}, seconds=0.0, code_version="test", **{**fields, **manifest}
    )
    return Artifact("latents", name, writer.storage)


@torch.inference_mode()
def moments_of(pairs: Artifact, shard: str, network: Any) -> Moments:
    """Encode the pictures of a shard of pairs."""
    samples = read_shard(Path(pairs.storage.path(shard)))
    images = [to_unit_range(torch.from_numpy(decode_image(each["png"]))[None].permute(0, 3, 1, 2)) for each in samples]
    return [network.encode(x).moments[0].half().numpy() for x in images]
