"""Encode the pictures of a shard: the work of an actor, which holds the first stage and touches no files.

pictures: (N, H, W, 3) uint8
images: (B, 3, H, W) in [-1, 1]
moments: (B, 2, C, h, w) mean and log-variance, (B, 1, C, h, w) for VQ; fp16 as stored
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm_core.images import to_unit_range
from pipelines.compute.actor_pool import prepare_torch
from pipelines.conditions.kind import Pair
from pipelines.conditions.kinds import kind_of
from pipelines.errors import UserError
from pipelines.shards.format import decode_json
from pipelines.stages.autoencoder.artifact import load_first_stage
from pipelines.stages.latents.config import LatentsConfig
from pipelines.stages.latents.encoding.shards import DecodedShard, EncodedShard
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage

# Compiled for each size of pictures: beyond eight, torch would go on uncompiled.
MOST_SHAPES = 64


class EncodeShard:
    """Holds the frozen first stage, and the networks that encode conditions if there are any.

    Moments depend only on the pictures, the first stage and the config: batches are cut at fixed places within the
    shard, whichever actor encodes it. May be called from several threads: forward passes are made for one shard at a
    time, and what comes before and after them overlaps with those of another shard.

    Args:
        first_stage: the finished artifact of the autoencoder.
        storage: the folder of the artifact of latents, where the condition was prepared.
        config: the stage's section of the recipe.
        device: torch device of the first stage.
    """

    def __init__(self, *, first_stage: Artifact, storage: Storage, config: LatentsConfig, device: str) -> None:
        prepare_torch(device)
        self.config, self.device = config, device
        self.first_stage: Any = load_first_stage(first_stage, device)
        self._compiled = config.compile and device == "cuda"
        if self._compiled:
            torch._dynamo.config.recompile_limit = MOST_SHAPES
            for part in (self.first_stage.encoder, self.first_stage.quant_conv):
                part.to(memory_format=torch.channels_last)
                part.compile(dynamic=False)
        kind = kind_of(config.condition)
        self.condition = None if kind.from_facts else kind.encoder(storage, device, self._encode_mode)
        self._forward = threading.Lock()
        self._uploads = torch.cuda.Stream() if device == "cuda" else None

    def __call__(self, shard: DecodedShard) -> EncodedShard:
        """Encode one shard.

        Raises:
            UserError: its pictures do not fit the first stage, or a condition cannot be encoded.
        """
        if shard.pictures is None:
            return EncodedShard(shard.item)
        with self._forward:
            # Each view in batches of its own: the first is what it is without others.
            views = [self._moments(pictures, shard.keys) for pictures in shard.pictures]
            files = self._with_conditions(shard)
            done = torch.cuda.Event(blocking=True) if self._uploads else None
            if done is not None:
                done.record()
        if done is not None:
            # The next shard's passes begin meanwhile.
            done.synchronize()
        return EncodedShard(
            shard.item, shard.keys, np.stack([moments.numpy() for moments in views]), shard.facts, files
        )

    def _moments(self, pictures: NDArray[np.uint8], keys: list[str]) -> Tensor:
        """Return the moments of all pictures in main memory; on a GPU they are there once its stream has got so far."""
        found: Tensor | None = None
        for rows, pixels in self._uploaded(pictures):
            try:
                moments = self._encode(pixels)
            except ValueError as error:
                raise UserError(f"{keys[rows.start]} does not fit the first stage: {error}") from error
            if found is None:
                shape = (len(pictures), *moments.shape[1:])
                found = torch.empty(shape, dtype=torch.half, pin_memory=self._uploads is not None)
            found[rows].copy_(moments, non_blocking=True)
        return torch.empty((0, 0, 0, 0, 0), dtype=torch.half) if found is None else found

    def _uploaded(self, pictures: NDArray[np.uint8]) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows and the pixels of each batch on the device; on a GPU the next one is on its way by then."""
        size = self.config.batch_size
        batches = [slice(start, min(start + size, len(pictures))) for start in range(0, len(pictures), size)]
        if self._uploads is None:
            for rows in batches:
                # A copy: what is mapped from the object store is read-only, which tensors cannot be.
                yield rows, torch.from_numpy(pictures[rows].copy())
            return
        ahead: tuple[slice, Tensor] | None = None
        for rows in batches:
            following = rows, self._upload(pictures[rows])
            if ahead is not None:
                yield self._arrived(*ahead)
            ahead = following
        if ahead is not None:
            yield self._arrived(*ahead)

    def _upload(self, pictures: NDArray[np.uint8]) -> Tensor:
        """Begin to copy pictures to the GPU, beside its computations."""
        staged = torch.empty(pictures.shape, dtype=torch.uint8, pin_memory=True)
        np.copyto(staged.numpy(), pictures)
        with torch.cuda.stream(self._uploads):
            return staged.to(self.device, non_blocking=True)

    def _arrived(self, rows: slice, pixels: Tensor) -> tuple[slice, Tensor]:
        """Have the computations on the GPU wait for an upload, and its memory for them."""
        assert self._uploads is not None
        computing = torch.cuda.current_stream()
        computing.wait_stream(self._uploads)
        pixels.record_stream(computing)
        return rows, pixels

    def _encode(self, pixels: Tensor) -> Tensor:
        """Return the moments (B, 2 or 1, C, h, w) of pictures (B, H, W, 3), as stored."""
        rows = len(pixels)
        if self._compiled and rows < self.config.batch_size:
            # Compiled for one size of batches, whatever is left for the last one of a shard.
            pixels = torch.cat([pixels, pixels.new_zeros((self.config.batch_size - rows, *pixels.shape[1:]))])
        images = to_unit_range(pixels.permute(0, 3, 1, 2))
        autocast = torch.autocast(self.device, torch.bfloat16, enabled=self.config.precision == "bf16")
        with torch.inference_mode(), autocast:
            moments: Tensor = self.first_stage.encode(images).moments[:rows]
            return moments.half()

    def _encode_mode(self, images: Tensor) -> Tensor:
        latent: Tensor = self.first_stage.encode(images).mode()
        return latent

    def _with_conditions(self, shard: DecodedShard) -> list[dict[str, bytes]]:
        """Return the files of the condition that go with each latent."""
        if self.condition is None:
            return shard.files
        assert shard.pictures is not None
        pairs = [
            Pair(key, decode_json(facts), picture.copy(), files)
            for key, picture, facts, files in zip(shard.keys, shard.pictures[0], shard.facts, shard.files, strict=True)
        ]
        size, files = self.config.batch_size, []
        for start in range(0, len(pairs), size):
            files += self.condition.encode(pairs[start : start + size])
        return files
