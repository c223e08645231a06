"""Names of weights in Hugging Face diffusers' networks."""

from __future__ import annotations

import re

from ldm_core.networks.attention import (
    Attention,
    CrossAttentionLayer,
    FeedForward,
    SelfAttentionBlock,
    SpatialTransformer,
)
from ldm_core.networks.autoencoder import AutoencoderKL, Decoder, Encoder, FirstStageLevel, MiddleBlocks, VQAutoencoder
from ldm_core.networks.blocks import Downsample, ResidualBlock, TimestepEmbedding, Upsample
from ldm_core.networks.text_transformer import TextTransformer, TextTransformerLayer
from ldm_core.networks.unet import UNet
from ldm_core.networks.vector_quantizer import VectorQuantizer
from ldm_core.weights.name_mapping import Children, Table, fused_attention

RESIDUAL = {
    "norm1": "norm1",
    "conv1": "conv1",
    "embedding": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
}
SELF_ATTENTION = fused_attention(("to_q", "to_k", "to_v"), "to_out.0", "group_norm", trailing=0)


def _unet(unet: UNet) -> Children:
    children = {"time_embedding": "time_embedding", "conv_in": "conv_in"}
    per_level = unet.config.num_res_blocks + 1
    for path, blocks in (("down", unet.input_blocks), ("up", unet.output_blocks)):
        ours = "input_blocks" if path == "down" else "output_blocks"
        # Ours are one flat list; theirs are grouped by level, `num_res_blocks` + 1 a level.
        for i in range(len(blocks)):
            level, index = divmod(i, per_level)
            children |= {
                f"{ours}.{i}.residual": f"{path}_blocks.{level}.resnets.{index}",
                f"{ours}.{i}.attention": f"{path}_blocks.{level}.attentions.{index}",
                f"{ours}.{i}.resample": f"{path}_blocks.{level}.{path}samplers.0",
            }
    for i in range(len(unet.middle_blocks)):
        children |= {
            f"middle_blocks.{i}.residual": f"mid_block.resnets.{i}",
            f"middle_blocks.{i}.attention": f"mid_block.attentions.{i}",
        }
    return children | {"norm_out": "conv_norm_out", "conv_out": "conv_out"}


UNET_TABLE: Table = {
    UNet: _unet,
    TimestepEmbedding: {"linear1": "linear_1", "linear2": "linear_2"},
    ResidualBlock: RESIDUAL,
    SpatialTransformer: {
        "norm": "norm",
        "project_in": "proj_in",
        "layers": "transformer_blocks",
        "project_out": "proj_out",
    },
    CrossAttentionLayer: {
        "norm1": "norm1",
        "self_attention": "attn1",
        "norm2": "norm2",
        "cross_attention": "attn2",
        "norm3": "norm3",
        "feed_forward": "ff.net",
    },
    Attention: {"query": "to_q", "key": "to_k", "value": "to_v", "output": "to_out.0"},
    FeedForward: {"linear1": "0.proj", "linear2": "2"},
    SelfAttentionBlock: SELF_ATTENTION,
    Downsample: {"conv": "conv"},
    Upsample: {"conv": "conv"},
}


def _level(level: FirstStageLevel) -> Children:
    sampler = "downsamplers.0" if isinstance(level.resample, Downsample) else "upsamplers.0"
    return {"residuals": "resnets", "attentions": "attentions", "resample": sampler}


CODER = {"conv_in": "conv_in", "middle": "mid_block", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
AUTOENCODER = {name: name for name in ("encoder", "decoder", "quant_conv", "post_quant_conv")}

FIRST_STAGE_TABLE: Table = {
    AutoencoderKL: AUTOENCODER,
    VQAutoencoder: AUTOENCODER | {"quantizer": "quantize"},
    VectorQuantizer: {"codebook": "embedding"},
    Encoder: CODER | {"levels": "down_blocks"},
    Decoder: CODER | {"levels": "up_blocks"},
    FirstStageLevel: _level,
    MiddleBlocks: {"residual1": "resnets.0", "attention": "attentions.0", "residual2": "resnets.1"},
    ResidualBlock: RESIDUAL,
    SelfAttentionBlock: SELF_ATTENTION,
    Downsample: {"conv": "conv"},
    Upsample: {"conv": "conv"},
}

TEXT_TRANSFORMER_TABLE: Table = {
    TextTransformer: {
        "token_embedding": "model.embed_tokens",
        "position_embedding": "model.embed_positions",
        "layers": "model.layers",
        "norm_out": "model.layer_norm",
        "output_head": "to_logits",
    },
    TextTransformerLayer: {
        "norm1": "self_attn_layer_norm",
        "attention": "self_attn",
        "norm2": "final_layer_norm",
        "feed_forward.linear1": "fc1",
        "feed_forward.linear2": "fc2",
    },
    Attention: {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"},
}


_OLD_ATTENTION = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_name(name: str) -> str:
    """Return a weight's name since diffusers 0.17, which renamed the layers of self-attention over pixels."""
    return _OLD_ATTENTION.sub(lambda match: _NEW_ATTENTION[match.group(1)], name)
