"""Reconstructions of a first stage: its training loss, and how close they are to held-out pictures.

Shapes: pixels: (B, H, W, 3) uint8; x: (B, 3, H, W) in [-1, 1]; noise: (B, C, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm_core.images import to_uint8, to_unit_range
from ldm_core.metrics import psnr
from ldm_core.networks.autoencoder import AutoencoderKL, VQAutoencoder
from ldm_core.networks.posterior import DiagonalGaussian
from pipelines.drawing.grids import encode_png, grid
from pipelines.shards.order import Place
from pipelines.stages.autoencoder.config import AutoencoderConfig
from pipelines.stages.pairs.artifact import Pictures

BATCH = 8
SHOWN = 8
# A megapixel of held-out pictures is enough for a PSNR, and a CPU takes a few minutes for it with a large model. Of a
# large set each lies in another shard.
MEASURED_PIXELS = 1 << 20
MEASURED_PICTURES = 64
GRID_CELL_PIXELS = 128


class ReconstructionLoss(nn.Module):
    """A first stage with its training loss. One module, so that one DDP wrapper sees every forward pass.

    The reconstruction term is L1 (paper, Sec. 3.1, without its perceptual and adversarial terms) or L2, which small
    models learn sooner. The KL term has a "slight" weight; `AutoencoderConfig` says relative to what.
    """

    def __init__(self, first_stage: AutoencoderKL | VQAutoencoder, config: AutoencoderConfig) -> None:
        super().__init__()
        self.first_stage = first_stage
        self.kl_weight = config.kl_weight
        self.kl_reduction = config.kl_reduction
        self.distance = torch.square if config.reconstruction_loss == "l2" else torch.abs

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return the (B,) losses of (B, 3, H, W) images, with (B, C, h, w) noise to sample the posterior with."""
        posterior = self.first_stage.encode(x)
        if isinstance(self.first_stage, VQAutoencoder):
            quantization = self.first_stage.quantize(posterior.mode())
            decoded = self.first_stage.decoder(self.first_stage.post_quant_conv(quantization.latent))
            return self._reconstruction(decoded, x) + quantization.loss
        assert isinstance(posterior, DiagonalGaussian)
        latent = posterior.sample(noise=noise)
        loss = self._reconstruction(self.first_stage.decode(latent), x)
        values = latent[0].numel() if self.kl_reduction == "mean" else x[0].numel()
        return loss + self.kl_weight * posterior.kl() / values

    def _reconstruction(self, decoded: Tensor, x: Tensor) -> Tensor:
        return self.distance(decoded.float() - x).flatten(1).mean(dim=1)


def to_images(pixels: NDArray[np.uint8] | Tensor, device: torch.device) -> Tensor:
    """Convert (B, H, W, 3) uint8 to (B, 3, H, W) float32 in [-1, 1]."""
    tensor = pixels if isinstance(pixels, Tensor) else torch.from_numpy(pixels)
    return to_unit_range(tensor.to(device).permute(0, 3, 1, 2))


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """Convert (B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8, to the nearest level."""
    pixels: NDArray[np.uint8] = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    return pixels


class ReconstructionTest:
    """Held-out pictures, to measure and show a first stage's reconstructions of.

    Args:
        pictures: the pictures of the pairs.
        held_out: places of pictures that are not trained on; the first of them are measured and shown.
        others: places of some of the rest, at least one; they fill up the grid, and are measured if nothing is held
            out.
        buckets: the bucket of each shard; empty if all pictures are of one size.

    Attributes:
        held_out: whether held-out pictures are measured.
        pixels: the pictures that are measured, a (N, H, W, 3) uint8 array for each bucket.
    """

    def __init__(
        self, pictures: Pictures, held_out: Sequence[Place], others: Sequence[Place], buckets: Sequence[str]
    ) -> None:
        first = pictures.get(others[0])
        count = min(MEASURED_PICTURES, max(SHOWN, MEASURED_PIXELS // (first.shape[0] * first.shape[1])))
        self.held_out = bool(held_out)
        self.pixels = _stacks(pictures, (held_out or others)[:count], buckets)
        self._shown = _stacks(pictures, [*held_out[:SHOWN], *others][:SHOWN], buckets)

    @torch.no_grad()
    def psnr_db(self, first_stage: nn.Module, device: torch.device) -> float:
        """Return the mean PSNR in dB over the pictures, decoded from the mode of the posterior (paper, Table 8)."""
        values = [
            psnr(x, self._reconstruct(first_stage, x))
            for pixels in self.pixels
            for x in (to_images(pixels[start : start + BATCH], device) for start in range(0, len(pixels), BATCH))
        ]
        return float(torch.cat(values).mean())

    @torch.no_grad()
    def grid(self, first_stage: nn.Module, device: torch.device) -> NDArray[np.uint8]:
        """Return eight originals above their reconstructions as one picture, (height, width, 3) uint8.

        Of pictures of several sizes the middle that all of them have.
        """
        decoded = [to_pixels(self._reconstruct(first_stage, to_images(pixels, device))) for pixels in self._shown]
        height, width = (min(pixels.shape[axis] for pixels in decoded) for axis in (1, 2))
        shown = np.concatenate([_middle(pixels, height, width) for pixels in (*self._shown, *decoded)])
        return grid(shown, columns=len(shown) // 2, scale=max(1, GRID_CELL_PIXELS // width))

    def grid_png(self, first_stage: nn.Module, device: torch.device) -> bytes:
        """Return the grid as a PNG file."""
        return encode_png(self.grid(first_stage, device))

    @staticmethod
    def _reconstruct(first_stage: nn.Module, x: Tensor) -> Tensor:
        # nn.Module: `encode` and `decode` are the first stages' own.
        decoded: Tensor = first_stage.decode(first_stage.encode(x).mode())  # type: ignore[operator]
        return decoded.float().clamp(-1, 1)


def _stacks(pictures: Pictures, places: Sequence[Place], buckets: Sequence[str]) -> list[NDArray[np.uint8]]:
    """Return pictures as an array for each bucket, or for all if there are no buckets."""
    found: dict[str, list[Place]] = {}
    for place in places:
        found.setdefault(buckets[place[0]] if buckets else "", []).append(place)
    return [pictures.stack(each) for each in found.values()]


def _middle(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return pixels[:, top : top + height, left : left + width]
