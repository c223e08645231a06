"""Captions through the text transformer that is trained jointly with the UNet (paper, Sec. 4.3.1, Table 15)."""

from __future__ import annotations

from torch import Tensor

from ldm_core.conditioning.interface import Conditioner, Conditioning
from ldm_core.configs.text import TextTransformerConfig
from ldm_core.networks.text_transformer import TextTransformer


class TextConditioner(Conditioner):
    """Token ids (B, L) of captions, see `tokenizer`, to a context (B, L, D)."""

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = TextTransformer(config)

    def forward(self, tokens: Tensor) -> Conditioning:
        """Ids (B, L) of any integer type -> context (B, L, D). Raises ValueError as the transformer does."""
        return Conditioning(context=self.transformer(tokens))
