"""The time-conditional UNet that denoises latents (paper, Sec. 3.2-3.3, Fig. 3).

Shapes: z: (B, C, h, w) noisy latent; t: (B,) timesteps; context: (B, L, D) for cross-attention;
concat: (B, C_concat, h, w) joined to z along channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_core.attention import SelfAttentionBlock, SpatialTransformer
from ldm_core.blocks import Downsample, ResidualBlock, TimestepEmbedding, Upsample, zero_init

GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of a UNet, in the terms of the paper's hyperparameter tables (Tables 12-15).

    Args:
        latent_size: height and width the model is trained at, in latent pixels; other sizes may be sampled.
        in_channels: channels of z plus those of `concat`.
        out_channels: channels of the prediction.
        model_channels: channels of the first level, a multiple of 32.
        num_res_blocks: residual blocks a level.
        channel_mult: channels of each level, in multiples of `model_channels`.
        attention_downsampling: downsampling factors of the levels with attention, in any order; the
            middle always has it.
        num_heads: attention heads everywhere; or
        num_head_channels: channels of a head everywhere; exactly one of the two.
        context_dim: D of the context; None builds self-attention blocks instead of spatial transformers.
        transformer_depth: layers of each spatial transformer.
        use_scale_shift_norm: modulate norms by the timestep embedding instead of adding it.
        resblock_up_down: change resolution in residual blocks instead of single convolutions.
        dropout: probability inside residual blocks.

    Raises:
        ValueError: a field is out of range or the channels do not divide into groups and heads.
    """

    latent_size: int
    in_channels: int
    out_channels: int
    model_channels: int
    num_res_blocks: int = 2
    channel_mult: tuple[int, ...]
    attention_downsampling: tuple[int, ...]
    num_heads: int | None = None
    num_head_channels: int | None = None
    context_dim: int | None = None
    transformer_depth: int = 1
    use_scale_shift_norm: bool = False
    resblock_up_down: bool = False
    dropout: float = 0.0

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        # JSON has no tuples: a config read back from a checkpoint must equal the one written.
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attention_downsampling", tuple(sorted(self.attention_downsampling, reverse=True)))
        counts = ("latent_size", "in_channels", "out_channels", "num_res_blocks", "transformer_depth")
        for name in (*counts, "num_heads", "num_head_channels", "context_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"UNetConfig.{name} must be at least 1, got {value}")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"UNetConfig.channel_mult must list positive factors, got {self.channel_mult}")
        if self.model_channels < 1 or self.model_channels % GROUPS:
            raise ValueError(f"UNetConfig.model_channels must be a multiple of {GROUPS}, got {self.model_channels}")
        if self.latent_size % self.downsampling_factor:
            raise ValueError(
                f"UNetConfig.latent_size must be a multiple of {self.downsampling_factor} "
                f"(2 per level of channel_mult after the first), got {self.latent_size}"
            )
        if (self.num_heads is None) == (self.num_head_channels is None):
            raise ValueError(
                "UNetConfig needs exactly one of num_heads and num_head_channels, "
                f"got num_heads={self.num_heads}, num_head_channels={self.num_head_channels}"
            )
        for channels in {self.model_channels * mult for mult in self.attention_mults}:
            if channels % (self.num_heads or self.num_head_channels or 1):
                raise ValueError(
                    f"UNetConfig: {channels} channels at an attention block do not divide by "
                    f"num_heads={self.num_heads} or num_head_channels={self.num_head_channels}"
                )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"UNetConfig.dropout must be in [0, 1), got {self.dropout}")

    @property
    def downsampling_factor(self) -> int:
        """Ratio of the first level's resolution to the last one's; h and w must be multiples of it."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def attention_mults(self) -> tuple[int, ...]:
        """channel_mult of every place with attention, the middle last."""
        levels = [mult for i, mult in enumerate(self.channel_mult) if 2**i in self.attention_downsampling]
        return (*levels, self.channel_mult[-1])

    def heads(self, channels: int) -> int:
        """Number of attention heads at a feature map of so many channels."""
        return self.num_heads or channels // (self.num_head_channels or channels)


class UNetBlock(nn.Module):
    """Residual block, attention and resampling, each optional, applied in this order."""

    def __init__(
        self,
        *,
        residual: ResidualBlock | None = None,
        attention: SpatialTransformer | SelfAttentionBlock | None = None,
        resample: ResidualBlock | Downsample | Upsample | None = None,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.attention = attention
        self.resample = resample

    def forward(self, h: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
        """(B, C, H, W), (B, E), (B, L, D) -> (B, C', H', W')."""
        if self.residual is not None:
            h = self.residual(h, embedding)
        if isinstance(self.attention, SpatialTransformer):
            h = self.attention(h, context)
        elif self.attention is not None:
            h = self.attention(h)
        if isinstance(self.resample, ResidualBlock):
            h = self.resample(h, embedding)
        elif self.resample is not None:
            h = self.resample(h)
        return h


class UNet(nn.Module):
    """Predicts eps, v or x0 from a noisy latent; which of them is the objective's business.

    `input_blocks` holds one entry a skip connection (after `conv_in`, which is the first), `output_blocks`
    consumes them in reverse. Set `activation_checkpointing` to recompute blocks in the backward pass instead
    of storing their activations.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.time_embedding = TimestepEmbedding(config.model_channels)
        self.conv_in = nn.Conv2d(config.in_channels, config.model_channels, 3, padding=1)
        skip_channels = self._build_input_blocks()
        channels = skip_channels[-1]
        self.middle_blocks = nn.ModuleList(
            [
                UNetBlock(residual=self._residual(channels, channels), attention=self._attention(channels)),
                UNetBlock(residual=self._residual(channels, channels)),
            ]
        )
        self._build_output_blocks(skip_channels)
        self.norm_out = nn.GroupNorm(GROUPS, config.model_channels)
        self.conv_out = zero_init(nn.Conv2d(config.model_channels, config.out_channels, 3, padding=1))

    def _build_input_blocks(self) -> list[int]:
        """Fill `input_blocks` and return the channels of every skip connection, first to last."""
        config = self.config
        skip_channels = [config.model_channels]
        self.input_blocks = nn.ModuleList()
        for level, mult in enumerate(config.channel_mult):
            channels = config.model_channels * mult
            for _ in range(config.num_res_blocks):
                residual = self._residual(skip_channels[-1], channels)
                self.input_blocks.append(UNetBlock(residual=residual, attention=self._level_attention(level)))
                skip_channels.append(channels)
            if level < len(config.channel_mult) - 1:
                down = self._residual(channels, channels, "down") if config.resblock_up_down else Downsample(channels)
                self.input_blocks.append(UNetBlock(resample=down))
                skip_channels.append(channels)
        return skip_channels

    def _build_output_blocks(self, skip_channels: list[int]) -> None:
        config = self.config
        channels, remaining = skip_channels[-1], list(skip_channels)
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for index in range(config.num_res_blocks + 1):
                residual = self._residual(channels + remaining.pop(), config.model_channels * mult)
                channels = config.model_channels * mult
                up: ResidualBlock | Upsample | None = None
                if level > 0 and index == config.num_res_blocks:
                    up = self._residual(channels, channels, "up") if config.resblock_up_down else Upsample(channels)
                self.output_blocks.append(
                    UNetBlock(residual=residual, attention=self._level_attention(level), resample=up)
                )

    def _residual(
        self, in_channels: int, out_channels: int, resample: Literal["up", "down"] | None = None
    ) -> ResidualBlock:
        return ResidualBlock(
            in_channels,
            out_channels,
            embedding_channels=4 * self.config.model_channels,
            scale_shift=self.config.use_scale_shift_norm,
            resample=resample,
            dropout=self.config.dropout,
        )

    def _level_attention(self, level: int) -> SpatialTransformer | SelfAttentionBlock | None:
        if 2**level not in self.config.attention_downsampling:
            return None
        return self._attention(self.config.model_channels * self.config.channel_mult[level])

    def _attention(self, channels: int) -> SpatialTransformer | SelfAttentionBlock:
        num_heads = self.config.heads(channels)
        if self.config.context_dim is None:
            return SelfAttentionBlock(channels, num_heads=num_heads)
        return SpatialTransformer(
            channels,
            context_width=self.config.context_dim,
            num_heads=num_heads,
            head_channels=channels // num_heads,
            depth=self.config.transformer_depth,
        )

    def forward(self, z: Tensor, t: Tensor, *, context: Tensor | None = None, concat: Tensor | None = None) -> Tensor:
        """Run the network once.

        Args:
            z: (B, C, h, w) noisy latent; h and w are multiples of `config.downsampling_factor`.
            t: (B,) timesteps in [0, T).
            context: (B, L, D) with D = `config.context_dim`; required exactly where that is set.
            concat: (B, C_concat, h, w) with C + C_concat = `config.in_channels`.

        Returns:
            (B, out_channels, h, w) raw prediction.

        Raises:
            ValueError: a shape does not fit the configuration.
        """
        self._check(z, t, context, concat)
        h = self.conv_in(z if concat is None else torch.cat([z, concat], dim=1))
        embedding = self.time_embedding(t)
        skips = [h]
        for block in self.input_blocks:
            h = self._run(block, h, embedding, context)
            skips.append(h)
        for block in self.middle_blocks:
            h = self._run(block, h, embedding, context)
        for block in self.output_blocks:
            h = self._run(block, torch.cat([h, skips.pop()], dim=1), embedding, context)
        return self.conv_out(F.silu(self.norm_out(h)))

    def _run(self, block: nn.Module, h: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, embedding, context, use_reentrant=False)
        return block(h, embedding, context)

    def _check(self, z: Tensor, t: Tensor, context: Tensor | None, concat: Tensor | None) -> None:
        config = self.config
        if z.ndim != 4:
            raise ValueError(f"z must be (B, C, h, w), got shape {tuple(z.shape)}")
        if z.shape[2] % config.downsampling_factor or z.shape[3] % config.downsampling_factor:
            raise ValueError(
                f"height and width of z must be multiples of {config.downsampling_factor}, got {tuple(z.shape[2:])}"
            )
        if concat is not None and (concat.ndim != 4 or concat[:, 0].shape != z[:, 0].shape):
            raise ValueError(
                f"concat must be (B, C, h, w) like z {tuple(z.shape)} but for its channels, got {tuple(concat.shape)}"
            )
        channels = z.shape[1] + (0 if concat is None else concat.shape[1])
        if channels != config.in_channels:
            raise ValueError(f"z and concat must have {config.in_channels} channels together, got {channels}")
        if t.shape != z.shape[:1]:
            raise ValueError(f"t must be (B,) = ({z.shape[0]},), got shape {tuple(t.shape)}")
        if (context is None) != (config.context_dim is None):
            raise ValueError(
                f"context must be given exactly where context_dim is set (here {config.context_dim}), "
                f"got {'none' if context is None else tuple(context.shape)}"
            )
        if context is not None and (
            context.ndim != 3 or context.shape[0] != z.shape[0] or context.shape[2] != config.context_dim
        ):
            raise ValueError(
                f"context must be (B, L, D) = ({z.shape[0]}, L, {config.context_dim}), got {tuple(context.shape)}"
            )
