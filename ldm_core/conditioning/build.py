"""Build the conditioner that a configuration describes."""

from ldm_core.conditioning.frozen_text import FrozenClipConditioner, FrozenTextConditioner, JoinedTextConditioner
from ldm_core.conditioning.interface import Conditioner, Encode
from ldm_core.conditioning.labels import ClassConditioner
from ldm_core.conditioning.layout import LayoutConditioner
from ldm_core.conditioning.spatial import (
    LowResolutionConditioner,
    MaskedImageConditioner,
    SemanticMapConditioner,
)
from ldm_core.conditioning.text import TextConditioner
from ldm_core.configs.conditioning import (
    ClassConfig,
    ConditionerConfig,
    LayoutConfig,
    LowResolutionConfig,
    MaskedImageConfig,
    SemanticMapConfig,
)
from ldm_core.configs.text import ClipTextConfig, FrozenTextConfig, JoinedTextConfig, TextTransformerConfig


def build_conditioner(config: ConditionerConfig, *, encode: Encode | None = None) -> Conditioner:
    """Build the conditioner of a configuration, with random weights.

    Args:
        config: configuration of any kind.
        encode: maps images to unscaled latents; only masked images need it, as they are encoded before use.
    """
    match config:
        case TextTransformerConfig():
            return TextConditioner(config)
        case ClipTextConfig():
            return FrozenClipConditioner(config)
        case FrozenTextConfig():
            return FrozenTextConditioner(config)
        case JoinedTextConfig():
            return JoinedTextConditioner(config)
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
