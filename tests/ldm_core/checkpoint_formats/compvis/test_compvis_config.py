"""The release's YAML files: settings are read, refused by name if we lack them, ignored if they concern training."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldm_core import presets
from ldm_core.checkpoint_formats import compvis
from ldm_core.checkpoint_formats.compvis.config import from_release, to_release

# The published text-to-image model in the release's terms, with some settings of training.
CODER = {"ch": 128, "ch_mult": [1, 2, 4, 4], "z_channels": 4, "num_res_blocks": 2, "attn_resolutions": []}
CODER |= {"resolution": 256, "in_channels": 3, "out_ch": 3, "double_z": True, "dropout": 0.0}
UNET = {"model_channels": 320, "channel_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attention_resolutions": [4, 2, 1]}
UNET |= {"num_heads": 8, "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 1280}
UNET |= {"image_size": 32, "in_channels": 4, "out_channels": 4, "use_checkpoint": True, "legacy": False}
TEXT_TO_IMAGE = {
    "model": {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "base_learning_rate": 5e-5,
        "params": {
            "timesteps": 1000,
            "linear_start": 0.00085,
            "linear_end": 0.012,
            "image_size": 32,
            "channels": 4,
            "scale_factor": 0.18215,
            "conditioning_key": "crossattn",
            "cond_stage_key": "caption",
            "monitor": "val/loss_simple_ema",
            "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET},
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {"embed_dim": 4, "ddconfig": CODER, "lossconfig": {"target": "torch.nn.Identity"}},
            },
            "cond_stage_config": {
                "target": "ldm.modules.encoders.modules.BERTEmbedder",
                "params": {"n_embed": 1280, "n_layer": 32},
            },
        },
    },
    "data": {"target": "main.DataModuleFromConfig"},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return the configuration above with one setting changed."""
    values: dict[str, Any] = copy.deepcopy(TEXT_TO_IMAGE)
    place = values["model"]["params"]
    *sections, name = path.split(".")
    for section in sections:
        place = place[section]
    place[name] = value
    return values


def test_a_file_of_the_release_is_the_preset_of_its_model(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(TEXT_TO_IMAGE), encoding="utf-8")
    assert compvis.load_configuration(tmp_path / "x.yaml") == presets.get("txt2img-1p4b")


@pytest.mark.parametrize("name", [name for name in presets.names() if not name.startswith("tiny")])
def test_every_published_model_survives_a_round_trip(name: str) -> None:
    values = yaml.safe_load(yaml.safe_dump(to_release(presets.get(name))))
    assert from_release(values) == presets.get(name)


@pytest.mark.parametrize("name", [name for name in presets.FIRST_STAGE_CONFIGS if not name.startswith("tiny")])
def test_every_published_first_stage_survives_a_round_trip(name: str) -> None:
    values = yaml.safe_load(yaml.safe_dump(to_release(presets.first_stage(name))))
    assert from_release(values) == presets.first_stage(name)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("unet_config.params.num_classes", 10, r"unet_config\.params\.num_classes must be None, got 10"),
        ("unet_config.params.use_new_attention_order", True, "use_new_attention_order must be False"),
        ("unet_config.params.wavelets", 3, r"unet_config\.params\.wavelets has no counterpart here, got 3"),
        ("unet_config.params.context_dim", None, "use_spatial_transformer and context_dim together"),
        ("unet_config.params.model_channels", None, "lacks model_channels"),
        ("unet_config.params.model_channels", "320", "must hold numbers where numbers are meant"),
        ("unet_config.params.in_channels", "${model.params.channels}", "must be a plain value, got the interpolation"),
        ("first_stage_config.params.ddconfig.tanh_out", True, r"ddconfig\.tanh_out must be False"),
        ("first_stage_config.params.ddconfig.attn_type", "linear", "attn_type must be vanilla or none, got 'linear'"),
        ("first_stage_config.params.ddconfig.double_z", False, r"ddconfig\.double_z must be True"),
        ("first_stage_config.target", "x.Autoencoder3D", "target must be LatentDiffusion, AutoencoderKL or VQModel"),
        ("cond_stage_config.target", "x.AudioEmbedder", r"no counterpart here: 'x\.AudioEmbedder'"),
        ("cond_stage_config", "__is_odd__", "must be a section with a target, got '__is_odd__'"),
        ("beta_schedule", "sigmoid", "beta_schedule must be one of linear, sqrt_linear, cosine, got 'sigmoid'"),
        ("given_betas", [0.1], "given_betas must be None"),
        ("hypernetwork", "x", r"model\.params\.hypernetwork has no counterpart"),
        ("first_stage_config", None, "must have a section 'first_stage_config'"),
    ],
)
def test_settings_that_our_networks_lack_are_refused_by_name(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_release(changed(path, value))


def test_settings_of_training_alone_are_ignored() -> None:
    for path, value in (("scheduler_config", {"target": "x"}), ("unet_config.params.use_checkpoint", False)):
        assert from_release(changed(path, value)) == presets.get("txt2img-1p4b")


def test_the_size_of_the_latents_is_the_models_not_the_networks_own() -> None:
    """In Stable Diffusion's file they differ, and theirs ignores the network's."""
    values = changed("image_size", 64)
    assert from_release(values).unet.latent_size == 64  # type: ignore[union-attr]


def test_settings_that_the_release_cannot_express_are_named() -> None:
    for name, message in (
        ("tiny-txt2img", "cannot express norm_groups=16"),
        ("tiny-layout", r"cannot express conditioner\.head_dim=16, conditioner\.heads=4"),
        ("tiny-class", r"cannot express conditioner\.unconditional_class=True"),
    ):
        with pytest.raises(ValueError, match=message):
            to_release(presets.get(name))


def test_files_that_are_no_configuration_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text, message in (
        ("model: [", "while parsing"),
        ("just text", "must have a section 'model'"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message) as error:
            compvis.load_configuration(path)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no configuration at"):
        compvis.load_configuration(tmp_path / "absent.yaml")
