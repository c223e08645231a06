"""The text transformer of CLIP (Radford et al. 2021), the frozen encoder of Stable Diffusion v1.

Its weights come from CLIP or OpenCLIP (see `pretrained`). Shapes: tokens: (B, L) ids; context: (B, L, D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_core.networks.ids import check_tokens


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """Shape of a CLIP text transformer; the defaults are those of ViT-L/14.

    Args:
        vocabulary_size: number of token ids.
        max_length: longest token sequence.
        width: D of the context.
        layers, heads: of the transformer; heads divide the width.
        feed_forward_width: of the hidden layer of the feed-forward networks.
        activation: "quick_gelu", x sigmoid(1.702 x), as OpenAI trained; "gelu" as OpenCLIP mostly did.
        unused_layers: layers at the end that are left out; the last norm still follows.

    Raises:
        ValueError: a number is out of range.
    """

    vocabulary_size: int = 49_408
    max_length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward_width: int = 3072
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    unused_layers: int = 0

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "max_length", "width", "layers", "heads", "feed_forward_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"ClipTextConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"ClipTextConfig.width must be a multiple of heads={self.heads}, got {self.width}")
        if self.activation not in ("quick_gelu", "gelu"):
            raise ValueError(f'ClipTextConfig.activation must be "quick_gelu" or "gelu", got {self.activation!r}')
        if not 0 <= self.unused_layers < self.layers:
            raise ValueError(
                f"ClipTextConfig.unused_layers must be from 0 to {self.layers - 1}, got {self.unused_layers}"
            )


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
    """Embeds token ids causally; the context is the last layer's output after the last norm, for every token."""

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
            tokens: (B, L) integers in [0, vocabulary_size), L at most `config.max_length`; padding is attended to like
                any token, as CLIP does.

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
