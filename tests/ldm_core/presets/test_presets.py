"""The presets are the published models, to the last parameter, counted on the meta device."""

import json

import pytest
import torch
from torch import nn

from ldm_core import presets
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.networks.autoencoder import build_first_stage
from ldm_core.networks.unet import UNet

# Measured on the published code: encoder and decoder, then everything.
FIRST_STAGE_PARAMETERS = {
    "kl-f4": (55_312_009, 55_312_063),
    "kl-f8": (83_653_771, 83_653_863),
    "kl-f16": (69_609_635, 69_610_963),
    "kl-f32": (103_859_459, 103_880_131),
    "vq-f4": (55_298_182, 55_322_782),
    "vq-f4-noattn": (53_194_886, 53_219_486),
    "vq-f8": (67_651_719, 67_717_295),
    "vq-f8-n256": (67_651_719, 67_652_783),
    "vq-f16": (69_462_155, 69_593_371),
}
UNET_PARAMETERS = {
    "txt2img-1p4b": 872_300_484,
    "txt2img-256-f4": 403_623_939,
    "class-imagenet-256-f4": 400_920_579,
    "class-imagenet-256-f8": 394_984_196,
    "uncond-celebahq-256": 274_056_163,
    "uncond-ffhq-256": 274_056_163,
    "uncond-lsun-bedrooms-256": 274_056_163,
    "uncond-lsun-churches-256": 294_966_916,
    "layout-openimages-256": 246_277_379,
    "semantic-landscapes-256": 215_229_315,
    "semantic-landscapes-512": 215_229_315,
    "super-resolution-bsr": 113_622_563,
    "inpainting-big": 387_245_827,
    "sd-v1": 859_520_964,
}


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", FIRST_STAGE_PARAMETERS)
def test_first_stage_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        first_stage = build_first_stage(presets.first_stage(name))
    networks = parameters(first_stage.encoder) + parameters(first_stage.decoder)
    assert (networks, parameters(first_stage)) == FIRST_STAGE_PARAMETERS[name]
    assert f"-f{first_stage.config.downsampling_factor}" in name


@pytest.mark.parametrize("name", UNET_PARAMETERS)
def test_unet_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        assert parameters(UNet(presets.unet(name))) == UNET_PARAMETERS[name]


def test_text_to_image_model_is_the_1_45b_of_the_paper() -> None:
    model = presets.get("txt2img-1p4b").build(device="meta")
    assert model.conditioner is not None
    assert parameters(model.unet) + parameters(model.conditioner) == 1_454_294_526
    assert model.scale_factor == 0.18215


@pytest.mark.parametrize("name", presets.names())
def test_every_model_preset_builds_and_keeps_sizes_consistent(name: str) -> None:
    config = presets.get(name)
    model = config.build(device="meta")
    size = config.unet.latent_size
    latent = torch.empty(1, config.first_stage.embed_dim, size, size, device="meta")
    image_size = 64 if name.startswith("tiny") else 512 if name in ("sd-v1", "semantic-landscapes-512") else 256
    assert model.decode(latent).shape == (1, 3, image_size, image_size)


def test_every_published_model_is_a_preset_and_has_a_tiny_sibling_of_its_kind() -> None:
    published = {name for name in presets.names() if not name.startswith("tiny-")}
    assert published == set(UNET_PARAMETERS)
    tiny_kinds = {type(presets.get(name).conditioner) for name in presets.names() if name.startswith("tiny-")}
    assert tiny_kinds == {type(presets.get(name).conditioner) for name in published}


@pytest.mark.parametrize("name", presets.names())
def test_every_model_preset_survives_a_round_trip_through_json(name: str) -> None:
    config = presets.get(name)
    assert LatentDiffusionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("name", "parameters_of_conditioner"),
    [
        ("txt2img-1p4b", 581_994_042),
        ("txt2img-256-f4", 186_154_682),
        ("layout-openimages-256", 58_858_496),
        ("class-imagenet-256-f4", 1001 * 512),
        ("class-imagenet-256-f8", 1000 * 512),
        ("semantic-landscapes-256", 182 * 3),
        ("super-resolution-bsr", 0),
        ("inpainting-big", 0),
        # CLIP ViT-L/14's text transformer without its projection.
        ("sd-v1", 123_060_480),
    ],
)
def test_conditioners_have_the_published_number_of_parameters(name: str, parameters_of_conditioner: int) -> None:
    model = presets.get(name).build(device="meta")
    assert model.conditioner is not None
    assert parameters(model.conditioner) == parameters_of_conditioner


@pytest.mark.parametrize(
    ("lookup", "typo", "nearest"),
    [
        (presets.get, "txt2img-1p4", "txt2img-1p4b"),
        (presets.first_stage, "kl_f8", "kl-f8"),
        (presets.unet, "sd-1", "sd-v1"),
    ],
)
def test_unknown_preset_names_the_nearest(lookup: object, typo: str, nearest: str) -> None:
    assert callable(lookup)
    with pytest.raises(ValueError, match=rf"unknown .* preset '{typo}'; the nearest is '{nearest}'"):
        lookup(typo)
