"""Captions through the text transformer that is trained jointly with the UNet (paper, Sec. 4.3.1, Table 15)."""

from __future__ import annotations

import torch
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
        """Ids (B, L) of any integer type -> context (B, L, D), with the mask (B, L) of real tokens if `pad_id` is set.

        Raises ValueError as the transformer does.
        """
        context = self.transformer(tokens)
        if self.config.pad_id is None:
            return Conditioning(context=context)
        # A softmax needs something to run over, even in a caption that is all padding.
        mask = (tokens != self.config.pad_id) | (torch.arange(tokens.shape[1], device=tokens.device) == 0)
        return Conditioning(context=context, mask=mask)
