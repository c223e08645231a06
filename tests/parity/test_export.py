"""Exported folders: diffusers renders from them what our model renders, and its converter agrees with ours."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm_core import presets, samplers
from ldm_core.checkpoint_formats.compvis import checkpoint as compvis
from ldm_core.checkpoint_formats.diffusers import defaults as diffusers_defaults
from ldm_core.checkpoint_formats.diffusers import export_folder, import_folder
from ldm_core.checkpoint_formats.diffusers.write_config import first_stage_config, unet_config
from ldm_core.conditioning import TextConditioner
from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.configs.text import ClipTextConfig, TextTransformerConfig
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.networks.autoencoder import build_first_stage
from ldm_core.samplers import initial_noise
from ldm_core.tokenizers.clip import CLIP_END, open_clip_tokenizer
from ldm_core.tokenizers.tokenizer import Tokenizer
from ldm_core.tokenizers.wordpiece import build_vocabulary
from tests.diffusers_weights import diffusers_weights
from tests.random_weights import without_zeros

diffusers = pytest.importorskip("diffusers")

VQ_F8 = dataclasses.replace(
    presets.first_stage("tiny-kl-f8"), regularization="vq", codebook_size=64, legacy_codebook_loss=True
)
CAPTIONS = ["a red circle", "two blue squares above a café"]


@pytest.fixture(autouse=True)
def _single_thread(own_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_vocabulary(build_vocabulary(CAPTIONS, size=200), max_length=77)


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("clip") / "tokenizer.json"
    open_clip_tokenizer().write(path)
    return Tokenizer.from_json_file(path, pad_token=CLIP_END)


def build_model(**changes: object) -> LatentDiffusion:
    tiny = presets.get("tiny-txt2img")
    values = {"first_stage": tiny.first_stage, "unet": tiny.unet, "scale_factor": 0.7}
    torch.manual_seed(0)
    model = LatentDiffusionConfig(**(values | changes)).build()  # type: ignore[arg-type]
    # Zero-initialized layers would predict no noise at all; large random ones would saturate the picture.
    return without_zeros(model).eval()


def text(vocabulary_size: int) -> TextTransformerConfig:
    return TextTransformerConfig(vocabulary_size=vocabulary_size, width=128, layers=2, heads=4, head_dim=32)


def tokens(tokenizer: Tokenizer, captions: list[str]) -> torch.Tensor:
    return torch.from_numpy(tokenizer.encode(captions).astype(np.int64))


def assert_same_picture(ours: torch.Tensor, theirs: npt.NDArray[np.float32]) -> None:
    assert theirs.std() > 0.05
    assert np.abs((ours.permute(0, 2, 3, 1).numpy() + 1) / 2 - theirs).max() <= 1 / 255


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("first_stage", "parameterization", "guidance_scale", "zero_terminal_snr"),
    [
        (presets.first_stage("tiny-kl-f8"), "eps", 3.0, False),
        (VQ_F8, "v", 1.0, False),
        (presets.first_stage("tiny-kl-f8"), "v", 3.0, True),
    ],
    ids=["kl, eps, guided", "vq, v, not guided", "kl, v, zero terminal SNR"],
)
def test_exported_text_pipeline_renders_the_same_image_from_the_same_noise(
    tokenizer: Tokenizer,
    tmp_path: Path,
    first_stage: FirstStageConfig,
    parameterization: str,
    guidance_scale: float,
    zero_terminal_snr: bool,
) -> None:
    model = build_model(
        conditioner=text(tokenizer.vocabulary_size),
        first_stage=first_stage,
        parameterization=parameterization,
        schedule=ScheduleConfig(beta_start=0.0015, beta_end=0.0195, zero_terminal_snr=zero_terminal_snr),
    )
    export_folder(model, tmp_path, tokenizer=tokenizer)
    seeds = [3, 4]
    theirs = quiet(diffusers.LDMTextToImagePipeline.from_pretrained(tmp_path))(
        CAPTIONS,
        num_inference_steps=5,
        guidance_scale=guidance_scale,
        latents=initial_noise(seeds, (4, 8, 8)),
        output_type="np",
    ).images
    ours = model.sample(
        tokens(tokenizer, CAPTIONS),
        unconditional=tokens(tokenizer, [""]),
        seeds=seeds,
        num_steps=5,
        guidance_scale=guidance_scale,
    )
    assert_same_picture(ours, theirs)


def test_exported_stable_diffusion_renders_the_same_image_from_the_same_noise(
    clip_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    clip = ClipTextConfig(width=32, layers=2, heads=4, feed_forward_width=64)
    unet = dataclasses.replace(presets.get("tiny-txt2img").unet, context_dim=32)
    model = build_model(conditioner=clip, unet=unet)
    export_folder(model, tmp_path, tokenizer=clip_tokenizer)
    pipeline = quiet(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path))
    captions = [*CAPTIONS, "", "Unseen   WORDS 123!?", "red " * 100]
    ids = pipeline.tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="np")
    assert np.array_equal(ids.input_ids, clip_tokenizer.encode(captions))
    theirs = pipeline(
        CAPTIONS,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=initial_noise([3, 4], (4, 8, 8)),
        output_type="np",
    ).images
    ours = model.sample(
        tokens(clip_tokenizer, CAPTIONS),
        unconditional=tokens(clip_tokenizer, [""]),
        seeds=[3, 4],
        num_steps=4,
        guidance_scale=3.0,
    )
    assert_same_picture(ours, theirs)
    # And we read what diffusers writes, text encoder included.
    pipeline.save_pretrained(tmp_path / "saved")
    found = import_folder(tmp_path / "saved")
    assert found.config == model.config
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in model.state_dict().items())
    assert found.tokenizer is not None
    assert np.array_equal(found.tokenizer.encode(captions), clip_tokenizer.encode(captions))


@pytest.mark.parametrize("one_head", [False, True], ids=["heads of 16", "one head"])
def test_exported_unconditional_pipeline_renders_the_same_image_from_the_same_noise(
    tmp_path: Path, one_head: bool
) -> None:
    heads = {"num_heads": 1} if one_head else {"num_heads": None, "num_head_channels": 16}
    tiny = presets.get("tiny-uncond")
    unet = dataclasses.replace(tiny.unet, **heads)  # type: ignore[arg-type]
    model = build_model(first_stage=tiny.first_stage, unet=unet, schedule=tiny.schedule)
    export_folder(model, tmp_path)
    pipeline = quiet(diffusers.LDMPipeline.from_pretrained(tmp_path))
    theirs = pipeline(generator=torch.Generator().manual_seed(5), num_inference_steps=4, output_type="np").images
    noise = torch.randn(1, 3, *[unet.latent_size] * 2, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        z = samplers.ddim(model.guided_denoiser(), noise, model.schedule, num_steps=4)
        ours = model.decode(z).clamp(-1, 1)
    assert_same_picture(ours, theirs)
    pipeline.save_pretrained(tmp_path / "saved")
    assert import_folder(tmp_path / "saved").config == model.config


@pytest.mark.parametrize("name", ["tiny-kl-f8", "tiny-vq-f4"])
def test_exported_first_stage_is_the_same_network(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(presets.first_stage(name), mid_attention=True, attention_resolutions=(16,))
    first_stage = build_first_stage(config).eval()
    kind = export_folder(first_stage, tmp_path)
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path)
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        encoded = theirs.encode(x)
        latent = encoded.latent_dist.mode() if kind == "AutoencoderKL" else encoded.latents
        torch.testing.assert_close(first_stage.encode(x).mode(), latent, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(first_stage.decode(latent), theirs.decode(latent).sample, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "saved")
    found = import_folder(tmp_path / "saved")
    assert found.config == config
    assert all(torch.equal(found.weights[key], tensor) for key, tensor in first_stage.state_dict().items())


def test_diffusers_own_conversion_of_our_compvis_export_is_our_diffusers_export(
    clip_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Both tables of names, by other people's code: A -> CompVis -> (diffusers) -> diffusers is A -> diffusers."""
    from diffusers.loaders import single_file_utils as theirs
    from diffusers.pipelines.stable_diffusion.convert_from_ckpt import convert_ldm_bert_checkpoint

    tiny = presets.get("tiny-sd")
    with_attention = dataclasses.replace(tiny.first_stage, mid_attention=True)
    clip = ClipTextConfig(width=64, layers=2, heads=4, feed_forward_width=128)
    model = build_model(conditioner=clip, unet=tiny.unet, first_stage=with_attention)
    state = compvis.export_state(model)
    levels = [None] * len(tiny.first_stage.channel_mult)
    export_folder(model, tmp_path, tokenizer=clip_tokenizer)
    converted = {
        "unet": theirs.convert_ldm_unet_checkpoint(state, {"layers_per_block": tiny.unet.num_res_blocks}),
        "vae": theirs.convert_ldm_vae_checkpoint(state, {"down_block_types": levels, "up_block_types": levels}),
        "text_encoder": theirs.convert_ldm_clip_checkpoint(state),
    }
    for part, found in converted.items():
        (path,) = (tmp_path / part).glob("*.safetensors")
        weights = load_file(path)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())

    class Names:
        """Stands in for the release's modules, whose attributes diffusers' conversion of the text transformer reads."""

        def __init__(self, tensors: dict[str, torch.Tensor], path: str) -> None:
            self.tensors, self.path = tensors, path

        def __getattr__(self, name: str) -> Any:
            path = f"{self.path}.{name}"
            return nn.Parameter(self.tensors[path]) if path in self.tensors else Names(self.tensors, path)

        def __getitem__(self, key: Any) -> Any:
            if isinstance(key, slice):
                return [self[i] for i in range(key.start, key.stop)]
            return Names(self.tensors, f"{self.path}.{key}")

    text_model = build_model(conditioner=text(50))
    assert isinstance(text_model.conditioner, TextConditioner)
    bert = diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion
    settings = {"vocab_size": 50, "d_model": 128, "encoder_layers": 2, "encoder_ffn_dim": 512}
    config = bert.LDMBertConfig(**settings, encoder_attention_heads=4, head_dim=32)
    reference = convert_ldm_bert_checkpoint(Names(compvis.export_state(text_model), "cond_stage_model"), config)
    weights = diffusers_weights(text_model.conditioner.transformer)
    assert reference.state_dict().keys() == weights.keys()
    assert all(torch.equal(reference.state_dict()[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        (diffusers.UNet2DConditionModel, diffusers_defaults.UNET_2D_CONDITION),
        (diffusers.UNet2DModel, diffusers_defaults.UNET_2D),
        (diffusers.AutoencoderKL, diffusers_defaults.AUTOENCODER_KL),
        (diffusers.VQModel, diffusers_defaults.VQ_MODEL),
        (diffusers.DDIMScheduler, diffusers_defaults.SCHEDULER),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_defaults_we_assume_are_those_of_diffusers(kind: type, known: dict[str, Any]) -> None:
    signature = inspect.signature(kind.__init__).parameters
    theirs = {name: p.default for name, p in signature.items() if name != "self"}
    theirs = {name: list(value) if isinstance(value, tuple) else value for name, value in theirs.items()}
    assert {name: theirs.get(name) for name in known} == known
    if kind is not diffusers.DDIMScheduler:
        assert known.keys() == theirs.keys()


def test_an_exported_pipeline_tokenizes_as_our_tokenizer_does(tokenizer: Tokenizer, tmp_path: Path) -> None:
    export_folder(build_model(conditioner=text(tokenizer.vocabulary_size)), tmp_path, tokenizer=tokenizer)
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


def test_export_refuses_models_the_pipeline_cannot_run(tokenizer: Tokenizer, tmp_path: Path) -> None:
    short = TextTransformerConfig(vocabulary_size=200, max_length=32, width=128, layers=1)
    with pytest.raises(ValueError, match=r"max_length must be that, got 32"):
        export_folder(build_model(conditioner=short), tmp_path, tokenizer=tokenizer)
    f4 = dataclasses.replace(presets.first_stage("tiny-kl-f8"), channel_mult=(1, 2, 4))
    with pytest.raises(ValueError, match="got a first stage with downsampling factor 4"):
        export_folder(build_model(conditioner=text(200), first_stage=f4), tmp_path, tokenizer=tokenizer)
    assert not any(tmp_path.iterdir())


def test_conversion_refuses_networks_diffusers_lacks() -> None:
    with pytest.raises(ValueError, match="set num_head_channels instead"):
        unet_config(presets.unet("uncond-lsun-churches-256"))
