"""The text transformer that is trained jointly with the UNet (paper, Sec. 3.3 and Appendix E.2.1: tau_theta).

Shapes: tokens: (B, L) token ids; context: (B, L, D), one vector per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_core.configs.text import TextTransformerConfig
from ldm_core.networks.attention import Attention, FeedForward
from ldm_core.networks.ids import check_tokens


class TextTransformerLayer(nn.Module):
    """Self-attention and feed-forward, each pre-norm with a residual."""

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(
            config.width, context_width=config.width, num_heads=config.heads, head_channels=config.head_dim
        )
        self.norm2 = nn.LayerNorm(config.width)
        self.feed_forward = FeedForward(config.width, gated=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class TextTransformer(nn.Module):
    """Unmasked transformer encoder over token ids; padding is attended to, as published.

    `output_head` takes no part in `forward`. The published checkpoints carry it and the paper's "1.45B" counts it, so
    it is kept for exact import and export; without gradients, since DDP would wait for them. Set
    `activation_checkpointing` to recompute layers in the backward pass instead of storing their activations.
    """

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.max_length, config.width)
        self.layers = nn.ModuleList(TextTransformerLayer(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)
        self.output_head = nn.Linear(config.width, config.vocabulary_size).requires_grad_(False)
        nn.init.normal_(self.token_embedding.weight, std=config.embedding_std)
        nn.init.normal_(self.position_embedding.weight, std=config.embedding_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed token ids.

        Args:
            tokens: (B, L) integers in [0, vocabulary_size), L at most `config.max_length`.

        Returns:
            (B, L, width) context.

        Raises:
            ValueError: tokens are not integers of that shape and range.
        """
        tokens = check_tokens(tokens, max_length=self.config.max_length, vocabulary_size=self.config.vocabulary_size)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x)
        return self.norm_out(x)
