"""Convert between CompVis YAML configurations, the files beside its checkpoints, and ours.

A setting that our networks do not have is refused by name; one that only concerns their training loop is ignored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ldm_core.checkpoint_formats.compvis.cond_stage import from_cond_stage, to_cond_stage
from ldm_core.checkpoint_formats.compvis.settings import Settings, check, differing, needed, section
from ldm_core.configs.conditioning import conditioner_kind
from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.model import Config, LatentDiffusionConfig
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.configs.unet import UNetConfig

# What they call "linear" is linear in sqrt(beta).
SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "cosine": "cosine"}

# Settings that our networks do not have, with the one value of theirs that ours compute (also their default).
UNET_FIXED = {
    "conv_resample": True,
    "dims": 2,
    "n_embed": None,
    "num_classes": None,
    "num_heads_upsample": -1,
    "use_new_attention_order": False,
}
CODER_FIXED = {"give_pre_end": False, "resamp_with_conv": True, "tanh_out": False, "use_linear_attn": False}
AUTOENCODER_FIXED = {"colorize_nlabels": None, "remap": None, "sane_index_shape": False}
MODEL_FIXED = {"cosine_s": 8e-3, "given_betas": None, "v_posterior": 0.0}

# The entry of a batch that the release's data sets keep each condition in.
COND_STAGE_KEYS = {
    "text": "caption",
    "frozen_clip": "txt",
    "class": "class_label",
    "layout": "coordinates_bbox",
    "semantic_map": "segmentation",
    "low_resolution": "LR_image",
    "masked_image": "masked_image",
}

# Settings of training, logging and memory.
UNET_IGNORED = ("legacy", "use_checkpoint", "use_fp16")
AUTOENCODER_IGNORED = (
    "batch_resize_range",
    "ckpt_path",
    "ignore_keys",
    "image_key",
    "learning_rate",
    "lossconfig",
    "lr_g_factor",
    "monitor",
    "scheduler_config",
    "use_ema",
)
MODEL_IGNORED = (
    "ckpt_path",
    "clip_denoised",
    "concat_mode",
    "cond_stage_forward",
    "cond_stage_key",
    "cond_stage_trainable",
    "first_stage_key",
    "ignore_keys",
    "l_simple_weight",
    "learn_logvar",
    "load_only_unet",
    "log_every_t",
    "logvar_init",
    "monitor",
    "num_timesteps_cond",
    "original_elbo_weight",
    "scale_by_std",
    "scheduler_config",
    "use_ema",
    "use_positional_encodings",
)

# Settings that are translated.
UNET_READ = (
    "attention_resolutions",
    "channel_mult",
    "context_dim",
    "dropout",
    "image_size",
    "in_channels",
    "model_channels",
    "num_head_channels",
    "num_heads",
    "num_res_blocks",
    "out_channels",
    "resblock_updown",
    "transformer_depth",
    "use_scale_shift_norm",
    "use_spatial_transformer",
)
CODER_READ = (
    "attn_type",
    "z_channels",
    "resolution",
    "in_channels",
    "ch",
    "ch_mult",
    "num_res_blocks",
    "attn_resolutions",
)
AUTOENCODER_READ = ("embed_dim", "n_embed", "ddconfig")
MODEL_READ = (
    "beta_schedule",
    "channels",
    "cond_stage_config",
    "conditioning_key",
    "first_stage_config",
    "image_size",
    "linear_end",
    "linear_start",
    "loss_type",
    "parameterization",
    "scale_factor",
    "timesteps",
    "unet_config",
)


def from_release(values: Settings) -> Config:
    """Build the configuration that a file of the release describes.

    Args:
        values: the file's content, as plain YAML reads it: `{"model": {"target": ..., "params": ...}, ...}`.

    Returns:
        A whole model's configuration or, if the target is an autoencoder, a first stage's.

    Raises:
        ValueError: a key is missing, or a setting has no counterpart here; it is named.
    """
    try:
        return _read(values)
    except TypeError as error:
        raise ValueError(f"the configuration must hold numbers where numbers are meant: {error}") from error


def _read(values: Settings) -> Config:
    model = section(values, "model")
    if not str(model.get("target")).endswith("LatentDiffusion"):
        return _first_stage(model)
    params = section(model, "params")
    check(params, "model.params", read=MODEL_READ, fixed=MODEL_FIXED, ignored=MODEL_IGNORED)
    unet = _unet(section(params, "unet_config"), params.get("image_size"))
    schedules = {theirs: ours for ours, theirs in SCHEDULES.items()}
    schedule = params.get("beta_schedule", "linear")
    if schedule not in schedules:
        raise ValueError(f"beta_schedule must be one of {', '.join(schedules)}, got {schedule!r}")
    return LatentDiffusionConfig(
        first_stage=_first_stage(section(params, "first_stage_config")),
        unet=unet,
        conditioner=from_cond_stage(params.get("cond_stage_config"), unet),
        schedule=ScheduleConfig(
            kind=schedules[schedule],  # type: ignore[arg-type]
            timesteps=params.get("timesteps", 1000),
            beta_start=float(params.get("linear_start", 1e-4)),
            beta_end=float(params.get("linear_end", 2e-2)),
        ),
        parameterization=params.get("parameterization", "eps"),
        loss=params.get("loss_type", "l2"),
        scale_factor=float(params.get("scale_factor", 1.0)),
    )


def to_release(config: Config) -> dict[str, Any]:
    """Return a configuration as the release writes it.

    Raises:
        ValueError: the release has no such model; the settings that it lacks are named.
    """
    if isinstance(config, FirstStageConfig):
        values: dict[str, Any] = {"model": _first_stage_section(config, interface=False)}
    else:
        values = {"model": _model_section(config)}
    # Whatever is lost in a round trip is what the release cannot express.
    lost = sorted(differing(dataclasses.asdict(config), dataclasses.asdict(from_release(values))))
    # How weights were initialized no longer matters once they are trained.
    if lost := [each for each in lost if "embedding_std" not in each]:
        raise ValueError(f"the code release has no such model, it cannot express {', '.join(lost)}")
    return values


def _model_section(config: LatentDiffusionConfig) -> dict[str, Any]:
    unet, schedule = config.unet, config.schedule
    if schedule.is_flow:
        raise ValueError("the code release has no such model, it cannot express schedule.kind=rectified_flow")
    cond_stage, conditioning_key = to_cond_stage(config.conditioner)
    params = {
        "linear_start": schedule.beta_start,
        "linear_end": schedule.beta_end,
        "beta_schedule": SCHEDULES[schedule.kind],
        "timesteps": schedule.timesteps,
        "parameterization": config.parameterization,
        "loss_type": config.loss,
        "image_size": unet.latent_size,
        "channels": config.first_stage.embed_dim,
        "conditioning_key": conditioning_key,
        "cond_stage_key": None if config.conditioner is None else COND_STAGE_KEYS[conditioner_kind(config.conditioner)],
        # Makes the factor a buffer, and so part of the checkpoint.
        "scale_by_std": True,
        "scale_factor": config.scale_factor,
        "use_ema": False,
        "unet_config": _unet_section(unet),
        "first_stage_config": _first_stage_section(config.first_stage, interface=True),
        "cond_stage_config": cond_stage,
    }
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}


def _unet_section(config: UNetConfig) -> dict[str, Any]:
    heads = {"num_heads": config.num_heads, "num_head_channels": config.num_head_channels}
    params = {
        "image_size": config.latent_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": config.model_channels,
        "num_res_blocks": config.num_res_blocks,
        "attention_resolutions": list(config.attention_downsampling),
        "channel_mult": list(config.channel_mult),
        "dropout": config.dropout,
        "use_scale_shift_norm": config.use_scale_shift_norm,
        "resblock_updown": config.resblock_up_down,
        "use_spatial_transformer": config.context_dim is not None,
        "transformer_depth": config.transformer_depth,
        "context_dim": config.context_dim,
    }
    params |= {name: value for name, value in heads.items() if value is not None}
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def _unet(given: Settings, image_size: int | None) -> UNetConfig:
    params = section(given, "params")
    check(params, "unet_config.params", read=UNET_READ, fixed=UNET_FIXED, ignored=UNET_IGNORED)
    if bool(params.get("use_spatial_transformer")) != (params.get("context_dim") is not None):
        raise ValueError("unet_config must set use_spatial_transformer and context_dim together or neither")
    heads, head_channels = (
        None if params.get(name, -1) in (-1, None) else params[name] for name in ("num_heads", "num_head_channels")
    )
    return UNetConfig(
        # The model's, not the network's own: theirs ignores that one, and in Stable Diffusion's file it is wrong.
        latent_size=image_size or needed(params, "image_size"),
        in_channels=needed(params, "in_channels"),
        out_channels=needed(params, "out_channels"),
        model_channels=needed(params, "model_channels"),
        num_res_blocks=needed(params, "num_res_blocks"),
        channel_mult=tuple(params.get("channel_mult", (1, 2, 4, 8))),
        attention_downsampling=tuple(needed(params, "attention_resolutions")),
        # If both are given, theirs goes by the channels.
        num_heads=None if head_channels else heads,
        num_head_channels=head_channels,
        context_dim=params.get("context_dim"),
        transformer_depth=params.get("transformer_depth", 1),
        use_scale_shift_norm=bool(params.get("use_scale_shift_norm")),
        resblock_up_down=bool(params.get("resblock_updown")),
        dropout=params.get("dropout", 0.0),
    )


def _first_stage_section(config: FirstStageConfig, *, interface: bool) -> dict[str, Any]:
    if config.norm_groups != 32:
        raise ValueError(f"the code release has no such model, it cannot express norm_groups={config.norm_groups}")
    is_kl = config.regularization == "kl"
    coder = {
        "double_z": is_kl,
        "z_channels": config.z_channels,
        "resolution": config.trained_at_resolution,
        "in_channels": config.in_channels,
        "out_ch": config.in_channels,
        "ch": config.base_channels,
        "ch_mult": list(config.channel_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": list(config.attention_resolutions),
        "attn_type": "vanilla" if config.mid_attention else "none",
        "dropout": 0.0,
    }
    params = {"embed_dim": config.embed_dim, "ddconfig": coder, "lossconfig": {"target": "torch.nn.Identity"}}
    params |= {} if is_kl else {"n_embed": config.codebook_size}
    name = "AutoencoderKL" if is_kl else "VQModelInterface" if interface else "VQModel"
    return {"target": f"ldm.models.autoencoder.{name}", "params": params}


def _first_stage(given: Settings) -> FirstStageConfig:
    name = str(given.get("target")).rpartition(".")[2]
    if name not in ("AutoencoderKL", "VQModel", "VQModelInterface"):
        raise ValueError(f"target must be LatentDiffusion, AutoencoderKL or VQModel, got {given.get('target')!r}")
    params = section(given, "params")
    check(params, "autoencoder params", read=AUTOENCODER_READ, fixed=AUTOENCODER_FIXED, ignored=AUTOENCODER_IGNORED)
    coder = section(params, "ddconfig")
    fixed = CODER_FIXED | {"double_z": name == "AutoencoderKL", "out_ch": coder.get("in_channels")}
    check(coder, "ddconfig", read=CODER_READ, fixed=fixed, ignored=("dropout",))
    if (attention := coder.get("attn_type", "vanilla")) not in ("vanilla", "none"):
        raise ValueError(f"ddconfig.attn_type must be vanilla or none, got {attention!r}")
    return FirstStageConfig(
        regularization="kl" if name == "AutoencoderKL" else "vq",
        in_channels=needed(coder, "in_channels"),
        base_channels=needed(coder, "ch"),
        channel_mult=tuple(needed(coder, "ch_mult")),
        num_res_blocks=needed(coder, "num_res_blocks"),
        attention_resolutions=tuple(needed(coder, "attn_resolutions")) if attention == "vanilla" else (),
        mid_attention=attention == "vanilla",
        z_channels=needed(coder, "z_channels"),
        embed_dim=needed(params, "embed_dim"),
        codebook_size=None if name == "AutoencoderKL" else needed(params, "n_embed"),
        trained_at_resolution=needed(coder, "resolution"),
    )
