"""Conditioners: from what a user gives to what the UNet takes (paper, Sec. 3.3, tau_theta; Table 15).

    text         token ids, through a text transformer trained jointly with the UNet      -> context
    frozen_text  token ids, through a pretrained text encoder that is not trained         -> context
    labels       class labels, one embedding each                                         -> context
    layout       labelled bounding boxes as tokens, through a text transformer            -> context
    spatial      semantic map, low-resolution image, or masked image with its mask        -> concat
    interface    what they have in common, and dropping them for classifier-free guidance

`build_conditioner(config)` makes the one that a config describes.
"""

from ldm_core.conditioning.build import build_conditioner
from ldm_core.conditioning.frozen_text import FrozenClipConditioner, FrozenTextConditioner
from ldm_core.conditioning.interface import Conditioner, Conditioning, drop
from ldm_core.conditioning.labels import ClassConditioner
from ldm_core.conditioning.layout import LayoutConditioner
from ldm_core.conditioning.spatial import (
    LowResolutionConditioner,
    MaskedImage,
    MaskedImageConditioner,
    SemanticMapConditioner,
)
from ldm_core.conditioning.text import TextConditioner
from ldm_core.configs.conditioning import (
    Box,
    ClassConfig,
    ConditionerConfig,
    LayoutConfig,
    LowResolutionConfig,
    MaskedImageConfig,
    SemanticMapConfig,
)
from ldm_core.configs.text import ClipTextConfig, FrozenTextConfig

__all__ = [
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
    "drop",
]
