"""Our models as folders that Hugging Face diffusers loads, written without needing it.

Every component's configuration as diffusers spells it; the weights' names are in `diffusers_weights`.
`export_pipeline` puts them together into what `diffusers.LDMTextToImagePipeline.from_pretrained` reads.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ldm_core.autoencoder import FirstStageConfig
from ldm_core.diffusers_weights import first_stage_weights, text_transformer_weights, unet_weights
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.schedule import ScheduleConfig
from ldm_core.text_transformer import TextTransformerConfig
from ldm_core.unet import UNetConfig

PIPELINE_MAX_LENGTH = 77  # LDMTextToImagePipeline pads every prompt to this
PIPELINE_DOWNSAMPLING_FACTOR = 8  # and divides image sizes by this
BETA_SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def unet_config(config: UNetConfig) -> dict[str, Any]:
    """Configuration of `UNet2DConditionModel` (with context) or `UNet2DModel` (without).

    Raises:
        ValueError: diffusers has no such network.
    """
    has_attention = [2**level in config.attention_downsampling for level in range(len(config.channel_mult))]
    settings: dict[str, Any] = {
        "sample_size": config.latent_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": [config.model_channels * mult for mult in config.channel_mult],
        "layers_per_block": config.num_res_blocks,
        "dropout": config.dropout,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
    }
    if config.context_dim is None:
        return settings | _unconditional_settings(config, has_attention)
    if config.resblock_up_down:
        raise ValueError(
            "diffusers has no cross-attention UNet with residual up/downsampling: "
            "UNetConfig.resblock_up_down must be False for export where context_dim is set"
        )
    return settings | {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": [f"{'CrossAttn' * attention}DownBlock2D" for attention in has_attention],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": [f"{'CrossAttn' * attention}UpBlock2D" for attention in reversed(has_attention)],
        "cross_attention_dim": config.context_dim,
        "transformer_layers_per_block": config.transformer_depth,
        # Despite its name diffusers takes this for the number of heads.
        "attention_head_dim": [config.heads(config.model_channels * mult) for mult in config.channel_mult],
    }


def _unconditional_settings(config: UNetConfig, has_attention: list[bool]) -> dict[str, Any]:
    widths = {config.model_channels * mult for mult in config.attention_mults}
    head_channels = {width // config.heads(width) for width in widths}
    if len(head_channels) > 1:
        raise ValueError(
            "diffusers' UNet2DModel has one number of channels a head everywhere; "
            f"num_heads={config.num_heads} gives {sorted(head_channels)}: set num_head_channels instead"
        )
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if config.resblock_up_down else None
    down, up = plain or ("DownBlock2D", "UpBlock2D")
    resample = "resnet" if config.resblock_up_down else "conv"
    return {
        "_class_name": "UNet2DModel",
        "down_block_types": ["AttnDownBlock2D" if attention else down for attention in has_attention],
        "up_block_types": ["AttnUpBlock2D" if attention else up for attention in reversed(has_attention)],
        "downsample_type": resample,
        "upsample_type": resample,
        "attention_head_dim": head_channels.pop(),
        "add_attention": True,
        "attn_norm_num_groups": 32,
    }


def first_stage_config(config: FirstStageConfig, *, scale_factor: float) -> dict[str, Any]:
    """Configuration of `AutoencoderKL` or `VQModel`; the scale factor is the model's.

    Raises:
        ValueError: diffusers has no such network.
    """
    is_kl = config.regularization == "kl"
    if is_kl and config.z_channels != config.embed_dim:
        raise ValueError(
            "diffusers' AutoencoderKL needs as many encoder channels as latent channels, "
            f"got z_channels={config.z_channels}, embed_dim={config.embed_dim}"
        )
    attention = [config.level_has_attention(level) for level in range(len(config.channel_mult))]
    specific = (
        {"_class_name": "AutoencoderKL"}
        if is_kl
        else {
            "_class_name": "VQModel",
            "num_vq_embeddings": config.codebook_size,
            "vq_embed_dim": config.embed_dim,
        }
    )
    return specific | {
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "down_block_types": [f"{'Attn' * each}DownEncoderBlock2D" for each in attention],
        "up_block_types": [f"{'Attn' * each}UpDecoderBlock2D" for each in reversed(attention)],
        "block_out_channels": [config.base_channels * mult for mult in config.channel_mult],
        "layers_per_block": config.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": config.z_channels,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.mid_attention,
        "sample_size": config.trained_at_resolution,
        "scaling_factor": scale_factor,
    }


def text_transformer_config(config: TextTransformerConfig) -> dict[str, Any]:
    """Configuration of `LDMBertModel`."""
    return {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "vocab_size": config.vocabulary_size,
        "max_position_embeddings": config.max_length,
        "encoder_layers": config.layers,
        "encoder_ffn_dim": 4 * config.width,
        "encoder_attention_heads": config.heads,
        "head_dim": config.head_dim,
        "d_model": config.width,
        "activation_function": "gelu",
        "dropout": 0.0,
        "pad_token_id": 0,
    }


def scheduler_config(config: ScheduleConfig, *, parameterization: str) -> dict[str, Any]:
    """Configuration of the `DDIMScheduler` that walks the timesteps of `samplers.ddim`."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": config.timesteps,
        "beta_schedule": BETA_SCHEDULES[config.kind],
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "prediction_type": PREDICTION_TYPES[parameterization],
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }


def export_pipeline(model: LatentDiffusion, vocabulary_file: str | Path, folder: str | Path) -> None:
    """Write a text-to-image model as a folder for `diffusers.LDMTextToImagePipeline.from_pretrained`.

    Args:
        model: a model with a text transformer.
        vocabulary_file: its tokenizer's vocab.txt, one token a line.
        folder: made if it does not exist; files of the same names are replaced.

    Raises:
        ValueError: the pipeline cannot run such a model.
        FileNotFoundError: there is no vocabulary file.
    """
    if model.conditioner is None:
        raise ValueError("LDMTextToImagePipeline needs a text-conditional model, got an unconditional one")
    text, first_stage = model.conditioner.transformer, model.first_stage
    _check_pipeline(text.config, first_stage.config)
    if not Path(vocabulary_file).is_file():
        raise FileNotFoundError(f"no vocabulary file at {vocabulary_file}; give the tokenizer's vocab.txt")
    folder = Path(folder)
    stage_config = first_stage_config(first_stage.config, scale_factor=model.scale_factor)
    _write_component(folder / "vqvae", "diffusion_pytorch_model", stage_config, first_stage_weights(first_stage))
    unet = unet_config(model.unet.config)
    _write_component(folder / "unet", "diffusion_pytorch_model", unet, unet_weights(model.unet))
    bert = text_transformer_config(text.config)
    _write_component(folder / "bert", "model", bert, text_transformer_weights(text))
    _write_tokenizer(folder / "tokenizer", Path(vocabulary_file))
    schedule = scheduler_config(model.config.schedule, parameterization=model.config.parameterization)
    _write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    index = {
        "_class_name": "LDMTextToImagePipeline",
        "bert": ["latent_diffusion", "LDMBertModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "BertTokenizer"],
        "unet": ["diffusers", unet["_class_name"]],
        "vqvae": ["diffusers", stage_config["_class_name"]],
    }
    _write_json(folder / "model_index.json", index)


def _check_pipeline(text: TextTransformerConfig, first_stage: FirstStageConfig) -> None:
    if text.max_length != PIPELINE_MAX_LENGTH:
        raise ValueError(
            f"LDMTextToImagePipeline pads prompts to {PIPELINE_MAX_LENGTH} tokens: "
            f"TextTransformerConfig.max_length must be that, got {text.max_length}"
        )
    if first_stage.downsampling_factor != PIPELINE_DOWNSAMPLING_FACTOR:
        raise ValueError(
            f"LDMTextToImagePipeline takes latents to be {PIPELINE_DOWNSAMPLING_FACTOR} times smaller than "
            f"images, got a first stage with downsampling factor {first_stage.downsampling_factor}"
        )


def _write_component(folder: Path, stem: str, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    _write_json(folder / "config.json", config)
    contiguous = {name: weight.detach().contiguous() for name, weight in weights.items()}
    save_file(contiguous, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def _write_tokenizer(folder: Path, vocabulary_file: Path) -> None:
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": PIPELINE_MAX_LENGTH,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    _write_json(folder / "tokenizer_config.json", settings)
    shutil.copyfile(vocabulary_file, folder / "vocab.txt")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
