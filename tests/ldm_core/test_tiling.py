"""Tiled encoding and decoding: bounded tiles, no seams, exact where one tile is enough."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.networks.autoencoder import build_first_stage
from ldm_core.networks.posterior import DiagonalGaussian, PointPosterior
from ldm_core.tiling import tiled_decode, tiled_encode

VQ = {"regularization": "vq", "codebook_size": 32}


def first_stage(**changes: Any) -> Any:
    base: dict[str, Any] = {
        "regularization": "kl",
        "base_channels": 8,
        "channel_mult": (1, 2, 2),
        "num_res_blocks": 1,
        "mid_attention": False,
        "z_channels": 4,
        "embed_dim": 3,
        "trained_at_resolution": 32,
        "norm_groups": 8,
    }
    torch.manual_seed(0)
    return build_first_stage(FirstStageConfig(**(base | changes))).eval()


def without_norms(stage: nn.Module) -> nn.Module:
    """Group norms read the whole map; without them a pixel depends on its neighbourhood only."""
    for module in stage.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return stage


def seen_sizes(part: nn.Module) -> list[tuple[int, ...]]:
    """Fills, as the part is called, with the heights and widths that it was given."""
    sizes: list[tuple[int, ...]] = []
    part.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[2:])))
    return sizes


@pytest.mark.parametrize("changes", [{}, VQ], ids=["kl", "vq"])
def test_what_fits_into_one_tile_is_computed_as_a_whole(changes: dict[str, Any]) -> None:
    stage = first_stage(**changes)
    x, z = torch.randn(2, 3, 32, 24), torch.randn(2, 3, 8, 6)
    with torch.no_grad():
        assert torch.equal(tiled_encode(stage, x, tile_size=8, overlap=2).moments, stage.encode(x).moments)
        assert torch.equal(tiled_decode(stage, z, tile_size=8, overlap=2), stage.decode(z))


@pytest.mark.parametrize(("changes", "kind"), [({}, DiagonalGaussian), (VQ, PointPosterior)], ids=["kl", "vq"])
def test_large_images_pass_in_tiles_of_bounded_size(changes: dict[str, Any], kind: type) -> None:
    stage = first_stage(**changes)
    encoded, decoded = seen_sizes(stage.encoder), seen_sizes(stage.decoder)
    with torch.no_grad():
        posterior = tiled_encode(stage, torch.randn(1, 3, 100, 60), tile_size=8, overlap=3)
        image = tiled_decode(stage, torch.randn(1, 3, 25, 5), tile_size=8, overlap=3)
    assert isinstance(posterior, kind)
    assert posterior.mode().shape == (1, 3, 25, 15)
    assert image.shape == (1, 3, 100, 20)
    # 25 latent rows in tiles of 8 that advance by 5: 0, 5, 10, 15 and the last at 17; 15 columns: 0, 5 and 7.
    assert encoded == [(32, 32)] * 5 * 3
    assert decoded == [(8, 5)] * 5


def test_far_from_a_tile_border_local_networks_give_the_untiled_result() -> None:
    stage = without_norms(first_stage())
    x, z = torch.randn(1, 3, 32, 96), torch.randn(1, 3, 8, 24)
    with torch.no_grad():
        latent, image = stage.encode(x).mode(), stage.decode(z)
        tiled_latent = tiled_encode(stage, x, tile_size=16, overlap=8).mode()
        tiled_image = tiled_decode(stage, z, tile_size=16, overlap=8)
    # Two tiles, columns 0-15 and 8-23: outside the overlap and five latent pixels from where the other one ends.
    torch.testing.assert_close(tiled_latent[..., :3], latent[..., :3])
    torch.testing.assert_close(tiled_image[..., -12:], image[..., -12:])
    assert relative_error(tiled_image, image) < 0.1
    assert relative_error(tiled_latent, latent) < 0.1


def test_overlaps_blend_without_seams() -> None:
    stage = first_stage()
    z = torch.randn(1, 3, 4, 40)
    with torch.no_grad():
        whole, blended, butted = (
            stage.decode(z),
            tiled_decode(stage, z, tile_size=16, overlap=8),
            tiled_decode(stage, z, tile_size=16, overlap=0),
        )

    def step_at(image: Tensor, column: int) -> float:
        return float(
            (image[..., column] - image[..., column - 1] - (whole[..., column] - whole[..., column - 1])).norm()
        )

    assert step_at(blended, 64) < 0.5 * step_at(butted, 64)
    assert relative_error(blended, whole) < relative_error(butted, whole)


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


@pytest.mark.parametrize(("tile_size", "overlap"), [(8, 8), (8, -1), (0, 0)])
def test_impossible_tiles_are_refused(tile_size: int, overlap: int) -> None:
    message = f"overlap at least 0, got tile_size={tile_size}, overlap={overlap} latent pixels"
    with pytest.raises(ValueError, match=message):
        tiled_decode(first_stage(), torch.zeros(1, 3, 16, 16), tile_size=tile_size, overlap=overlap)
    with pytest.raises(ValueError, match=message):
        tiled_encode(first_stage(), torch.zeros(1, 3, 64, 64), tile_size=tile_size, overlap=overlap)


def test_odd_sizes_and_foreign_latents_are_named_before_any_tile_is_computed() -> None:
    with pytest.raises(ValueError, match=r"multiples of 4, got shape \(1, 3, 66, 64\)"):
        tiled_encode(first_stage(), torch.zeros(1, 3, 66, 64), tile_size=8, overlap=2)
    with pytest.raises(ValueError, match=r"latents must be \(B, 3, h, w\), got shape"):
        tiled_decode(first_stage(), torch.zeros(1, 4, 16, 16), tile_size=8, overlap=2)
