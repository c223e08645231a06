"""What the latent cache is worth: `python -m tests.benchmarks.cached_online` trains on it, and by encoding every batch.

Both steps train the same UNet, and draw from the posterior. The one reads moments and contexts from shards; the other
has its pictures and token ids in memory already (a training without a cache must also read and decode them) and passes
them through first stage and text encoder.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_core import presets
from ldm_core.conditioning import build_conditioner
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.ema import EMA
from ldm_core.networks.posterior import DiagonalGaussian
from pipelines.shards.format import ShardWriter, decode_npy, encode_npy
from pipelines.shards.index import IndexBuilder, index_name
from pipelines.shards.order import SampleOrder
from pipelines.shards.reader import ShardReader
from pipelines.store.commits import ArtifactWriter
from pipelines.store.storage import Storage
from pipelines.training.loader.prefetch import Prefetcher
from pipelines.training.optimization import optimize
from tests.benchmarks.encoding import initial_first_stage
from tests.benchmarks.shapes import Shape
from tests.benchmarks.timing import count_flops, interleaved, machine, ratio
from tests.benchmarks.tool_run import dump
from tests.benchmarks.train_step import GRADIENT_NORM, LEARNING_RATE, TIMESTEPS, initial_unet

CACHED, ONLINE = "cached", "online"
SHARDS, ROWS = 4, 32


@dataclass(frozen=True)
class Plan:
    """Which model, and how it is run."""

    name: str
    model: LatentDiffusionConfig
    batch_size: int
    rounds: int
    shape: Shape


def _small() -> LatentDiffusionConfig:
    """Return sd-v1 at 128 px with narrower networks: the UNet by a factor of 3.3, the first stage by one of 4.

    So encoding pictures costs less of a step than it does at full size, and encoding text next to nothing.
    """
    model, text = presets.get("sd-v1"), presets.get("tiny-sd").conditioner
    return replace(
        model,
        conditioner=text,
        unet=replace(model.unet, latent_size=16, model_channels=96, context_dim=text.width),
        first_stage=replace(model.first_stage, base_channels=32),
    )


GPU = Plan("sd-v1", presets.get("sd-v1"), 16, 10, Shape("bf16", True, True))
CPU = Plan("sd-v1 at 128 px, narrow", _small(), 16, 5, Shape("fp32", False))


def measure(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Time both steps in turn; `cached_vs_online` is how many times faster the one on the cache is."""
    with tempfile.TemporaryDirectory(prefix="bench-cached-") as folder, _steps(plan, device, Path(folder)) as steps:
        timings = interleaved(steps, device, rounds=plan.rounds)
        flops = {name: count_flops(step) for name, step in steps.items()} if not plan.shape.compiled else {}
    return {
        "cached_vs_online": ratio(timings, CACHED, ONLINE),
        "model": plan.name,
        "by_flops": flops[ONLINE] / flops[CACHED] if flops else None,
        "batch_size": plan.batch_size,
        "shape": str(plan.shape),
        "ms": {name: 1e3 * timing.median_s for name, timing in timings.items()},
        "spread": {name: timing.spread for name, timing in timings.items()},
        "peak_gib": {name: timing.peak_gib for name, timing in timings.items()},
    }


@contextlib.contextmanager
def _steps(plan: Plan, device: torch.device, folder: Path) -> Iterator[dict[str, Callable[[], object]]]:
    train = _training_step(plan, device)
    model, size = plan.model, plan.batch_size
    encode = _encoders(plan, device)
    side = model.unet.latent_size * model.first_stage.downsampling_factor
    length = model.conditioner.max_length
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8)
    tokens = torch.randint(0, model.conditioner.vocabulary_size, (size, length))
    if device.type == "cuda":
        pictures, tokens = pictures.pin_memory(), tokens.pin_memory()

    def online() -> Tensor:
        return train(*encode(pictures.to(device, non_blocking=True), tokens.to(device, non_blocking=True)))

    with contextlib.closing(_write_cache(folder, model, length)) as reader:
        order = SampleOrder(reader.rows_per_shard, 0, SHARDS, batch_size=size, partitions=4)

        def load(step: int) -> tuple[Tensor, Tensor]:
            samples = [reader.read(*sample.place) for sample in order.slice(step, 0, 1)]
            moments, context = (
                torch.from_numpy(np.stack([decode_npy(sample[name]) for sample in samples]))
                for name in ("latent.npy", "text.npy")
            )
            return (moments.pin_memory(), context.pin_memory()) if device.type == "cuda" else (moments, context)

        batches = Prefetcher(load, 0, 1 << 40)

        def cached() -> Tensor:
            moments, context = batches.next()
            return train(moments.to(device, non_blocking=True), context.to(device, non_blocking=True))

        try:
            yield {CACHED: cached, ONLINE: online}
        finally:
            batches.close()


def _training_step(plan: Plan, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the step that both share: moments (B, 2, C, h, w) and context (B, L, D) to the loss."""
    unet = initial_unet(plan.model.unet, device).train()
    prepared = plan.shape.prepare(unet, "training")
    ema = EMA(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, fused=True)
    scale = plan.model.scale_factor

    def step(moments: Tensor, context: Tensor) -> Tensor:
        moments, context = moments.float(), context.float()
        z0 = scale * DiagonalGaussian.from_moments(moments).sample(noise=torch.randn_like(moments[:, 0]))
        noise, t = torch.randn_like(z0), torch.randint(0, TIMESTEPS, (len(z0),), device=device)
        # The arithmetic of the schedule costs the same on both sides, and next to nothing.
        z_t = (z0 + noise) / 2**0.5
        optimizer.zero_grad(set_to_none=True)
        with prepared.autocast():
            loss = torch.nn.functional.mse_loss(unet(z_t, t, context=context).float(), noise)
        loss.backward()
        optimize(optimizer, GRADIENT_NORM)
        ema.update()
        return loss.detach()

    return step


def _encoders(plan: Plan, device: torch.device) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return what makes moments and contexts of pictures (B, 3, H, W) uint8 and token ids (B, L)."""
    first_stage = initial_first_stage(plan.model.first_stage, device)
    plan.shape.prepare(first_stage, "sampling")
    torch.manual_seed(2)
    with device:
        text = build_conditioner(plan.model.conditioner)
    plan.shape.prepare(text, "sampling")

    def encode(pictures: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return first_stage.encode(pictures / 127.5 - 1).moments, text(tokens).context

    return encode


def _write_cache(folder: Path, model: LatentDiffusionConfig, length: int) -> ShardReader:
    storage = Storage(str(folder))
    writer = ArtifactWriter("latents", "key", storage)
    random = np.random.default_rng(0)
    latent = (2, model.unet.in_channels, model.unet.latent_size, model.unet.latent_size)
    for shard in range(SHARDS):
        name, index = f"{shard:06d}.tar", IndexBuilder()
        with storage.writer(name) as path, ShardWriter(path, index) as tar:
            for row in range(ROWS):
                arrays = {"latent.npy": latent, "text.npy": (length, model.unet.context_dim)}
                files = {
                    each: encode_npy(random.standard_normal(shape).astype(np.float16)) for each, shape in arrays.items()
                }
                tar.add(f"{shard:05d}{row:04d}", files)
        storage.write_bytes(index_name(name), index.index().encode())
        writer.commit(name, rows=ROWS, sha256=tar.sha256)
        writer.commit(index_name(name))
    return ShardReader(storage, writer.committed())


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cached_online", description=__doc__)
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = GPU if device.type == "cuda" else CPU
    if device.type == "cpu":
        torch.set_num_threads(1)
    if options.rounds:
        plan = replace(plan, rounds=options.rounds)
    print(dump({**measure(plan, device), "machine": machine(device)}))


if __name__ == "__main__":
    main()
