"""Convert between CompVis conditioners (`cond_stage_config`) and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_core.checkpoint_formats.compvis.settings import check, needed
from ldm_core.configs.conditioning import (
    ClassConfig,
    ConditionerConfig,
    LayoutConfig,
    LowResolutionConfig,
    MaskedImageConfig,
    SemanticMapConfig,
)
from ldm_core.configs.text import ClipTextConfig, TextTransformerConfig
from ldm_core.configs.unet import UNetConfig

ENCODERS = "ldm.modules.encoders.modules"
# Default of their `ClassEmbedder`.
IMAGENET_CLASSES = 1000
# The one CLIP whose shape `ClipTextConfig()` has.
CLIP_VERSION = "openai/clip-vit-large-patch14"


def to_cond_stage(config: ConditionerConfig | None) -> tuple[Any, str | None]:
    """Return a conditioner as the release writes it, and how it reaches the UNet (`conditioning_key`).

    Raises:
        ValueError: the release has no such conditioner.
    """
    match config:
        case TextTransformerConfig() | LayoutConfig():
            transformer = {
                "n_embed": config.width,
                "n_layer": config.layers,
                "vocab_size": config.vocabulary_size,
                "max_seq_len": config.max_length,
                "use_tokenizer": isinstance(config, TextTransformerConfig),
            }
            return _encoder("BERTEmbedder", transformer), "crossattn"
        case ClipTextConfig():
            return _encoder("FrozenCLIPEmbedder", {"version": CLIP_VERSION, "max_length": 77}), "crossattn"
        case ClassConfig():
            classes = {"n_classes": config.classes, "embed_dim": config.width, "key": "class_label"}
            return _encoder("ClassEmbedder", classes), "crossattn"
        case SemanticMapConfig():
            channels = {"in_channels": config.classes, "out_channels": config.out_channels}
            return _encoder("SpatialRescaler", {"n_stages": config.halvings, **channels}), "concat"
        case LowResolutionConfig():
            return {"target": "torch.nn.Identity"}, "concat"
        case MaskedImageConfig():
            return "__is_first_stage__", "concat"
        case None:
            return "__is_unconditional__", None
    raise ValueError(f"the code release has no such conditioner: {type(config).__name__}")


def from_cond_stage(section: Any, unet: UNetConfig) -> ConditionerConfig | None:
    """Build the configuration of the conditioner that a `cond_stage_config` describes.

    Args:
        section: the value of `cond_stage_config`: a section with a target, or one of the release's keywords.
        unet: the model's UNet; a low-resolution image has as many channels as its input has beyond the latent's.

    Raises:
        ValueError: we have no such conditioner, or not with this setting, which is named.
    """
    if section in ("__is_unconditional__", None):
        return None
    if section == "__is_first_stage__":
        return MaskedImageConfig()
    if not isinstance(section, Mapping):
        raise ValueError(f"cond_stage_config must be a section with a target, got {section!r}")
    target, params = str(section.get("target")), section.get("params") or {}
    match target.rpartition(".")[2]:
        case "BERTEmbedder" | "TransformerEmbedder" as name:
            return _transformer(params, tokenized=name == "BERTEmbedder" and params.get("use_tokenizer", True))
        case "FrozenCLIPEmbedder":
            fixed = {"version": CLIP_VERSION, "max_length": 77}
            check(params, "FrozenCLIPEmbedder", read=(), fixed=fixed, ignored=("device",))
            return ClipTextConfig()
        case "ClassEmbedder":
            check(params, "ClassEmbedder", read=("n_classes", "embed_dim"), ignored=("key",))
            classes = params.get("n_classes", IMAGENET_CLASSES)
            # The release's model with one class more than ImageNet was trained with the last as "no class".
            return ClassConfig(
                classes=classes,
                width=needed(params, "embed_dim"),
                unconditional_class=classes == IMAGENET_CLASSES + 1,
            )
        case "SpatialRescaler":
            fixed = {"method": "bilinear", "multiplier": 0.5, "bias": False}
            check(params, "SpatialRescaler", read=("n_stages", "in_channels", "out_channels"), fixed=fixed)
            return SemanticMapConfig(
                classes=needed(params, "in_channels"),
                halvings=params.get("n_stages", 1),
                out_channels=needed(params, "out_channels"),
            )
        case "Identity":
            return LowResolutionConfig(channels=unet.in_channels - unet.out_channels)
    raise ValueError(f"cond_stage_config.target has no counterpart here: {target!r}")


def _encoder(name: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"target": f"{ENCODERS}.{name}", "params": params}


def _transformer(params: Mapping[str, Any], *, tokenized: bool) -> TextTransformerConfig | LayoutConfig:
    read = ("n_embed", "n_layer", "vocab_size", "max_seq_len", "use_tokenizer")
    check(params, "BERTEmbedder", read=read, ignored=("device", "embedding_dropout"))
    width, layers = needed(params, "n_embed"), needed(params, "n_layer")
    vocabulary_size, length = params.get("vocab_size", 30_522), params.get("max_seq_len", 77)
    if tokenized:
        return TextTransformerConfig(vocabulary_size=vocabulary_size, max_length=length, width=width, layers=layers)
    if (length - 2) % 3:
        raise ValueError(f"a layout's max_seq_len must be two more than a multiple of three, got {length}")
    return LayoutConfig(width=width, layers=layers, vocabulary_size=vocabulary_size, max_objects=(length - 2) // 3)
