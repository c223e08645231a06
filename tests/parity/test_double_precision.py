"""Networks against diffusers' in float64, which shows what float32 hides: a norm's eps, an approximate GELU."""

import pytest
import torch

from ldm_core import presets
from ldm_core.networks.autoencoder import build_first_stage
from ldm_core.networks.unet import UNet
from tests.benchmarks import peers
from tests.random_weights import randomized


@pytest.mark.parametrize("name", ["tiny-txt2img", "tiny-sd"])
@torch.no_grad()
def test_a_unet_computes_what_diffusers_computes_to_ten_digits(name: str) -> None:
    unet = randomized(UNet(presets.unet(name))).double().eval()
    theirs = peers.diffusers_unet(unet).double().eval()  # type: ignore[arg-type]
    z, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([3, 981])
    context = torch.randn(2, 7, unet.config.context_dim, dtype=torch.float64)  # type: ignore[union-attr, arg-type]
    expected = theirs(z, t, encoder_hidden_states=context).sample
    torch.testing.assert_close(unet(z, t, context=context), expected, rtol=1e-10, atol=1e-10 * float(expected.std()))


@pytest.mark.parametrize("name", ["tiny-kl-f8", "tiny-vq-f4"])
@torch.no_grad()
def test_a_first_stage_computes_what_diffusers_computes_to_ten_digits(name: str) -> None:
    ours = randomized(build_first_stage(presets.first_stage(name))).double().eval()
    theirs = peers.diffusers_first_stage(ours).double().eval()  # type: ignore[arg-type]
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64) * 2 - 1
    latent = ours.encode(x).mode()  # type: ignore[operator]
    encoded = theirs.encode(x)
    expected = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    torch.testing.assert_close(latent, expected, rtol=1e-10, atol=1e-10 * float(expected.std()))
    image = theirs.decode(latent).sample
    torch.testing.assert_close(ours.decode(latent), image, rtol=1e-10, atol=1e-10 * float(image.std()))  # type: ignore[operator]
