"""Layouts: labelled bounding boxes written as tokens (paper, Sec. 4.3.1, Appendix D.3: layout-to-image).

An object is three tokens: its class and two corners of its box; a corner's token is its cell in a grid over the
image. Objects that are not there, and what a layout lacks, are the last token of the vocabulary. Two more tokens give
the corners of the crop of the original image that is wanted, as the released model was trained on crops.
"""

from __future__ import annotations

from torch import Tensor

from ldm_core.conditioning.interface import Conditioner, Conditioning
from ldm_core.configs.conditioning import LayoutConfig
from ldm_core.networks.text_transformer import TextTransformer


class LayoutConditioner(Conditioner):
    """Tokens (B, L) of layouts, from `LayoutConfig.encode`, to a context (B, L, D)."""

    def __init__(self, config: LayoutConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = TextTransformer(config.transformer)

    def unconditional(self) -> Tensor:
        """(1, L) the layout without objects."""
        return self.config.encode([])[None]

    def forward(self, tokens: Tensor) -> Conditioning:
        """Tokens (B, L) of any integer type -> context (B, L, D). Raises ValueError as the transformer does."""
        return Conditioning(context=self.transformer(tokens))
