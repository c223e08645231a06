"""Finished artifacts small enough for tests: real tars, real weights files, random contents."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.config import Config
from pipelines.shards.format import ShardWriter, encode_npy, read_shard
from pipelines.shards.index import IndexBuilder, index_name
from pipelines.stage import Stage, StageContext
from pipelines.stages.autoencoder.artifact import FORMAT_VERSION as AUTOENCODER_FORMAT
from pipelines.stages.diffusion.artifact import FORMAT_VERSION as DIFFUSION_FORMAT
from pipelines.stages.latents.artifact import FORMAT_VERSION as LATENTS_FORMAT
from pipelines.stages.latents.config import LatentsConfig
from pipelines.stages.pairs.artifact import PAIRS_FORMAT
from pipelines.stages.pairs.held_out import (
    HeldOutSample,
    SmallestContents,
    commit_held_out,
    content_hash,
    copy_held_out,
)
from pipelines.stages.pairs.shard.files import write_table
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from pipelines.tracking import null_stage_tracker
from tests.tiny import TINY_TEXT, TINY_UNET

WORDS = ("red", "green", "circle", "café", "square", "日本", "small", "large")


def finish(
    writer: ArtifactWriter,
    details: dict[str, Any],
    format_version: int = 1,
    upstream: Mapping[str, Artifact] | None = None,
) -> Artifact:
    writer.finish(
        format_version=format_version,
        config={},
        identity={},
        upstream={stage: artifact.key for stage, artifact in (upstream or {}).items()},
        details=details,
        seconds=0.0,
        code_version="test",
    )
    return Artifact(writer.stage, writer.key, writer.storage)


def pairs_artifact(root: Path, *, rows: tuple[int, ...] = (5, 0, 4), side: int = 32, name: str = "pairs") -> Artifact:
    """Make shards of `rows` samples each: noise with two captions; one in 64 is held out."""
    writer = ArtifactWriter("pairs", name, Storage(str(root)) / "pairs" / name)
    random = np.random.default_rng(0)
    for shard, count in enumerate(rows):
        samples = [pair_sample(random, f"{shard:05d}{row:04d}", side) for row in range(count)]
        with writer.storage.writer(f"{shard:06d}.tar") as path, ShardWriter(path) as tar:
            for key, files in samples:
                tar.add(key, files)
        writer.commit(f"{shard:06d}.tar", rows=count, sha256=tar.sha256, content=tar.content)
        captions = [json.loads(files["json"])["captions"] for _, files in samples]
        columns = {
            "key": pa.array([key for key, _ in samples], pa.string()),
            "status": pa.array(["ok"] * count, pa.string()),
            "captions": pa.array(captions, pa.list_(pa.string())),
        }
        write_table(writer.storage, shard, pa.table(columns))
        writer.commit(f"{shard:06d}.parquet")
    return finish(writer, {"samples": sum(rows), "image_size": side, "held_out": hold_out(writer)}, PAIRS_FORMAT)


def hold_out(writer: ArtifactWriter) -> str:
    """Commit the split of an artifact, by the bytes of pictures or latents; return the file's name."""
    contents = SmallestContents()
    shards = writer.committed().shards()
    for record in shards:
        with writer.storage.open(record.name) as file:
            for row, sample in enumerate(read_shard(file)):
                key = sample.pop("__key__")
                digest = hashlib.sha256(sample["latent.npy" if "latent.npy" in sample else "png"]).hexdigest()
                contents.merge([HeldOutSample(content_hash(digest), record.name, row, key)])
    return commit_held_out(writer, 0, contents.choose(shards.rows))


def pair_sample(random: np.random.Generator, key: str, side: int) -> tuple[str, dict[str, bytes]]:
    captions = [" ".join(random.choice(WORDS, 3)) for _ in range(2)]
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    facts = json.dumps({"captions": captions}, ensure_ascii=False).encode()
    return key, {"png": buffer.getvalue(), "txt": captions[0].encode(), "json": facts}


def first_caption(facts: Mapping[str, Any]) -> str:
    return str(facts["captions"][0])


def first_stage_artifact(root: Path, *, preset: str = "tiny-kl-f8", name: str = "autoencoder") -> Artifact:
    """Make a first stage with random weights."""
    import torch

    from ldm_core import checkpoint, presets
    from ldm_core.networks.autoencoder import build_first_stage

    writer = ArtifactWriter("autoencoder", name, Storage(str(root)) / "autoencoder" / name)
    torch.manual_seed(0)
    checkpoint.save(build_first_stage(presets.first_stage(preset)), writer.storage.path("first_stage"))
    weights = writer.commit("first_stage/model.safetensors")
    writer.commit("first_stage/config.json")
    return finish(writer, {"encoder_sha256": weights.sha256}, AUTOENCODER_FORMAT)


def latents_artifact(
    root: Path,
    encoder_sha256: str,
    *,
    rows: tuple[int, ...] = (9, 0, 12),
    max_length: int = 8,
    name: str = "latents",
    seed: int = 0,
    **changes: Any,
) -> Artifact:
    """Make random latents of 32-pixel pictures, with two captions each, as if that encoder had made them.

    Args:
        root: the root of the artifact.
        encoder_sha256: digest of the encoder.
        rows: samples of each shard.
        max_length: tokens of a caption.
        name: the artifact's key.
        seed: of what is random.
        changes: facts in the manifest that are to be otherwise.
    """
    from ldm_core.tokenizers.tokenizer import Tokenizer
    from ldm_core.tokenizers.wordpiece import build_vocabulary

    tokenizer = Tokenizer.from_vocabulary(build_vocabulary(WORDS, size=64), max_length=max_length)
    writer = ArtifactWriter("latents", name, Storage(str(root)) / "latents" / name)
    random = np.random.default_rng(seed)
    for shard, count in enumerate(rows):
        samples = []
        for row in range(count):
            captions = [" ".join(random.choice(WORDS, 2)) for _ in range(2)]
            moments = random.standard_normal((2, 4, 4, 4)).astype(np.float16)
            files = {"latent.npy": encode_npy(moments), "tokens.npy": encode_npy(tokenizer.encode(captions))}
            samples.append((f"{shard:05d}{row:04d}", files, json.dumps({"captions": captions}).encode()))
        name, index = f"{shard:06d}.tar", IndexBuilder()
        with writer.storage.writer(name) as path, ShardWriter(path, index) as tar:
            for key, files, _ in samples:
                tar.add(key, files)
        writer.commit(name, rows=count, sha256=tar.sha256, content=tar.content)
        writer.storage.write_bytes(
            index_name(name), index.index().with_facts([facts for *_, facts in samples]).encode()
        )
        writer.commit(index_name(name))
    with writer.storage.writer("vocab.txt") as path:
        tokenizer.write(path)
    writer.commit("vocab.txt")
    details = {
        "held_out": hold_out(writer),
        "encoder_sha256": encoder_sha256,
        "vocabulary_size": tokenizer.vocabulary_size,
        "max_length": max_length,
        "pad_id": tokenizer.pad_id,
        "condition": {"kind": "text"},
        "latent_shape": [4, 4, 4],
        "scale_factor": 0.5,
        "empty_tokens": tokenizer.encode([""])[0].tolist(),
    }
    return finish(writer, details | changes, LATENTS_FORMAT)


def latents_config(**changes: Any) -> LatentsConfig:
    """Return the latents' configuration for captions of a few words."""
    condition = {"kind": "text", "tokenizer": {"size": 64, "max_length": 8}}
    return LatentsConfig.model_validate({"condition": condition, **changes})


def encoded_latents_artifact(
    root: Path, pairs: Artifact, first_stage: Artifact, *, name: str = "latents", **changes: Any
) -> Artifact:
    """Make latents of the pairs, encoded as the stage encodes them, but in this process instead of Ray's."""
    import torch

    from pipelines.conditions.kinds import kind_of
    from pipelines.stages.latents.rows import PairsRows
    from tests.shard_encoder import ShardEncoder

    writer = ArtifactWriter("latents", name, Storage(str(root)) / "latents" / name)
    config = latents_config(**{"batch_size": 2, **changes})
    kind_of(config.condition).prepare(PairsRows(pairs), writer)
    threads = torch.get_num_threads()
    encode = ShardEncoder(pairs=pairs, first_stage=first_stage, writer=writer, config=config, device="cpu")
    for record in pairs.shards():
        encode({"shard": record.name, "rows": record.rows, "sha256": record.sha256})
    torch.set_num_threads(threads)
    details = {"samples": pairs.manifest.rows, "held_out": copy_held_out(pairs, writer), "scale_factor": 0.5}
    return finish(writer, details, LATENTS_FORMAT)


def diffusion_artifact(root: Path, *, max_length: int = 77, name: str = "diffusion") -> Artifact:
    """Make a text-to-image model for 32-pixel pictures with random weights, none of them zero."""
    import torch

    from ldm_core import checkpoint, presets
    from ldm_core.configs.model import LatentDiffusionConfig
    from ldm_core.configs.text import TextTransformerConfig
    from ldm_core.configs.unet import UNetConfig
    from ldm_core.tokenizers.tokenizer import Tokenizer
    from ldm_core.tokenizers.wordpiece import build_vocabulary
    from tests.random_weights import without_zeros

    tokenizer = Tokenizer.from_vocabulary(build_vocabulary(WORDS, size=64), max_length=max_length)
    config = LatentDiffusionConfig(
        first_stage=presets.first_stage("tiny-kl-f8"),
        unet=UNetConfig(**TINY_UNET),
        conditioner=TextTransformerConfig(
            vocabulary_size=tokenizer.vocabulary_size, max_length=max_length, **TINY_TEXT
        ),
    )
    torch.manual_seed(0)
    model = without_zeros(config.build())
    writer = ArtifactWriter("diffusion", name, Storage(str(root)) / "diffusion" / name)
    checkpoint.save(model, writer.storage.path("model"), tokenizer=tokenizer)
    for file in ("model.safetensors", "config.json", "vocab.txt"):
        writer.commit(f"model/{file}")
    return finish(writer, {"steps": 0, "condition": {"kind": "text"}}, DIFFUSION_FORMAT)


def run_stage(
    stage: Stage, config: Config, root: Path, upstream: Mapping[str, Artifact], *, key: str = "key", seed: int = 0
) -> Artifact:
    """Run a stage into `root/STAGE/key` and finish its artifact, as the walk over the stages does."""
    writer = ArtifactWriter(stage.name, key, Storage(str(root)) / stage.name / key)
    scratch = root / f"scratch-{stage.name}-{key}"
    scratch.mkdir(parents=True, exist_ok=True)
    context = StageContext(
        config=config,
        seed=seed,
        writer=writer,
        upstream=upstream,
        tracker=null_stage_tracker(),
        progress=lambda done, total, **facts: None,
        scratch=scratch,
    )
    return finish(writer, stage.run(context), stage.format_version)


def contents(artifact: Artifact) -> dict[str, str]:
    """Return sha256 of every committed file, by name."""
    return {record.name: record.sha256 for record in artifact.files}
