"""Read configurations of diffusers' networks, their config.json, as ours.

What was read is checked by writing it again: a setting that comes out different is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ldm_core.checkpoint_formats.diffusers import defaults
from ldm_core.checkpoint_formats.diffusers.write_config import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    clip_text_config,
    first_stage_config,
    text_transformer_config,
    unet_config,
)
from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.objective import Parameterization
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.configs.text import ClipTextConfig, TextTransformerConfig
from ldm_core.configs.unet import UNetConfig


def read_unet(given: Mapping[str, Any]) -> UNetConfig:
    """Read the UNet from the config.json of a `UNet2DConditionModel` or `UNet2DModel`.

    Raises:
        ValueError: we have no such network; the settings are named.
    """
    conditional = given.get("_class_name") == "UNet2DConditionModel"
    if not conditional and given.get("_class_name") != "UNet2DModel":
        raise ValueError(f"unet must be a UNet2DConditionModel or UNet2DModel, got {given.get('_class_name')!r}")
    known = defaults.UNET_2D_CONDITION if conditional else defaults.UNET_2D
    settings = {**known, **given}
    if settings.get("attn_norm_num_groups", 32) is None and settings["resnet_time_scale_shift"] == "default":
        settings["attn_norm_num_groups"] = settings["norm_num_groups"]
    channels = _sizes(settings, "block_out_channels")
    config = UNetConfig(
        latent_size=_size(settings, "sample_size"),
        in_channels=_size(settings, "in_channels"),
        out_channels=_size(settings, "out_channels"),
        model_channels=channels[0],
        num_res_blocks=_size(settings, "layers_per_block"),
        channel_mult=_multiples(channels),
        attention_downsampling=tuple(2**i for i, kind in enumerate(settings["down_block_types"]) if "Attn" in kind),
        **(_heads_by_number(settings, channels) if conditional else _heads_by_channels(settings)),
        context_dim=_size(settings, "cross_attention_dim") if conditional else None,
        transformer_depth=_size(settings, "transformer_layers_per_block") if conditional else 1,
        use_scale_shift_norm=settings["resnet_time_scale_shift"] == "scale_shift",
        resblock_up_down=settings.get("downsample_type") == "resnet",
        dropout=settings["dropout"],
    )
    _refuse_others(settings, unet_config(config), known, "unet")
    return config


def _heads_by_number(settings: Mapping[str, Any], channels: list[int]) -> dict[str, int]:
    heads = _sizes(settings, "attention_head_dim", length=len(channels))
    if len(set(heads)) == 1:
        return {"num_heads": heads[0]}
    head_channels = {width / number for width, number in zip(channels, heads, strict=True)}
    if len(head_channels) > 1:
        raise ValueError(f"unet.attention_head_dim must give heads of one number or one size, got {heads}")
    return {"num_head_channels": int(head_channels.pop())}


def _heads_by_channels(settings: Mapping[str, Any]) -> dict[str, int]:
    if settings["attention_head_dim"] is None:
        return {"num_heads": 1}
    return {"num_head_channels": _size(settings, "attention_head_dim")}


def read_first_stage(given: Mapping[str, Any]) -> tuple[FirstStageConfig, float]:
    """Read the first stage, and the scale factor of latents, from the config.json of an `AutoencoderKL` or `VQModel`.

    Raises:
        ValueError: we have no such network; the settings are named.
    """
    is_kl = given.get("_class_name") == "AutoencoderKL"
    if not is_kl and given.get("_class_name") != "VQModel":
        raise ValueError(f"the first stage must be an AutoencoderKL or VQModel, got {given.get('_class_name')!r}")
    known = defaults.AUTOENCODER_KL if is_kl else defaults.VQ_MODEL
    settings = {**known, **given}
    channels, resolution = _sizes(settings, "block_out_channels"), _size(settings, "sample_size")
    z_channels = _size(settings, "latent_channels")
    if settings.get("vq_embed_dim", 0) is None:
        settings["vq_embed_dim"] = z_channels
    config = FirstStageConfig(
        regularization="kl" if is_kl else "vq",
        in_channels=_size(settings, "in_channels"),
        base_channels=channels[0],
        channel_mult=_multiples(channels),
        num_res_blocks=_size(settings, "layers_per_block"),
        attention_resolutions=tuple(
            resolution // 2**i for i, kind in enumerate(settings["down_block_types"]) if "Attn" in kind
        ),
        mid_attention=settings["mid_block_add_attention"],
        z_channels=z_channels,
        embed_dim=z_channels if is_kl else _size(settings, "vq_embed_dim"),
        codebook_size=None if is_kl else _size(settings, "num_vq_embeddings"),
        trained_at_resolution=resolution,
        norm_groups=_size(settings, "norm_num_groups"),
    )
    scale_factor = float(settings["scaling_factor"])
    ours = first_stage_config(config, scale_factor=scale_factor)
    ours["scaling_factor"] = settings["scaling_factor"]
    _refuse_others(settings, ours, known, "first stage", ignored=defaults.AUTOENCODER_IGNORED)
    return config, scale_factor


def read_text_transformer(given: Mapping[str, Any]) -> TextTransformerConfig:
    """Read the text transformer from the config.json of an `LDMBertModel`. Raises ValueError as `read_unet`."""
    settings = {**defaults.LDM_BERT, **given}
    config = TextTransformerConfig(
        vocabulary_size=_size(settings, "vocab_size"),
        max_length=_size(settings, "max_position_embeddings"),
        width=_size(settings, "d_model"),
        layers=_size(settings, "encoder_layers"),
        heads=_size(settings, "encoder_attention_heads"),
        head_dim=_size(settings, "head_dim"),
    )
    ours = text_transformer_config(config)
    _refuse_others(settings, ours, defaults.LDM_BERT, "bert", ignored=defaults.TEXT_MODEL_IGNORED)
    return config


def read_clip_text(given: Mapping[str, Any]) -> ClipTextConfig:
    """Read the text transformer from the config.json of a `CLIPTextModel`. Raises ValueError as `read_unet`."""
    if given.get("model_type", "clip_text_model") != "clip_text_model":
        raise ValueError(f"text_encoder must be a CLIPTextModel, got model_type={given['model_type']!r}")
    settings = {**defaults.CLIP_TEXT, **given}
    config = ClipTextConfig(
        vocabulary_size=_size(settings, "vocab_size"),
        max_length=_size(settings, "max_position_embeddings"),
        width=_size(settings, "hidden_size"),
        layers=_size(settings, "num_hidden_layers"),
        heads=_size(settings, "num_attention_heads"),
        feed_forward_width=_size(settings, "intermediate_size"),
        activation=settings["hidden_act"],
    )
    ignored = set(defaults.TEXT_MODEL_IGNORED) - {"num_hidden_layers"}
    _refuse_others(settings, clip_text_config(config), defaults.CLIP_TEXT, "text_encoder", ignored=ignored)
    return config


def read_scheduler(given: Mapping[str, Any]) -> tuple[ScheduleConfig, Parameterization]:
    """Read the forward process, and the parameterization of the UNet, from a scheduler_config.json.

    Which timesteps are visited is the sampler's business, and not part of a model.

    Raises:
        ValueError: we have no such process; the setting is named.
    """
    settings = {**defaults.SCHEDULER, **given}
    kinds = {theirs: ours for ours, theirs in BETA_SCHEDULES.items()}
    parameterizations = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    for name, choices in (("beta_schedule", kinds), ("prediction_type", parameterizations), ("trained_betas", [None])):
        if settings[name] not in list(choices):
            raise ValueError(f"scheduler.{name} must be {' or '.join(map(str, choices))}, got {settings[name]!r}")
    config = ScheduleConfig(
        timesteps=_size(settings, "num_train_timesteps"),
        kind=kinds[settings["beta_schedule"]],
        beta_start=float(settings["beta_start"]),
        beta_end=float(settings["beta_end"]),
        zero_terminal_snr=bool(settings["rescale_betas_zero_snr"]),
    )
    return config, parameterizations[settings["prediction_type"]]


def _refuse_others(
    settings: Mapping[str, Any],
    ours: Mapping[str, Any],
    known: Mapping[str, Any],
    where: str,
    ignored: Collection[str] = (),
) -> None:
    """Refuse settings that differ from what export would write for our network, and settings that are unknown.

    Args:
        settings: the file's settings, completed by diffusers' defaults.
        ours: the settings that `write_config` gives for the configuration read.
        known: diffusers' defaults, which our networks compute where `ours` says nothing.
        where: the network's name, for error messages.
        ignored: names of settings that do not affect what the network computes.
    """
    for name, value in settings.items():
        if name.startswith("_") or name in ignored:
            continue
        if name not in ours and name not in known:
            # A setting newer than this code, which None switches off.
            if value is not None:
                raise ValueError(f"{where}.{name} has no counterpart here, got {value!r}")
            continue
        expected = ours.get(name, known.get(name))
        if _spread(value, expected) != _spread(expected, value):
            raise ValueError(f"{where}.{name} must be {expected!r} for a network of ours, got {value!r}")


def _spread(value: Any, like: Any) -> Any:
    """Repeat a value for every level if the other side lists one value per level."""
    if isinstance(value, list | tuple):
        return list(value)
    return [value] * len(like) if isinstance(like, list | tuple) else value


def _size(settings: Mapping[str, Any], name: str) -> int:
    """Return a positive integer, which may be given once per level."""
    sizes = set(_sizes(settings, name))
    if len(sizes) > 1:
        raise ValueError(f"{name} must be one number, got {settings[name]!r}")
    return sizes.pop()


def _sizes(settings: Mapping[str, Any], name: str, length: int = 1) -> list[int]:
    value = settings.get(name)
    given = list(value) if isinstance(value, list | tuple) else [value] * length
    sizes = [size for size in given if isinstance(size, int) and size > 0]
    if not sizes or len(sizes) < len(given):
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return sizes


def _multiples(channels: list[int]) -> tuple[int, ...]:
    if any(width % channels[0] for width in channels):
        raise ValueError(f"block_out_channels must be multiples of the first, got {channels}")
    return tuple(width // channels[0] for width in channels)
