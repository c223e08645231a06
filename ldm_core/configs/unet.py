"""Configuration of the denoising UNet (paper, Tables 12-15)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ldm_core.configs.values import check_at_least

# Of every group norm in the UNet.
GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of a UNet, in the terms of the paper's hyperparameter tables (Tables 12-15).

    Args:
        latent_size: height and width of the latents in training; other sizes may be sampled.
        in_channels: channels of the latent plus those of `concat`.
        out_channels: channels of the prediction.
        model_channels: channels of the first level, a multiple of 32.
        num_res_blocks: residual blocks per level.
        channel_mult: channels of each level, in multiples of `model_channels`.
        attention_downsampling: downsampling factors of the levels with attention, in any order; the middle blocks
            always have it.
        num_heads: number of attention heads at every level; None if `num_head_channels` is given.
        num_head_channels: channels of a head at every level; None if `num_heads` is given.
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

    # In a recipe, which pydantic reads, a misspelt setting is an error.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        # JSON has no tuples: a config read back from a checkpoint must equal the one written.
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attention_downsampling", tuple(sorted(self.attention_downsampling, reverse=True)))
        check_at_least(self, 1, "latent_size", "in_channels", "out_channels", "num_res_blocks", "transformer_depth")
        check_at_least(self, 1, "num_heads", "num_head_channels", "context_dim")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"UNetConfig.channel_mult must list positive factors, got {self.channel_mult}")
        if self.model_channels < 1 or self.model_channels % GROUPS:
            raise ValueError(f"UNetConfig.model_channels must be a multiple of {GROUPS}, got {self.model_channels}")
        if self.latent_size % self.downsampling_factor:
            raise ValueError(
                f"UNetConfig.latent_size must be a multiple of {self.downsampling_factor} "
                f"(2 per level of channel_mult after the first), got {self.latent_size}"
            )
        self._check_heads()
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"UNetConfig.dropout must be in [0, 1), got {self.dropout}")

    def _check_heads(self) -> None:
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

    @property
    def downsampling_factor(self) -> int:
        """Ratio of the first level's resolution to the last one's; h and w must be multiples of it."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def attention_mults(self) -> tuple[int, ...]:
        """channel_mult of every level with attention, then that of the middle blocks."""
        levels = [mult for i, mult in enumerate(self.channel_mult) if 2**i in self.attention_downsampling]
        return (*levels, self.channel_mult[-1])

    def heads(self, channels: int) -> int:
        """Return the number of attention heads for a feature map with this many channels."""
        return self.num_heads or channels // (self.num_head_channels or channels)
