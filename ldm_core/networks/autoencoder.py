"""The first stage: perceptual compression of images to latents and back (paper, Sec. 3.1).

Shapes: x: (B, 3, H, W) images in [-1, 1]; z: (B, C, h, w) latent with h = H / f.
"""

from __future__ import annotations

from torch import Tensor, nn

from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.networks.attention import SelfAttentionBlock
from ldm_core.networks.blocks import Downsample, ResidualBlock, Upsample, activate, full_precision
from ldm_core.networks.posterior import DiagonalGaussian, PointPosterior
from ldm_core.networks.vector_quantizer import Quantization, VectorQuantizer


class MiddleBlocks(nn.Module):
    """Residual block, attention (optional), residual block at the lowest resolution."""

    def __init__(self, config: FirstStageConfig) -> None:
        super().__init__()
        channels = config.base_channels * config.channel_mult[-1]
        self.residual1 = _residual(config, channels, channels)
        self.attention = _attention(config, channels) if config.mid_attention else nn.Identity()
        self.residual2 = _residual(config, channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.residual2(self.attention(self.residual1(h)))


class FirstStageLevel(nn.Module):
    """Residual blocks of one resolution, each followed by attention if configured, then resampling."""

    def __init__(
        self,
        config: FirstStageConfig,
        level: int,
        *,
        in_channels: int,
        num_res_blocks: int,
        resample: Downsample | Upsample | None,
    ) -> None:
        super().__init__()
        channels = config.base_channels * config.channel_mult[level]
        self.residuals = nn.ModuleList(
            _residual(config, channels if i else in_channels, channels) for i in range(num_res_blocks)
        )
        has_attention = config.level_has_attention(level)
        self.attentions = nn.ModuleList(_attention(config, channels) for _ in self.residuals if has_attention)
        self.resample = resample

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        for i, residual in enumerate(self.residuals):
            h = residual(h)
            if self.attentions:
                h = self.attentions[i](h)
        return h if self.resample is None else self.resample(h)


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> features (B, out_channels, h, w)."""

    def __init__(self, config: FirstStageConfig, *, out_channels: int) -> None:
        super().__init__()
        channels = config.base_channels
        last_level = len(config.channel_mult) - 1
        self.conv_in = nn.Conv2d(config.in_channels, channels, 3, padding=1)
        self.levels = nn.ModuleList()
        for level, mult in enumerate(config.channel_mult):
            down = Downsample(config.base_channels * mult, asymmetric=True) if level < last_level else None
            self.levels.append(
                FirstStageLevel(
                    config, level, in_channels=channels, num_res_blocks=config.num_res_blocks, resample=down
                )
            )
            channels = config.base_channels * mult
        self.middle = MiddleBlocks(config)
        self.norm_out = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, out_channels, h, w)."""
        h = self.conv_in(x.to(self.conv_in.weight.dtype))
        for level in self.levels:
            h = level(h)
        return self.conv_out(activate(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) -> image (B, 3, H, W); `levels` run from the lowest resolution up."""

    def __init__(self, config: FirstStageConfig) -> None:
        super().__init__()
        channels = config.base_channels * config.channel_mult[-1]
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.middle = MiddleBlocks(config)
        self.levels = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            up = Upsample(config.base_channels * mult) if level > 0 else None
            self.levels.append(
                FirstStageLevel(
                    config, level, in_channels=channels, num_res_blocks=config.num_res_blocks + 1, resample=up
                )
            )
            channels = config.base_channels * mult
        self.norm_out = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, z_channels, h, w) -> (B, 3, H, W)."""
        h = self.middle(self.conv_in(z))
        for level in self.levels:
            h = level(h)
        return self.conv_out(activate(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """First stage with a Gaussian posterior, slightly regularized towards a standard normal (paper, Sec. 3.1)."""

    def __init__(self, config: FirstStageConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, out_channels=2 * config.z_channels)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Encode images.

        Args:
            x: (B, 3, H, W) in [-1, 1]; H and W are multiples of the downsampling factor.

        Returns:
            Posterior over (B, embed_dim, h, w), its logvar clamped to [-30, 20], in the dtype of the weights under
            autocast, too. Latents are not scaled here: that is the model's part.

        Raises:
            ValueError: x has another shape.
        """
        _check_images(self.config, x)
        mean, logvar = _exactly(self.quant_conv, self.encoder(x)).chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """(B, embed_dim, h, w) latent -> (B, 3, H, W) image, about [-1, 1]; ValueError on another shape."""
        _check_latent(self.config, z)
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))


class VQAutoencoder(nn.Module):
    """First stage whose codebook belongs to the decoder: its latents are not quantized yet (paper, Sec. 3.1)."""

    def __init__(self, config: FirstStageConfig) -> None:
        super().__init__()
        assert config.codebook_size is not None
        self.config = config
        self.encoder = Encoder(config, out_channels=config.z_channels)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.quantizer = VectorQuantizer(
            config.codebook_size, config.embed_dim, legacy_loss=config.legacy_codebook_loss
        )
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> PointPosterior:
        """Encode images.

        Args:
            x: (B, 3, H, W) in [-1, 1]; H and W are multiples of the downsampling factor.

        Returns:
            (B, embed_dim, h, w) latent before quantization, as a posterior, in the dtype of the weights under autocast,
            too.

        Raises:
            ValueError: x has another shape.
        """
        _check_images(self.config, x)
        return PointPosterior(_exactly(self.quant_conv, self.encoder(x)))

    def quantize(self, z: Tensor) -> Quantization:
        """(B, embed_dim, h, w) latent before quantization -> Quantization; ValueError on another shape."""
        _check_latent(self.config, z)
        return self.quantizer(z)

    def decode(self, z: Tensor) -> Tensor:
        """(B, embed_dim, h, w) latent, quantized here -> (B, 3, H, W) image; ValueError on another shape."""
        _check_latent(self.config, z)
        return self.decoder(self.post_quant_conv(self.quantizer.lookup(z).to(self.post_quant_conv.weight.dtype)))


FirstStage = AutoencoderKL | VQAutoencoder


def build_first_stage(config: FirstStageConfig) -> FirstStage:
    """Build a randomly initialized first stage of the kind that the configuration names."""
    return AutoencoderKL(config) if config.regularization == "kl" else VQAutoencoder(config)


# Unlike the UNet's, blocks of the first stage have norms with eps 1e-6 and start as ordinary random layers.
def _residual(config: FirstStageConfig, in_channels: int, out_channels: int) -> ResidualBlock:
    return ResidualBlock(in_channels, out_channels, eps=1e-6, groups=config.norm_groups, zero_output=False)


def _attention(config: FirstStageConfig, channels: int) -> SelfAttentionBlock:
    return SelfAttentionBlock(channels, eps=1e-6, groups=config.norm_groups, zero_output=False)


def _exactly(quant_conv: nn.Conv2d, h: Tensor) -> Tensor:
    """Apply the last layer of an encoder, without autocast.

    Latents come to about +-5, where bfloat16 rounds by as much as the posterior's standard deviation is.
    """
    with full_precision(h.device):
        moments: Tensor = quant_conv(h.to(quant_conv.weight.dtype))
        return moments


def _check_images(config: FirstStageConfig, x: Tensor) -> None:
    factor = config.downsampling_factor
    if x.ndim != 4 or x.shape[1] != config.in_channels or x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(
            f"images must be (B, {config.in_channels}, H, W) with H and W multiples of {factor}, "
            f"got shape {tuple(x.shape)}; crop or resize first"
        )


def _check_latent(config: FirstStageConfig, z: Tensor) -> None:
    if z.ndim != 4 or z.shape[1] != config.embed_dim:
        raise ValueError(f"latents must be (B, {config.embed_dim}, h, w), got shape {tuple(z.shape)}")
