"""Run the first stage on images larger than memory: tile by tile, overlaps blended (paper, Sec. 4.3.2 and 4.4).

Tiles are measured in latent pixels; one latent pixel is f x f image pixels. Only one tile at a time is on the first
stage's device. Input and result stay on the input's device, so that a large image can be kept in main memory.

Shapes: x: (B, 3, H, W) images in [-1, 1]; z: (B, C, h, w) latents with h = H / f.
"""

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from ldm_core.networks.autoencoder import AutoencoderKL, VQAutoencoder
from ldm_core.networks.posterior import DiagonalGaussian, PointPosterior, Posterior


@torch.no_grad()
def tiled_encode(
    first_stage: AutoencoderKL | VQAutoencoder, x: Tensor, *, tile_size: int = 64, overlap: int = 16
) -> Posterior:
    """Encode images of any size in bounded memory; an image that fits into one tile is encoded as a whole.

    Each tile sees its own pixels only. Group norms and attention act within the tile, so that the latents are close to
    the untiled ones, not equal.

    Args:
        first_stage: a KL or VQ autoencoder.
        x: (B, 3, H, W) in [-1, 1]; H and W are multiples of the downsampling factor f.
        tile_size: height and width of a tile in latent pixels.
        overlap: latent pixels that neighbouring tiles share, blended linearly.

    Returns:
        Posterior over (B, embed_dim, h, w), on x's device; a KL posterior's mean and logvar are both blended.

    Raises:
        ValueError: if x has another shape, or overlap is not at least 0 and below tile_size.
    """
    factor = first_stage.config.downsampling_factor
    _check_tiles(tile_size, overlap)
    if x.ndim != 4 or x.shape[2] % factor or x.shape[3] % factor or _fits(x.shape[2:], factor * tile_size):
        return first_stage.encode(x)  # which also raises the errors for what is no image
    size = (x.shape[2] // factor, x.shape[3] // factor)
    device = next(first_stage.parameters()).device

    def encode(rows: slice, columns: slice) -> Tensor:
        pixels = x[..., _scaled(rows, factor), _scaled(columns, factor)]
        return first_stage.encode(pixels.to(device)).moments

    moments = _blend(encode, size, tile_size, overlap, scale=1, like=x)
    return PointPosterior(moments[:, 0]) if moments.shape[1] == 1 else DiagonalGaussian.from_moments(moments)


@torch.no_grad()
def tiled_decode(
    first_stage: AutoencoderKL | VQAutoencoder, z: Tensor, *, tile_size: int = 64, overlap: int = 16
) -> Tensor:
    """Decode latents of any size in bounded memory; a latent that fits into one tile is decoded as a whole.

    Args:
        first_stage: a KL or VQ autoencoder.
        z: (B, embed_dim, h, w) latent, not scaled.
        tile_size: height and width of a tile in latent pixels.
        overlap: latent pixels that neighbouring tiles share, blended linearly over f times as many image pixels.

    Returns:
        (B, 3, f * h, f * w) images on z's device.

    Raises:
        ValueError: if z has another shape, or overlap is not at least 0 and below tile_size.
    """
    _check_tiles(tile_size, overlap)
    if z.ndim != 4 or _fits(z.shape[2:], tile_size):
        return first_stage.decode(z)  # which also raises the errors for what is no latent
    device = next(first_stage.parameters()).device

    def decode(rows: slice, columns: slice) -> Tensor:
        return first_stage.decode(z[..., rows, columns].to(device))

    size = (z.shape[2], z.shape[3])
    return _blend(decode, size, tile_size, overlap, scale=first_stage.config.downsampling_factor, like=z)


def _blend(
    compute: Callable[[slice, slice], Tensor],
    size: tuple[int, int],
    tile_size: int,
    overlap: int,
    *,
    scale: int,
    like: Tensor,
) -> Tensor:
    """Return the weighted sum of all tiles, on like's device; one latent pixel is `scale` pixels of the result."""
    result: Tensor | None = None
    axes = [list(_windows(length, tile_size, overlap, scale)) for length in size]
    for (rows, row_weights), (columns, column_weights) in product(*axes):
        tile = compute(rows, columns)
        if result is None:
            # The first tile tells the channels and the dtype.
            shape = (*tile.shape[:-2], scale * size[0], scale * size[1])
            result = torch.zeros(shape, dtype=tile.dtype, device=like.device)
        weights = torch.outer(row_weights, column_weights).to(tile)
        result[..., _scaled(rows, scale), _scaled(columns, scale)] += (weights * tile).to(like.device)
    assert result is not None
    return result


def _windows(length: int, tile_size: int, overlap: int, scale: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the tiles along one axis with their blending weights, which sum to one at every pixel of the result."""
    stride, tile_size = tile_size - overlap, min(tile_size, length)
    # The last tile ends at the border, and so may overlap its neighbour more than the others do.
    starts = [*range(0, length - tile_size, stride), length - tile_size]
    ramp = torch.arange(1, scale * tile_size + 1, dtype=torch.float64)
    # A trapezoid: linear where two tiles overlap, level elsewhere. Dividing by the sum of all windows makes the
    # weights sum to one also at the border, where there is no neighbour, and where the last tile overlaps more.
    window = torch.minimum(ramp, ramp.flip(0)).clamp(max=scale * overlap + 1)
    total = torch.zeros(scale * length, dtype=torch.float64)
    for start in starts:
        total[scale * start : scale * (start + tile_size)] += window
    for start in starts:
        yield slice(start, start + tile_size), window / total[scale * start : scale * (start + tile_size)]


def _scaled(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)


def _fits(size: torch.Size, tile: int) -> bool:
    return max(size) <= tile


def _check_tiles(tile_size: int, overlap: int) -> None:
    if not 0 <= overlap < tile_size:
        raise ValueError(
            "tiles must be larger than their overlap and the overlap at least 0, "
            f"got tile_size={tile_size}, overlap={overlap} latent pixels"
        )
