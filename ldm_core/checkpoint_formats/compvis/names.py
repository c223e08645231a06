"""Names of weights in the paper's code release (CompVis/latent-diffusion) and in Stable Diffusion v1's."""

from __future__ import annotations

from torch import nn

from ldm_core.conditioning import (
    ClassConditioner,
    FrozenClipConditioner,
    LayoutConditioner,
    LowResolutionConditioner,
    MaskedImageConditioner,
    SemanticMapConditioner,
    TextConditioner,
)
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.networks.attention import (
    Attention,
    CrossAttentionLayer,
    FeedForward,
    SelfAttentionBlock,
    SpatialTransformer,
)
from ldm_core.networks.autoencoder import (
    AutoencoderKL,
    Decoder,
    Encoder,
    FirstStage,
    FirstStageLevel,
    MiddleBlocks,
    VQAutoencoder,
)
from ldm_core.networks.blocks import Downsample, ResidualBlock, TimestepEmbedding, Upsample
from ldm_core.networks.clip_text import ClipTextLayer, ClipTextTransformer
from ldm_core.networks.text_transformer import TextTransformer
from ldm_core.networks.unet import UNet, UNetBlock
from ldm_core.networks.vector_quantizer import VectorQuantizer
from ldm_core.weights.clip_names import CLIP_TEXT_TABLE
from ldm_core.weights.name_mapping import (
    Children,
    Entry,
    Place,
    Row,
    Table,
    entries,
    fused_attention,
    pointwise,
)

UNET_PREFIX = "model.diffusion_model."
FIRST_STAGE_PREFIX = "first_stage_model."
CONDITIONER_PREFIX = "cond_stage_model."
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "output": "to_out.0"}


def _unet(unet: UNet) -> Children:
    # Their first input block is our conv_in.
    inputs = {f"input_blocks.{i}": f"input_blocks.{i + 1}" for i in range(len(unet.input_blocks))}
    ends = {"time_embedding": "time_embed", "conv_in": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2"}
    middle = {
        "middle_blocks.0.residual": "middle_block.0",
        "middle_blocks.0.attention": "middle_block.1",
        "middle_blocks.1.residual": "middle_block.2",
    }
    return ends | inputs | middle | {"output_blocks": "output_blocks"}


def _unet_block(block: UNetBlock) -> Children:
    """Number the parts that this block has: theirs is a plain sequence."""
    parts = ("residual", "attention", "resample")
    present = [name for name in parts if getattr(block, name) is not None]
    return {name: str(i) for i, name in enumerate(present)}


UNET_TABLE: Table = {
    UNet: _unet,
    TimestepEmbedding: {"linear1": "0", "linear2": "2"},
    UNetBlock: _unet_block,
    ResidualBlock: {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "embedding": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "shortcut": "skip_connection",
    },
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
    Attention: ATTENTION,
    FeedForward: {"linear1": "0.proj", "linear2": "2"},
    # Self-attention without context is one-dimensional there: kernels of shape (O, I, 1), fused as ours are.
    SelfAttentionBlock: {
        "norm": "norm",
        "query_key_value": Place(("qkv",), pointwise(trailing=1)),
        "project_out": Place(("proj_out",), pointwise(trailing=1)),
    },
    Downsample: {"conv": "op"},
    Upsample: {"conv": "conv"},
}


def _decoder(decoder: Decoder) -> Children:
    # Theirs number resolutions from the image's down, in both halves.
    last = len(decoder.levels) - 1
    return CODER | {f"levels.{i}": f"up.{last - i}" for i in range(last + 1)}


def _level(level: FirstStageLevel) -> Children:
    sampling = "downsample" if isinstance(level.resample, Downsample) else "upsample"
    return {"residuals": "block", "attentions": "attn", "resample": sampling}


CODER = {"conv_in": "conv_in", "middle": "mid", "norm_out": "norm_out", "conv_out": "conv_out"}
AUTOENCODER = {name: name for name in ("encoder", "decoder", "quant_conv", "post_quant_conv")}

FIRST_STAGE_TABLE: Table = {
    AutoencoderKL: AUTOENCODER,
    VQAutoencoder: AUTOENCODER | {"quantizer": "quantize"},
    VectorQuantizer: {"codebook": "embedding"},
    Encoder: CODER | {"levels": "down"},
    Decoder: _decoder,
    FirstStageLevel: _level,
    MiddleBlocks: {"residual1": "block_1", "attention": "attn_1", "residual2": "block_2"},
    ResidualBlock: {
        "norm1": "norm1",
        "conv1": "conv1",
        "norm2": "norm2",
        "conv2": "conv2",
        "shortcut": "nin_shortcut",
    },
    SelfAttentionBlock: fused_attention(("q", "k", "v"), "proj_out", "norm", trailing=2),
    Downsample: {"conv": "conv"},
    Upsample: {"conv": "conv"},
}


def _text_transformer(transformer: TextTransformer) -> Children:
    """Name the parts as x-transformers does: attention and feed-forward are layers of their own, each with its norm."""
    children = {
        "token_embedding": "token_emb",
        "position_embedding": "pos_emb.emb",
        "norm_out": "norm",
        "output_head": "to_logits",
    }
    for i in range(len(transformer.layers)):
        ours, attention, feed_forward = f"layers.{i}", f"attn_layers.layers.{2 * i}", f"attn_layers.layers.{2 * i + 1}"
        children |= {
            f"{ours}.norm1": f"{attention}.0",
            f"{ours}.attention": f"{attention}.1",
            f"{ours}.norm2": f"{feed_forward}.0",
            f"{ours}.feed_forward": f"{feed_forward}.1.net",
        }
    return children


TEXT_TRANSFORMER_TABLE: dict[type[nn.Module], Row] = {
    TextTransformer: _text_transformer,
    Attention: ATTENTION | {"output": "to_out"},
    FeedForward: {"linear1": "0.0", "linear2": "2"},
}

CONDITIONER_TABLE: Table = {
    **TEXT_TRANSFORMER_TABLE,
    TextConditioner: {"transformer": "transformer"},
    LayoutConditioner: {"transformer": "transformer"},
    FrozenClipConditioner: {"transformer": "transformer.text_model"},
    ClipTextTransformer: CLIP_TEXT_TABLE[ClipTextTransformer],
    ClipTextLayer: CLIP_TEXT_TABLE[ClipTextLayer],
    ClassConditioner: {"embedding": "embedding"},
    SemanticMapConditioner: {"channel_mapper": "channel_mapper"},
    LowResolutionConditioner: {},
    MaskedImageConditioner: {},
}


def first_stage_entries(first_stage: FirstStage) -> list[Entry]:
    """List every weight of a first stage with its name in the checkpoint of a first stage alone."""
    return entries(first_stage, FIRST_STAGE_TABLE)


def model_entries(model: LatentDiffusion) -> list[Entry]:
    """List every weight of a model with its name in the checkpoint of a whole model.

    Raises:
        ValueError: the release has no such conditioner.
    """
    listed = entries(model.unet, UNET_TABLE, ours="unet.", theirs=UNET_PREFIX)
    listed += entries(model.first_stage, FIRST_STAGE_TABLE, ours="first_stage.", theirs=FIRST_STAGE_PREFIX)
    if model.conditioner is None:
        return listed
    if type(model.conditioner) not in CONDITIONER_TABLE:
        raise ValueError(f"the code release has no such conditioner: {type(model.conditioner).__name__}")
    return listed + entries(model.conditioner, CONDITIONER_TABLE, ours="conditioner.", theirs=CONDITIONER_PREFIX)
