"""The presets agree with a list of every published fact about the models."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ldm_core import presets
from ldm_core.configs.conditioning import (
    ClassConfig,
    LayoutConfig,
    LowResolutionConfig,
    MaskedImageConfig,
    SemanticMapConfig,
)
from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.text import ClipTextConfig, TextTransformerConfig

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def published(shared_data: Path) -> dict[str, Any]:
    facts: dict[str, Any] = yaml.safe_load((shared_data.parent / "paper_presets.yaml").read_text(encoding="utf-8"))
    return facts


def test_first_stages_are_as_published(published: dict[str, Any]) -> None:
    for name, facts in published["first_stages"].items():
        assert presets.first_stage(name) == FirstStageConfig(
            regularization=facts["regularization"],
            base_channels=facts["base_channels"],
            channel_mult=tuple(facts["channel_mult"]),
            num_res_blocks=facts["num_res_blocks"],
            attention_resolutions=tuple(facts["attention_at_resolution"]),
            mid_attention=facts["mid_attention"],
            z_channels=facts["z_channels"],
            embed_dim=facts["embed_dim"],
            codebook_size=facts.get("codebook_size"),
            trained_at_resolution=facts["trained_at_resolution"],
        ), name
        assert presets.first_stage(name).downsampling_factor == facts["downsampling_factor"]


def test_models_are_as_published(published: dict[str, Any]) -> None:
    for name, facts in published["models"].items():
        config, unet = presets.get(name), facts["unet"]
        assert config.first_stage == presets.first_stage(facts["first_stage"]), name
        assert set(config.unet.attention_downsampling) == set(unet["attention_at_downsampling"]), name
        for field in ("latent_size", "in_channels", "out_channels", "model_channels", "num_res_blocks"):
            assert getattr(config.unet, field) == unet[field], (name, field)
        assert list(config.unet.channel_mult) == unet["channel_mult"], name
        for field in ("num_heads", "num_head_channels", "context_dim"):
            assert getattr(config.unet, field) == unet.get(field), (name, field)
        assert config.unet.transformer_depth == unet.get("transformer_depth", 1), name
        assert config.unet.use_scale_shift_norm == unet.get("use_scale_shift_norm", False), name
        assert config.unet.resblock_up_down == unet.get("resblock_up_down", False), name
        schedule = facts["schedule"]
        assert (config.schedule.kind, config.schedule.timesteps) == ("scaled_linear", schedule["timesteps"]), name
        assert (config.schedule.beta_start, config.schedule.beta_end) == (schedule["beta_start"], schedule["beta_end"])
        assert config.loss == facts["loss"], name
        if isinstance(facts["scale_factor"], float):
            assert config.scale_factor == facts["scale_factor"], name


def test_conditioners_are_as_published(published: dict[str, Any]) -> None:
    for name, facts in published["models"].items():
        conditioner, wanted = presets.get(name).conditioner, facts["conditioning"]
        expected: Any = None
        if wanted["kind"] == "tokens_transformer" and wanted["max_length"] == 92:
            expected = LayoutConfig(width=wanted["width"], layers=wanted["layers"], heads=wanted["heads"])
            assert expected.max_length == wanted["max_length"]
            assert expected.vocabulary_size == wanted["vocabulary"]
        elif wanted["kind"] == "tokens_transformer":
            expected = TextTransformerConfig(
                vocabulary_size=wanted["vocabulary"],
                max_length=wanted["max_length"],
                width=wanted["width"],
                layers=wanted["layers"],
                heads=wanted["heads"],
                head_dim=wanted["head_dim"],
            )
        elif wanted["kind"] == "class_embedding":
            # The model with one class more than ImageNet has was trained with it as no class.
            expected = ClassConfig(
                classes=wanted["classes"], width=wanted["width"], unconditional_class=wanted["classes"] == 1001
            )
        elif wanted["kind"] == "concat_rescaled_map":
            expected = SemanticMapConfig(
                classes=wanted["in_channels"], halvings=wanted["halvings"], out_channels=wanted["out_channels"]
            )
        elif wanted["kind"] == "concat_low_resolution_image":
            expected = LowResolutionConfig()
        elif wanted["kind"] == "concat_masked_image_latent_and_mask":
            expected = MaskedImageConfig()
        elif wanted["kind"] == "frozen_clip_text":
            expected = ClipTextConfig(width=wanted["width"], max_length=wanted["max_length"])
        else:
            assert wanted["kind"] == "none"
        assert conditioner == expected, name
