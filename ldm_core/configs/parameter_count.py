"""Count a network's parameters from its configuration: arithmetic alone, so that planning a run needs no torch.

Each function follows the module of the same name in `ldm_core.networks`, part by part; the tests hold them against the
networks themselves.
"""

from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.text import TextTransformerConfig
from ldm_core.configs.unet import UNetConfig


def first_stage_parameters(config: FirstStageConfig) -> int:
    """Return the number of parameters of the `AutoencoderKL` or `VQAutoencoder` of this configuration."""
    # A KL encoder gives a mean and a log variance, a VQ encoder one latent.
    moments = 2 if config.regularization == "kl" else 1
    quant_conv = _conv(moments * config.z_channels, moments * config.embed_dim, 1)
    post_quant_conv = _conv(config.embed_dim, config.z_channels, 1)
    codebook = (config.codebook_size or 0) * config.embed_dim
    encoder = _encoder(config, out_channels=moments * config.z_channels)
    return encoder + quant_conv + codebook + post_quant_conv + _decoder(config)


def unet_parameters(config: UNetConfig) -> int:
    """Return the number of parameters of the `UNet` of this configuration."""
    base, embedding = config.model_channels, 4 * config.model_channels
    count = _linear(base, embedding) + _linear(embedding, embedding)
    count += _conv(config.in_channels, base, 3)
    skips = [base]
    for level, mult in enumerate(config.channel_mult):
        channels = base * mult
        for _ in range(config.num_res_blocks):
            count += _unet_residual(config, skips[-1], channels) + _level_attention(config, level)
            skips.append(channels)
        if level < len(config.channel_mult) - 1:
            count += _unet_resampling(config, channels)
            skips.append(channels)
    channels = skips[-1]
    count += 2 * _unet_residual(config, channels, channels) + _unet_attention(config, channels)
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        for _ in range(config.num_res_blocks + 1):
            count += _unet_residual(config, channels + skips.pop(), base * mult) + _level_attention(config, level)
            channels = base * mult
        if level > 0:
            count += _unet_resampling(config, channels)
    return count + _norm(base) + _conv(base, config.out_channels, 3)


def text_transformer_parameters(config: TextTransformerConfig) -> int:
    """Return the number of parameters of the `TextTransformer` of this configuration, its output head included."""
    width = config.width
    attention = _attention(width, context_width=width, inner_width=config.heads * config.head_dim)
    layer = 2 * _norm(width) + attention + _feed_forward(width, gated=False)
    embeddings = (config.vocabulary_size + config.max_length) * width
    return embeddings + config.layers * layer + _norm(width) + _linear(width, config.vocabulary_size)


def _encoder(config: FirstStageConfig, *, out_channels: int) -> int:
    channels = config.base_channels
    count = _conv(config.in_channels, channels, 3)
    for level in range(len(config.channel_mult)):
        count += _first_stage_level(config, level, channels, config.num_res_blocks)
        channels = config.base_channels * config.channel_mult[level]
        if level < len(config.channel_mult) - 1:
            count += _conv(channels, channels, 3)
    return count + _middle_blocks(config) + _norm(channels) + _conv(channels, out_channels, 3)


def _decoder(config: FirstStageConfig) -> int:
    channels = config.base_channels * config.channel_mult[-1]
    count = _conv(config.z_channels, channels, 3) + _middle_blocks(config)
    for level in reversed(range(len(config.channel_mult))):
        count += _first_stage_level(config, level, channels, config.num_res_blocks + 1)
        channels = config.base_channels * config.channel_mult[level]
        if level > 0:
            count += _conv(channels, channels, 3)
    return count + _norm(channels) + _conv(channels, config.in_channels, 3)


def _first_stage_level(config: FirstStageConfig, level: int, in_channels: int, num_res_blocks: int) -> int:
    channels = config.base_channels * config.channel_mult[level]
    count = _residual(in_channels, channels) + (num_res_blocks - 1) * _residual(channels, channels)
    return count + (num_res_blocks * _self_attention(channels) if config.level_has_attention(level) else 0)


def _middle_blocks(config: FirstStageConfig) -> int:
    channels = config.base_channels * config.channel_mult[-1]
    return 2 * _residual(channels, channels) + (_self_attention(channels) if config.mid_attention else 0)


def _unet_residual(config: UNetConfig, in_channels: int, out_channels: int) -> int:
    modulation = out_channels * (2 if config.use_scale_shift_norm else 1)
    return _residual(in_channels, out_channels) + _linear(4 * config.model_channels, modulation)


def _unet_resampling(config: UNetConfig, channels: int) -> int:
    return _unet_residual(config, channels, channels) if config.resblock_up_down else _conv(channels, channels, 3)


def _level_attention(config: UNetConfig, level: int) -> int:
    if 2**level not in config.attention_downsampling:
        return 0
    return _unet_attention(config, config.model_channels * config.channel_mult[level])


def _unet_attention(config: UNetConfig, channels: int) -> int:
    """Count a `SpatialTransformer`, or the `SelfAttentionBlock` of a UNet without a context."""
    if config.context_dim is None:
        return _self_attention(channels)
    layer = 3 * _norm(channels) + _feed_forward(channels, gated=True)
    for context_width in (channels, config.context_dim):
        layer += _attention(channels, context_width=context_width, inner_width=channels)
    return _norm(channels) + 2 * _conv(channels, channels, 1) + config.transformer_depth * layer


def _residual(in_channels: int, out_channels: int) -> int:
    convolutions = _conv(in_channels, out_channels, 3) + _conv(out_channels, out_channels, 3)
    shortcut = 0 if in_channels == out_channels else _conv(in_channels, out_channels, 1)
    return _norm(in_channels) + _norm(out_channels) + convolutions + shortcut


def _self_attention(channels: int) -> int:
    return _norm(channels) + _conv(channels, 3 * channels, 1) + _conv(channels, channels, 1)


def _attention(width: int, *, context_width: int, inner_width: int) -> int:
    # Queries, keys and values have no bias.
    return (width + 2 * context_width) * inner_width + _linear(inner_width, width)


def _feed_forward(width: int, *, gated: bool) -> int:
    return _linear(width, 4 * width * (2 if gated else 1)) + _linear(4 * width, width)


def _conv(in_channels: int, out_channels: int, kernel: int) -> int:
    return out_channels * (in_channels * kernel**2 + 1)


def _linear(in_features: int, out_features: int) -> int:
    return out_features * (in_features + 1)


def _norm(channels: int) -> int:
    return 2 * channels
