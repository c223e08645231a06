"""Our weights under the names of Hugging Face diffusers: the same tensors, or slices of fused ones."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ldm_core.attention import Attention, CrossAttentionLayer, SelfAttentionBlock, SpatialTransformer
from ldm_core.autoencoder import AutoencoderKL, FirstStageLevel, MiddleBlocks, VQAutoencoder
from ldm_core.blocks import ResidualBlock
from ldm_core.text_transformer import TextTransformer, TextTransformerLayer
from ldm_core.unet import UNet, UNetBlock

Named = Iterator[tuple[str, Tensor]]


def unet_weights(unet: UNet) -> dict[str, Tensor]:
    """Weights under the names of `UNet2DConditionModel` or `UNet2DModel`."""
    per_level = unet.config.num_res_blocks + 1
    named = chain(
        _plain("time_embedding.linear_1", unet.time_embedding.linear1),
        _plain("time_embedding.linear_2", unet.time_embedding.linear2),
        _plain("conv_in", unet.conv_in),
        *(_unet_block("down", *divmod(i, per_level), block) for i, block in enumerate(unet.input_blocks)),
        *(_unet_block("mid", 0, i, block) for i, block in enumerate(unet.middle_blocks)),
        *(_unet_block("up", *divmod(i, per_level), block) for i, block in enumerate(unet.output_blocks)),
        _plain("conv_norm_out", unet.norm_out),
        _plain("conv_out", unet.conv_out),
    )
    return dict(named)


def _unet_block(path: str, level: int, index: int, block: nn.Module) -> Named:
    assert isinstance(block, UNetBlock)
    prefix = "mid_block" if path == "mid" else f"{path}_blocks.{level}"
    if block.residual is not None:
        yield from _residual(f"{prefix}.resnets.{index}", block.residual)
    if isinstance(block.attention, SpatialTransformer):
        yield from _spatial_transformer(f"{prefix}.attentions.{index}", block.attention)
    elif block.attention is not None:
        yield from _self_attention(f"{prefix}.attentions.{index}", block.attention)
    if isinstance(block.resample, ResidualBlock):
        yield from _residual(f"{prefix}.{path}samplers.0", block.resample)
    elif block.resample is not None:
        yield from _plain(f"{prefix}.{path}samplers.0.conv", block.resample.conv)


def first_stage_weights(first_stage: AutoencoderKL | VQAutoencoder) -> dict[str, Tensor]:
    """Weights under the names of `AutoencoderKL` or `VQModel`."""
    encoder, decoder = first_stage.encoder, first_stage.decoder
    named = chain(
        *(_level(f"encoder.down_blocks.{i}", "down", level) for i, level in enumerate(encoder.levels)),
        *(_level(f"decoder.up_blocks.{i}", "up", level) for i, level in enumerate(decoder.levels)),
        *(_ends(name, part) for name, part in (("encoder", encoder), ("decoder", decoder))),
        _plain("quant_conv", first_stage.quant_conv),
        _plain("post_quant_conv", first_stage.post_quant_conv),
    )
    weights = dict(named)
    if isinstance(first_stage, VQAutoencoder):
        weights |= _plain("quantize.embedding", first_stage.quantizer.codebook)
    return weights


def _ends(prefix: str, part: nn.Module) -> Named:
    """First and last layers and the middle of an encoder or decoder."""
    middle = part.middle
    assert isinstance(middle, MiddleBlocks)
    yield from _plain(f"{prefix}.conv_in", part.conv_in)
    yield from _residual(f"{prefix}.mid_block.resnets.0", middle.residual1)
    yield from _residual(f"{prefix}.mid_block.resnets.1", middle.residual2)
    if isinstance(middle.attention, SelfAttentionBlock):
        yield from _self_attention(f"{prefix}.mid_block.attentions.0", middle.attention)
    yield from _plain(f"{prefix}.conv_norm_out", part.norm_out)
    yield from _plain(f"{prefix}.conv_out", part.conv_out)


def _level(prefix: str, direction: str, level: nn.Module) -> Named:
    assert isinstance(level, FirstStageLevel)
    for i, residual in enumerate(level.residuals):
        yield from _residual(f"{prefix}.resnets.{i}", residual)
    for i, attention in enumerate(level.attentions):
        yield from _self_attention(f"{prefix}.attentions.{i}", attention)
    if level.resample is not None:
        yield from _plain(f"{prefix}.{direction}samplers.0.conv", level.resample.conv)


def text_transformer_weights(transformer: TextTransformer) -> dict[str, Tensor]:
    """Weights under the names of `LDMBertModel`, output head included."""
    weights = dict(
        chain(
            _plain("model.embed_tokens", transformer.token_embedding),
            _plain("model.embed_positions", transformer.position_embedding),
            _plain("model.layer_norm", transformer.norm_out),
            _plain("to_logits", transformer.output_head),
        )
    )
    for i, layer in enumerate(transformer.layers):
        assert isinstance(layer, TextTransformerLayer)
        prefix = f"model.layers.{i}"
        weights |= _plain(f"{prefix}.self_attn_layer_norm", layer.norm1)
        weights |= _attention(f"{prefix}.self_attn", layer.attention, ("q_proj", "k_proj", "v_proj", "out_proj"))
        weights |= _plain(f"{prefix}.final_layer_norm", layer.norm2)
        weights |= _plain(f"{prefix}.fc1", layer.feed_forward.linear1)
        weights |= _plain(f"{prefix}.fc2", layer.feed_forward.linear2)
    return weights


def _plain(prefix: str, module: Any) -> Named:
    """Weight and bias of a single layer."""
    for name, weight in module.named_parameters():
        yield f"{prefix}.{name}", weight


def _residual(prefix: str, block: nn.Module) -> Named:
    assert isinstance(block, ResidualBlock)
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield from _plain(f"{prefix}.{name}", getattr(block, name))
    if block.embedding is not None:
        yield from _plain(f"{prefix}.time_emb_proj", block.embedding)
    yield from _plain(f"{prefix}.conv_shortcut", block.shortcut)


def _attention(prefix: str, attention: Any, names: tuple[str, str, str, str]) -> Named:
    assert isinstance(attention, Attention)
    layers = (attention.query, attention.key, attention.value, attention.output)
    for name, layer in zip(names, layers, strict=True):
        yield from _plain(f"{prefix}.{name}", layer)


def _self_attention(prefix: str, block: nn.Module) -> Named:
    assert isinstance(block, SelfAttentionBlock)
    yield from _plain(f"{prefix}.group_norm", block.norm)
    fused, output = block.query_key_value, block.project_out
    assert fused.bias is not None
    assert output.bias is not None
    for kind, parameter in (("weight", fused.weight[:, :, 0, 0]), ("bias", fused.bias)):
        # (head, [query, key, value], d) output channels become three layers of (head, d).
        parts = parameter.unflatten(0, (block.num_heads, 3, -1)).unbind(1)
        for name, part in zip(("to_q", "to_k", "to_v"), parts, strict=True):
            yield f"{prefix}.{name}.{kind}", part.flatten(0, 1)
    yield f"{prefix}.to_out.0.weight", output.weight[:, :, 0, 0]
    yield f"{prefix}.to_out.0.bias", output.bias


def _spatial_transformer(prefix: str, block: SpatialTransformer) -> Named:
    for ours, theirs in (("norm", "norm"), ("project_in", "proj_in"), ("project_out", "proj_out")):
        yield from _plain(f"{prefix}.{theirs}", getattr(block, ours))
    names = ("to_q", "to_k", "to_v", "to_out.0")
    for i, layer in enumerate(block.layers):
        assert isinstance(layer, CrossAttentionLayer)
        inner = f"{prefix}.transformer_blocks.{i}"
        for name in ("norm1", "norm2", "norm3"):
            yield from _plain(f"{inner}.{name}", getattr(layer, name))
        yield from _attention(f"{inner}.attn1", layer.self_attention, names)
        yield from _attention(f"{inner}.attn2", layer.cross_attention, names)
        yield from _plain(f"{inner}.ff.net.0.proj", layer.feed_forward.linear1)
        yield from _plain(f"{inner}.ff.net.2", layer.feed_forward.linear2)
