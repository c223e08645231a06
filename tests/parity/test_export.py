"""An exported folder, loaded by diffusers, must render what our model renders."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldm_core import presets
from ldm_core.autoencoder import FirstStageConfig
from ldm_core.diffusers_format import export_pipeline, first_stage_config, unet_config
from ldm_core.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from ldm_core.samplers import initial_noise
from ldm_core.schedule import ScheduleConfig
from ldm_core.text_transformer import TextTransformerConfig
from ldm_core.tokenizer import Tokenizer, build_vocabulary

diffusers = pytest.importorskip("diffusers")

VQ_F8 = dataclasses.replace(
    presets.first_stage("tiny-kl-f8"), regularization="vq", codebook_size=64, legacy_codebook_loss=False
)
CAPTIONS = ["a red circle", "two blue squares above a café"]


@pytest.fixture(autouse=True)
def _single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_vocabulary(build_vocabulary(CAPTIONS, size=200), max_length=77)


@pytest.fixture(scope="module")
def vocabulary_file(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    tokenizer.write(path)
    return path


def build_model(vocabulary_size: int, **changes: object) -> LatentDiffusion:
    tiny = presets.get("tiny-txt2img")
    text = TextTransformerConfig(vocabulary_size=vocabulary_size, width=128, layers=2, heads=4, head_dim=32)
    values = {"first_stage": tiny.first_stage, "unet": tiny.unet, "conditioner": text, "scale_factor": 0.7}
    torch.manual_seed(0)
    model = LatentDiffusionConfig(**(values | changes)).build()  # type: ignore[arg-type]
    # Zero-initialized layers would predict no noise at all; large random ones would saturate the picture.
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.mark.parametrize(
    ("first_stage", "parameterization", "guidance_scale"),
    [(presets.first_stage("tiny-kl-f8"), "eps", 3.0), (VQ_F8, "v", 1.0)],
    ids=["kl, eps, guided", "vq, v, not guided"],
)
def test_exported_pipeline_renders_the_same_image_from_the_same_noise(
    tokenizer: Tokenizer,
    vocabulary_file: Path,
    tmp_path: Path,
    first_stage: FirstStageConfig,
    parameterization: str,
    guidance_scale: float,
) -> None:
    model = build_model(
        tokenizer.vocabulary_size,
        first_stage=first_stage,
        parameterization=parameterization,
        schedule=ScheduleConfig(beta_start=0.0015, beta_end=0.0195),
    )
    export_pipeline(model, vocabulary_file, tmp_path)
    pipeline = diffusers.LDMTextToImagePipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [3, 4]
    theirs = pipeline(
        CAPTIONS,
        num_inference_steps=5,
        guidance_scale=guidance_scale,
        latents=initial_noise(seeds, (4, 8, 8)),
        output_type="np",
    ).images
    ours = model.sample(
        torch.from_numpy(tokenizer.encode(CAPTIONS).astype(np.int64)),
        empty_tokens=torch.from_numpy(tokenizer.encode([""]).astype(np.int64)),
        seeds=seeds,
        num_steps=5,
        guidance_scale=guidance_scale,
    )
    assert theirs.std() > 0.05
    difference = np.abs((ours.permute(0, 2, 3, 1).numpy() + 1) / 2 - theirs)
    assert difference.max() <= 1 / 255


def test_exported_pipeline_tokenizes_alike(tokenizer: Tokenizer, vocabulary_file: Path, tmp_path: Path) -> None:
    export_pipeline(build_model(tokenizer.vocabulary_size), vocabulary_file, tmp_path)
    loaded = diffusers.LDMTextToImagePipeline.from_pretrained(tmp_path).tokenizer
    captions = [*CAPTIONS, "", "unseen Words!", "red " * 100]
    ids = loaded(captions, padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids
    assert np.array_equal(ids, tokenizer.encode(captions))


def test_published_text_to_image_model_gets_the_published_settings() -> None:
    config = presets.get("txt2img-1p4b")
    unet = unet_config(config.unet)
    assert unet["block_out_channels"] == [320, 640, 1280, 1280]
    assert unet["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert unet["attention_head_dim"] == [8, 8, 8, 8]
    first_stage = first_stage_config(config.first_stage, scale_factor=config.scale_factor)
    assert first_stage["scaling_factor"] == 0.18215
    assert json.loads(json.dumps([unet, first_stage])) == [unet, first_stage]


def test_export_refuses_models_the_pipeline_cannot_run(vocabulary_file: Path, tmp_path: Path) -> None:
    tiny = presets.get("tiny-txt2img")
    short = TextTransformerConfig(vocabulary_size=200, max_length=32, width=128, layers=1)
    with pytest.raises(ValueError, match=r"max_length must be that, got 32"):
        export_pipeline(build_model(200, conditioner=short), vocabulary_file, tmp_path)
    unconditional = LatentDiffusionConfig(
        first_stage=tiny.first_stage, unet=presets.get("uncond-lsun-churches-256").unet
    ).build("meta")
    with pytest.raises(ValueError, match="needs a text-conditional model"):
        export_pipeline(unconditional, vocabulary_file, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no vocabulary file at .*absent\.txt"):
        export_pipeline(build_model(200), tmp_path / "absent.txt", tmp_path)


def test_conversion_refuses_networks_diffusers_lacks() -> None:
    with pytest.raises(ValueError, match="set num_head_channels instead"):
        unet_config(presets.unet("uncond-lsun-churches-256"))
