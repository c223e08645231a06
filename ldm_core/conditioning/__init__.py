"""Conditioners: from a user's inputs to the UNet's (paper, Sec. 3.3, tau_theta; Table 15).

text         token ids, through a text transformer trained jointly with the UNet      -> context
frozen_text  token ids, through pretrained text encoders that are not trained         -> context
labels       class labels, one embedding each                                         -> context
layout       labelled bounding boxes as tokens, through a text transformer            -> context
spatial      semantic map, low-resolution image, or masked image with its mask        -> concat
interface    their common base, and dropping conditions to train classifier-free guidance
build        the conditioner of a configuration (`configs.conditioning`, `configs.text`)
"""

from ldm_core.conditioning.build import build_conditioner
from ldm_core.conditioning.frozen_text import FrozenClipConditioner, FrozenTextConditioner, JoinedTextConditioner
from ldm_core.conditioning.interface import Conditioner, Conditioning, Shared, drop
from ldm_core.conditioning.labels import ClassConditioner
from ldm_core.conditioning.layout import LayoutConditioner
from ldm_core.conditioning.spatial import (
    LowResolutionConditioner,
    MaskedImage,
    MaskedImageConditioner,
    MaskedLatent,
    SemanticMapConditioner,
)
from ldm_core.conditioning.text import TextConditioner

__all__ = [
    "ClassConditioner",
    "Conditioner",
    "Conditioning",
    "FrozenClipConditioner",
    "FrozenTextConditioner",
    "JoinedTextConditioner",
    "LayoutConditioner",
    "LowResolutionConditioner",
    "MaskedImage",
    "MaskedImageConditioner",
    "MaskedLatent",
    "SemanticMapConditioner",
    "Shared",
    "TextConditioner",
    "build_conditioner",
    "drop",
]
