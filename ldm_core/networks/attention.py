"""Attention over token sequences, over pixels, and from pixels to a context (paper, Sec. 3.3).

Shapes: x: (B, N, D) sequence or (B, C, H, W) feature map; context: (B, L, D_context).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_core.networks.blocks import repeat_to_batch, zero_init

# 128 MiB in bf16; with larger score matrices the memory costs more time than the products save.
LARGEST_EXPLICIT_SCORES = 2**26


class KeysValues(NamedTuple):
    """Keys and values of one attention layer, (B, heads, L, d) each; a context's serve a whole sampling run.

    `mask` is (B, 1, 1, L) bool, true where they are attended to; None for everywhere.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(Q K^T / sqrt(d)) V, computed by this device's fastest kernel.

    Args:
        query: (B, heads, N, d).
        key, value: (B, heads, L, d).
        mask: (B, 1, 1, L) bool, true where a key takes part in the softmax, at least once a sample; None for all keys.

    Returns:
        (B, heads, N, d) in the dtype of the arguments.
    """
    scores_numel = query.shape[:-1].numel() * key.shape[2]
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and scores_numel <= LARGEST_EXPLICIT_SCORES:
        # torch's fused kernel for CPUs is up to eight times slower in bf16, above all in the backward pass.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head attention, softmax(Q K^T / sqrt(d)) V: queries from x; keys and values from the context.

    Projections to queries, keys and values have no bias; the output projection has one.

    Args:
        width: D of x and of the output.
        context_width: D of the context; equal to `width` for self-attention.
        num_heads: number of attention heads.
        head_channels: d, channels of a head; num_heads * d need not equal the width.
    """

    def __init__(self, width: int, *, context_width: int, num_heads: int, head_channels: int) -> None:
        super().__init__()
        inner_width = num_heads * head_channels
        self.num_heads = num_heads
        self.query = nn.Linear(width, inner_width, bias=False)
        self.key = nn.Linear(context_width, inner_width, bias=False)
        self.value = nn.Linear(context_width, inner_width, bias=False)
        self.output = nn.Linear(inner_width, width)

    def forward(self, x: Tensor, context: Tensor | KeysValues | None = None) -> Tensor:
        """(B, N, D), (B, L, D_context) or its `keys_values` -> (B, N, D); attends to x itself without a context."""
        mask = None
        if context is None:
            query, key, value = self._self_projections(x)
        else:
            query = self._split_heads(self.query(x))
            key, value, mask = context if isinstance(context, KeysValues) else self.keys_values(context)
        return self.output(attend(query, key, value, mask).transpose(1, 2).flatten(2))

    def keys_values(self, context: Tensor, mask: Tensor | None = None) -> KeysValues:
        """Compute keys and values of a context (B, L, D_context), of which a mask (B, L) says what is attended to."""
        shown = None if mask is None else mask[:, None, None]
        return KeysValues(self._split_heads(self.key(context)), self._split_heads(self.value(context)), shown)

    def _self_projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys and values of x in one matrix product, which is faster than three."""
        weights = torch.cat([self.query.weight, self.key.weight, self.value.weight])
        query, key, value = F.linear(x, weights).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        return query, key, value

    def _split_heads(self, projected: Tensor) -> Tensor:
        """(B, N, heads * d) -> (B, heads, N, d)."""
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with a hidden width of four times the input's; gated (GEGLU, Shazeer 2020) or plain GELU."""

    def __init__(self, width: int, *, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.linear1 = nn.Linear(width, 4 * width * (2 if gated else 1))
        self.linear2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        h = self.linear1(x)
        if self.gated:
            h, gate = h.chunk(2, dim=-1)
            return self.linear2(h * F.gelu(gate))
        return self.linear2(F.gelu(h))


class CrossAttentionLayer(nn.Module):
    """Self-attention, cross-attention to the context, gated feed-forward; each pre-norm with a residual."""

    def __init__(self, width: int, *, context_width: int, num_heads: int, head_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = Attention(width, context_width=width, num_heads=num_heads, head_channels=head_channels)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = Attention(
            width, context_width=context_width, num_heads=num_heads, head_channels=head_channels
        )
        self.norm3 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, gated=True)

    def forward(self, x: Tensor, context: Tensor | KeysValues) -> Tensor:
        """(B, N, D), (k * B, L, D_context) or its keys and values -> (k * B, N, D)."""
        x = x + self.self_attention(self.norm1(x))
        x = repeat_to_batch(x, context[0].shape[0] if isinstance(context, KeysValues) else context.shape[0])
        x = x + self.cross_attention(self.norm2(x), context)
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer layers over the pixels of a feature map, with cross-attention (paper, Sec. 3.3, Fig. 3).

    Args:
        channels: C of the feature map.
        context_width: D of the context.
        num_heads: number of attention heads.
        head_channels: channels of a head; num_heads * head_channels must equal the channels.
        depth: number of layers.
    """

    def __init__(self, channels: int, *, context_width: int, num_heads: int, head_channels: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.project_in = nn.Conv2d(channels, channels, 1)
        self.layers = nn.ModuleList(
            CrossAttentionLayer(channels, context_width=context_width, num_heads=num_heads, head_channels=head_channels)
            for _ in range(depth)
        )
        self.project_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor | Sequence[KeysValues]) -> Tensor:
        """(B, C, H, W), (k * B, L, D_context) or keys and values for every layer -> (k * B, C, H, W)."""
        size = x.shape[2:]
        # In channels_last memory both reshapes are views.
        h = self.project_in(self.norm(x)).flatten(2).transpose(1, 2)
        for i, layer in enumerate(self.layers):
            h = layer(h, context if isinstance(context, Tensor) else context[i])
        return repeat_to_batch(x, h.shape[0]) + self.project_out(h.transpose(1, 2).unflatten(2, size))

    def keys_values(self, context: Tensor, mask: Tensor | None = None) -> tuple[KeysValues, ...]:
        """Compute keys and values of a context (B, L, D_context) for every layer; `forward` takes them in its place."""
        layers = cast("Iterable[CrossAttentionLayer]", self.layers)
        return tuple(layer.cross_attention.keys_values(context, mask) for layer in layers)


class SelfAttentionBlock(nn.Module):
    """Self-attention over the pixels of a feature map, without context (Dhariwal & Nichol 2021).

    The fused projection keeps the published order of output channels: (head, [query, key, value], d).

    Args:
        channels: C of the feature map.
        num_heads: number of attention heads; they divide the channels.
        eps: epsilon of the group norm (1e-5 in the UNet, 1e-6 in the first stage).
        groups: number of groups of the group norm.
        zero_output: start the output projection at zero, as the UNet does.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 1,
        eps: float = 1e-5,
        groups: int = 32,
        zero_output: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(groups, channels, eps=eps)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.project_out = nn.Conv2d(channels, channels, 1)
        if zero_output:
            zero_init(self.project_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        fused = self.query_key_value(self.norm(x)).flatten(2).transpose(1, 2)  # (B, N, 3C)
        # The fused kernels take the channels of a head side by side. In channels_last memory they already are.
        query, key, value = fused.contiguous().unflatten(2, (self.num_heads, 3, -1)).transpose(1, 2).unbind(3)
        attended = attend(query, key, value).transpose(1, 2).flatten(2)  # (B, N, C)
        return x + self.project_out(attended.transpose(1, 2).unflatten(2, x.shape[2:]))
