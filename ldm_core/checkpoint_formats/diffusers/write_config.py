"""Write our configurations as diffusers does: the config.json of each of its networks."""

from __future__ import annotations

from typing import Any

from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.objective import Parameterization
from ldm_core.configs.schedule import ScheduleConfig, ScheduleKind
from ldm_core.configs.text import ClipTextConfig, TextTransformerConfig
from ldm_core.configs.unet import UNetConfig
from ldm_core.samplers import default_spacing

# Of chains; a rectified flow has none.
BETA_SCHEDULES: dict[ScheduleKind, str] = {
    "scaled_linear": "scaled_linear",
    "linear": "linear",
    "cosine": "squaredcos_cap_v2",
}
PREDICTION_TYPES: dict[Parameterization, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def unet_config(config: UNetConfig) -> dict[str, Any]:
    """Return the configuration of a `UNet2DConditionModel` (with context) or `UNet2DModel` (without).

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
        "down_block_types": ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in has_attention],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(has_attention)],
        "cross_attention_dim": config.context_dim,
        "transformer_layers_per_block": config.transformer_depth,
        # Despite its name, diffusers reads this as the number of heads.
        "attention_head_dim": [config.heads(config.model_channels * mult) for mult in config.channel_mult],
    }


def _unconditional_settings(config: UNetConfig, has_attention: list[bool]) -> dict[str, Any]:
    widths = {config.model_channels * mult for mult in config.attention_mults}
    head_channels: set[int | None] = {width // config.heads(width) for width in widths}
    if config.num_heads == 1:
        head_channels = {None}  # their way to say: all channels in one head
    if len(head_channels) > 1:
        raise ValueError(
            "diffusers' UNet2DModel has one number of channels a head everywhere; "
            f"num_heads={config.num_heads} gives {sorted(filter(None, head_channels))}: set num_head_channels instead"
        )
    down, up, resample = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", "resnet")
        if config.resblock_up_down
        else ("DownBlock2D", "UpBlock2D", "conv")
    )
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
    """Return the configuration of an `AutoencoderKL` or `VQModel`; the scale factor is the whole model's.

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
        "down_block_types": ["AttnDownEncoderBlock2D" if each else "DownEncoderBlock2D" for each in attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if each else "UpDecoderBlock2D" for each in reversed(attention)],
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
    """Return the configuration of an `LDMBertModel`."""
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


def clip_text_config(config: ClipTextConfig) -> dict[str, Any]:
    """Return the configuration of transformers' `CLIPTextModel`.

    Raises:
        ValueError: layers are left unused, which that class cannot do.
    """
    if config.unused_layers:
        raise ValueError(f"CLIPTextModel uses all of its layers, unused_layers must be 0, got {config.unused_layers}")
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocabulary_size,
        "max_position_embeddings": config.max_length,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
    }


def scheduler_config(config: ScheduleConfig, *, parameterization: Parameterization) -> dict[str, Any]:
    """Return the configuration of the `DDIMScheduler` that visits the timesteps of `samplers.ddim`.

    Raises:
        ValueError: for a rectified flow. StableDiffusionPipeline does not run with FlowMatchEulerDiscreteScheduler, and
            where LDMTextToImagePipeline does, that visits other timesteps than we do.
    """
    if config.is_flow or parameterization == "flow":
        raise ValueError("diffusers' pipelines of latent diffusion models sample no rectified_flow")
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": config.timesteps,
        "beta_schedule": BETA_SCHEDULES[config.kind],
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "prediction_type": PREDICTION_TYPES[parameterization],
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "timestep_spacing": default_spacing(config),
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }
