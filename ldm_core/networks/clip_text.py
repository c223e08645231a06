"""The text transformer of CLIP (Radford et al. 2021), the frozen encoder of Stable Diffusion v1.

Its weights come from CLIP or OpenCLIP (see `pretrained`). Shapes: tokens: (B, L) ids; context: (B, L, D).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_core.configs.text import ClipTextConfig
from ldm_core.networks.ids import check_tokens


class ClipTextLayer(nn.Module):
    """Causal self-attention and feed-forward, each pre-norm with a residual."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.quick = config.activation == "quick_gelu"
        self.norm1 = nn.LayerNorm(config.width)
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.linear1 = nn.Linear(config.width, config.feed_forward_width)
        self.linear2 = nn.Linear(config.feed_forward_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        h = self.norm1(x)
        query, key, value = (
            projection(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        h = self.linear1(self.norm2(x))
        return x + self.linear2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))


class ClipTextTransformer(nn.Module):
    """Causal transformer over token ids; the context is the last layer's normalized output at every token."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.max_length, config.width)
        self.layers = nn.ModuleList(ClipTextLayer(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed token ids.

        Args:
            tokens: (B, L) integers in [0, vocabulary_size), L at most `config.max_length`. Padding is attended to like
                any other token, as in CLIP.

        Returns:
            (B, L, width) context.

        Raises:
            ValueError: tokens are not integers of that shape and range.
        """
        tokens = check_tokens(tokens, max_length=self.config.max_length, vocabulary_size=self.config.vocabulary_size)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for layer in self.layers[: self.config.layers - self.config.unused_layers]:
            x = layer(x)
        return self.norm_out(x)
