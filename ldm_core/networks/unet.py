"""The time-conditional UNet that denoises latents (paper, Sec. 3.2-3.3, Fig. 3).

Shapes: z: (B, C, h, w) noisy latent; t: (B,) timesteps; context: (B, L, D) for cross-attention;
concat: (B, C_concat, h, w) joined to z along channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_core.configs.unet import GROUPS, UNetConfig
from ldm_core.networks.attention import KeysValues, SelfAttentionBlock, SpatialTransformer
from ldm_core.networks.blocks import (
    Downsample,
    ResidualBlock,
    TimestepEmbedding,
    Upsample,
    activate,
    repeat_to_batch,
    zero_init,
)


@dataclass(frozen=True)
class PreparedContext:
    """Keys and values of a context in every cross-attention layer of one UNet; made by `UNet.prepare_context`.

    They do not depend on z or t, so a sampling run computes them once. They are stale as soon as the weights change.

    Attributes:
        batch: B of the context.
        input_blocks, middle_blocks, output_blocks: one entry per block, empty for one without cross-attention.
    """

    batch: int
    input_blocks: tuple[tuple[KeysValues, ...], ...]
    middle_blocks: tuple[tuple[KeysValues, ...], ...]
    output_blocks: tuple[tuple[KeysValues, ...], ...]


BlockContext = Tensor | tuple[KeysValues, ...] | None


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

    def forward(self, h: Tensor, embedding: Tensor, context: BlockContext) -> Tensor:
        """(B, C, H, W), (B, E), (k * B, L, D) or its keys and values -> (k * B, C', H', W')."""
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

    Every input block, and `conv_in` before them, gives a skip connection; `output_blocks` consume these in reverse. Set
    `activation_checkpointing` to recompute blocks in the backward pass instead of storing their activations.
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

    def prepare_context(self, context: Tensor, mask: Tensor | None = None) -> PreparedContext:
        """Compute the keys and values that every step of a sampling run would compute again from the same context.

        Args:
            context: (B, L, D) with D = `config.context_dim`.
            mask: (B, L) bool, which places of it are attended to, at least one a sample; None for all.

        Returns:
            A replacement for `context` in `forward`.

        Raises:
            ValueError: the context has another shape, or the UNet takes none.
        """
        if self.config.context_dim is None or context.ndim != 3 or context.shape[2] != self.config.context_dim:
            raise ValueError(
                f"context must be (B, L, D) with D = context_dim ({self.config.context_dim}), "
                f"got {tuple(context.shape)}"
            )
        if mask is not None and (mask.shape != context.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(
                f"the mask of a context must be bool of shape {tuple(context.shape[:2])}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )

        context = self._like_weights(context)

        def keys_values(blocks: nn.ModuleList) -> tuple[tuple[KeysValues, ...], ...]:
            attentions = [block.attention for block in blocks]
            return tuple(
                each.keys_values(context, mask) if isinstance(each, SpatialTransformer) else () for each in attentions
            )

        return PreparedContext(
            context.shape[0],
            keys_values(self.input_blocks),
            keys_values(self.middle_blocks),
            keys_values(self.output_blocks),
        )

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        *,
        context: Tensor | PreparedContext | None = None,
        mask: Tensor | None = None,
        concat: Tensor | None = None,
    ) -> Tensor:
        """Run the network once.

        Several contexts may share a latent: of k * B contexts, number i goes with latent i modulo B. Everything before
        the first cross-attention is then computed once for all k; classifier-free guidance uses k = 2.

        Args:
            z: (B, C, h, w) noisy latent; h and w are multiples of `config.downsampling_factor`.
            t: (B,) timesteps: integers of a chain, real numbers from 0 to T of a rectified flow.
            context: (k * B, L, D) with D = `config.context_dim`, or the result of `prepare_context`; None if
                `config.context_dim` is None.
            mask: (k * B, L) bool, which places of a context are attended to, at least one a sample; None for all, or if
                `prepare_context` was given it.
            concat: (B, C_concat, h, w) with C + C_concat = `config.in_channels`.

        Returns:
            (k * B, out_channels, h, w) raw prediction; k = 1 without a context.

        Raises:
            ValueError: a shape does not fit the configuration.
        """
        self._check_latent(z, t, concat)
        self._check_context(z.shape[0], context)
        if mask is not None:
            if not isinstance(context, Tensor):
                raise ValueError("a mask goes with the context that it is of: give it to prepare_context")
            context = self.prepare_context(context, mask)
        h = self.conv_in((z if concat is None else torch.cat([z, concat], dim=1)).to(self.conv_in.weight.dtype))
        embedding = self.time_embedding(t)
        prepared = context if isinstance(context, PreparedContext) else None
        shared: BlockContext = self._like_weights(context) if isinstance(context, Tensor) else None
        skips = [h]
        for i, block in enumerate(self.input_blocks):
            h = self._run(block, h, embedding, prepared.input_blocks[i] if prepared else shared)
            skips.append(h)
        for i, block in enumerate(self.middle_blocks):
            h = self._run(block, h, embedding, prepared.middle_blocks[i] if prepared else shared)
        for i, block in enumerate(self.output_blocks):
            h = torch.cat([h, repeat_to_batch(skips.pop(), h.shape[0])], dim=1)
            h = self._run(block, h, embedding, prepared.output_blocks[i] if prepared else shared)
        return self.conv_out(activate(self.norm_out(h)))

    def _like_weights(self, context: Tensor) -> Tensor:
        """Return a context in the weights' precision, so that a UNet in bf16 takes what a conditioner in fp32 gives."""
        weight = self.conv_in.weight
        # Weights in half precision are never run under autocast; under it, a cast up would only cost.
        return context if weight.dtype == torch.float32 else context.to(weight.dtype)

    def _run(self, block: nn.Module, h: Tensor, embedding: Tensor, context: BlockContext) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            # Only dropout draws random numbers, and reading their state makes a GPU wait.
            drawing = self.config.dropout > 0
            return checkpoint(block, h, embedding, context, use_reentrant=False, preserve_rng_state=drawing)
        return block(h, embedding, context)

    def _check_latent(self, z: Tensor, t: Tensor, concat: Tensor | None) -> None:
        config = self.config
        if z.ndim != 4 or z.shape[0] == 0:
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

    def _check_context(self, batch: int, context: Tensor | PreparedContext | None) -> None:
        width = self.config.context_dim
        if isinstance(context, PreparedContext):
            if context.batch % batch or width is None:
                raise ValueError(
                    f"a prepared context must be for {batch} samples or a multiple, got one for {context.batch}: "
                    "prepare it anew"
                )
            return
        if (context is None) != (width is None):
            raise ValueError(
                f"context must be given exactly where context_dim is set (here {width}), "
                f"got {'none' if context is None else tuple(context.shape)}"
            )
        if context is not None and (
            context.ndim != 3 or context.numel() == 0 or context.shape[0] % batch or context.shape[2] != width
        ):
            raise ValueError(
                f"context must be (B, L, D) with B = {batch} or a multiple, here ({batch}, L, {width}), "
                f"got {tuple(context.shape)}"
            )
