"""Layouts: labelled bounding boxes written as tokens (paper, Sec. 4.3.1, Appendix D.3: layout-to-image).

An object is three tokens: its class and two corners of its box; a corner's token is its cell in a grid over the
image. A layout with fewer objects than `max_objects` is filled up with the last token of the vocabulary. Two more
tokens give the corners of the crop to generate, because the released model was trained on crops.
"""

from __future__ import annotations

from torch import Tensor

from ldm_core.conditioning.interface import Conditioner, Conditioning
from ldm_core.configs.conditioning import LayoutConfig
from ldm_core.networks.text_transformer import TextTransformer


class LayoutConditioner(Conditioner):
    """Maps tokens (B, L) of layouts, from `LayoutConfig.encode`, to a context (B, L, D)."""

    def __init__(self, config: LayoutConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = TextTransformer(config.transformer)

    def unconditional(self) -> Tensor:
        """Return the layout without objects, (1, L)."""
        return self.config.encode([])[None]

    def forward(self, tokens: Tensor) -> Conditioning:
        """Tokens (B, L) of any integer type -> context (B, L, D). Raises ValueError as the transformer does."""
        return Conditioning(context=self.transformer(tokens))
