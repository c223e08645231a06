"""Conditioners: from what a user gives to what the UNet takes (paper, Sec. 3.3, tau_theta; Table 15).

    text         token ids, through a text transformer trained jointly with the UNet      -> context
    frozen_text  token ids, through a pretrained text encoder that is not trained         -> context
    labels       class labels, one embedding each                                         -> context
    layout       labelled bounding boxes as tokens, through a text transformer            -> context
    spatial      semantic map, low-resolution image, or masked image with its mask        -> concat
    interface    what they have in common, and dropping them for classifier-free guidance

`build_conditioner(config)` makes the one that a config describes.
"""

from collections.abc import Mapping

from ldm_core.conditioning.frozen_text import FrozenClipConditioner, FrozenTextConditioner, FrozenTextConfig
from ldm_core.conditioning.interface import Conditioner, Conditioning, Encode, drop
from ldm_core.conditioning.labels import ClassConditioner, ClassConfig
from ldm_core.conditioning.layout import Box, LayoutConditioner, LayoutConfig
from ldm_core.conditioning.spatial import (
    LowResolutionConditioner,
    LowResolutionConfig,
    MaskedImage,
    MaskedImageConditioner,
    MaskedImageConfig,
    SemanticMapConditioner,
    SemanticMapConfig,
)
from ldm_core.conditioning.text import TextConditioner
from ldm_core.networks.clip_text import ClipTextConfig
from ldm_core.networks.text_transformer import TextTransformerConfig

ConditionerConfig = (
    TextTransformerConfig
    | ClipTextConfig
    | FrozenTextConfig
    | ClassConfig
    | LayoutConfig
    | SemanticMapConfig
    | LowResolutionConfig
    | MaskedImageConfig
)

# The names that saved configs know them by.
CONDITIONER_KINDS: Mapping[str, type[ConditionerConfig]] = {
    "text": TextTransformerConfig,
    "frozen_clip": ClipTextConfig,
    "frozen_text": FrozenTextConfig,
    "class": ClassConfig,
    "layout": LayoutConfig,
    "semantic_map": SemanticMapConfig,
    "low_resolution": LowResolutionConfig,
    "masked_image": MaskedImageConfig,
}


def build_conditioner(config: ConditionerConfig, *, encode: Encode | None = None) -> Conditioner:
    """The conditioner of a config, with random weights.

    Args:
        config: one of the kinds above.
        encode: images to latents that are not scaled; a masked image is conditioned on in latent space.
    """
    match config:
        case TextTransformerConfig():
            return TextConditioner(config)
        case ClipTextConfig():
            return FrozenClipConditioner(config)
        case FrozenTextConfig():
            return FrozenTextConditioner(config)
        case ClassConfig():
            return ClassConditioner(config)
        case LayoutConfig():
            return LayoutConditioner(config)
        case SemanticMapConfig():
            return SemanticMapConditioner(config)
        case LowResolutionConfig():
            return LowResolutionConditioner(config)
        case MaskedImageConfig():
            return MaskedImageConditioner(config, encode=encode)


def kind_of(config: ConditionerConfig) -> str:
    """The name that saved configs know this config's kind by."""
    return next(name for name, kind in CONDITIONER_KINDS.items() if type(config) is kind)


def context_dim(config: ConditionerConfig | None) -> int | None:
    """D of the context that a conditioner gives for cross-attention; None where it gives none."""
    return getattr(config, "width", None)


def concat_channels(config: ConditionerConfig | None, latent_channels: int) -> int:
    """Channels that a conditioner adds to the UNet's input, for latents of so many channels."""
    match config:
        case SemanticMapConfig():
            return config.out_channels
        case LowResolutionConfig():
            return config.channels
        case MaskedImageConfig():
            return latent_channels + 1
    return 0


__all__ = [
    "CONDITIONER_KINDS",
    "Box",
    "ClassConditioner",
    "ClassConfig",
    "ClipTextConfig",
    "Conditioner",
    "ConditionerConfig",
    "Conditioning",
    "FrozenClipConditioner",
    "FrozenTextConditioner",
    "FrozenTextConfig",
    "LayoutConditioner",
    "LayoutConfig",
    "LowResolutionConditioner",
    "LowResolutionConfig",
    "MaskedImage",
    "MaskedImageConditioner",
    "MaskedImageConfig",
    "SemanticMapConditioner",
    "SemanticMapConfig",
    "TextConditioner",
    "build_conditioner",
    "concat_channels",
    "context_dim",
    "drop",
    "kind_of",
]
