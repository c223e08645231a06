"""Our networks against diffusers' with the same random weights, in float32."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_core.checkpoint_formats.diffusers.folder import write_config as theirs
from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.text import TextTransformerConfig
from ldm_core.configs.unet import UNetConfig
from ldm_core.networks.autoencoder import VQAutoencoder, build_first_stage
from ldm_core.networks.posterior import DiagonalGaussian
from ldm_core.networks.text_transformer import TextTransformer
from ldm_core.networks.unet import UNet
from tests.diffusers_weights import diffusers_weights
from tests.random_weights import randomized

diffusers = pytest.importorskip("diffusers")

# Share of the largest output.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _single_thread(own_threads: None) -> None:
    torch.set_num_threads(1)


def assert_same(ours: Tensor, reference: Tensor) -> None:
    assert ours.shape == reference.shape
    assert reference.abs().max() > 1e-3
    assert (ours - reference).abs().max() <= TOLERANCE * reference.abs().max()


def load_reference(module: nn.Module, state: dict[str, Tensor]) -> Any:
    module.load_state_dict(state, strict=True)
    return module.eval()


def reference_unet(unet: UNet) -> Any:
    settings: dict[str, Any] = theirs.unet_config(unet.config)
    kind = getattr(diffusers, settings.pop("_class_name"))
    return load_reference(kind(**settings), diffusers_weights(unet))


def unet_config(**changes: Any) -> UNetConfig:
    base: dict[str, Any] = {
        "latent_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "channel_mult": (1, 2, 4),
        "attention_downsampling": (2, 4),
        "num_head_channels": 16,
    }
    return UNetConfig(**(base | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 4, "num_head_channels": None},
        {"num_heads": 1, "num_head_channels": None, "attention_downsampling": (1, 2)},
        {"transformer_depth": 3, "num_res_blocks": 1},
        {"use_scale_shift_norm": True, "attention_downsampling": (8,)},
    ],
    ids=["heads by number", "one head", "heads by channels, depth 3", "scale-shift, middle attention only"],
)
def test_cross_attention_unet_computes_what_diffusers_computes(changes: dict[str, Any]) -> None:
    unet = randomized(UNet(unet_config(context_dim=24, **changes))).eval()
    z, t, context = torch.randn(2, 4, 8, 16), torch.tensor([3, 981]), torch.randn(2, 5, 24)
    with torch.no_grad():
        reference = reference_unet(unet)(z, t, encoder_hidden_states=context).sample
        assert_same(unet(z, t, context=context), reference)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_downsampling": (32, 16), "num_heads": 8, "num_head_channels": None},
        {"use_scale_shift_norm": True, "resblock_up_down": True},
    ],
    ids=["attention at two levels", "middle attention only", "residual up and down, scale-shift"],
)
def test_unconditional_unet_computes_what_diffusers_computes(changes: dict[str, Any]) -> None:
    unet = randomized(UNet(unet_config(**changes))).eval()
    z, t = torch.randn(2, 4, 8, 16), torch.tensor([3, 981])
    with torch.no_grad():
        assert_same(unet(z, t), reference_unet(unet)(z, t).sample)


def test_training_gradients_agree_with_diffusers() -> None:
    unet = randomized(UNet(unet_config(context_dim=24)))
    reference: Any = reference_unet(unet).train()
    middle: Any = unet.middle_blocks[0]
    z, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 981]), torch.randn(2, 5, 24)
    unet(z, t, context=context).square().mean().backward()
    reference(z, t, encoder_hidden_states=context).sample.square().mean().backward()
    for ours, other in [
        (unet.conv_in.weight, reference.conv_in.weight),
        (unet.time_embedding.linear1.weight, reference.time_embedding.linear_1.weight),
        (
            middle.attention.layers[0].cross_attention.key.weight,
            reference.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight,
        ),
    ]:
        assert (ours.grad - other.grad).abs().max() <= 1e-3 * other.grad.abs().max()


def first_stage_config(**changes: Any) -> FirstStageConfig:
    base: dict[str, Any] = {
        "regularization": "kl",
        "base_channels": 32,
        "channel_mult": (1, 2, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (8,),
        "z_channels": 4,
        "embed_dim": 4,
        "trained_at_resolution": 32,
    }
    return FirstStageConfig(**(base | changes))


@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_resolutions": (), "mid_attention": False, "num_res_blocks": 2}, {"norm_groups": 16}],
    ids=["attention at the lowest level", "no attention", "16 groups"],
)
def test_kl_first_stage_computes_what_diffusers_computes(changes: dict[str, Any]) -> None:
    config = first_stage_config(**changes)
    first_stage = randomized(build_first_stage(config)).eval()
    settings = theirs.first_stage_config(config, scale_factor=1.0)
    settings.pop("_class_name")
    reference = load_reference(diffusers.AutoencoderKL(**settings), diffusers_weights(first_stage))
    x, z = torch.randn(2, 3, 32, 16), torch.randn(2, 4, 8, 4)
    with torch.no_grad():
        ours, posterior = first_stage.encode(x), reference.encode(x).latent_dist
        assert_same(ours.mode(), posterior.mean)
        assert isinstance(ours, DiagonalGaussian)
        assert_same(ours.moments[:, 1], posterior.logvar)
        assert torch.allclose(ours.kl(), posterior.kl(), rtol=1e-3)
        assert_same(first_stage.decode(z), reference.decode(z).sample)


@pytest.mark.parametrize("changes", [{}, {"attention_resolutions": (), "mid_attention": False}])
def test_vq_first_stage_computes_what_diffusers_computes(changes: dict[str, Any]) -> None:
    config = first_stage_config(regularization="vq", codebook_size=64, embed_dim=3, **changes)
    first_stage = randomized(VQAutoencoder(config)).eval()
    settings = theirs.first_stage_config(config, scale_factor=1.0)
    settings.pop("_class_name")
    reference = load_reference(diffusers.VQModel(**settings), diffusers_weights(first_stage))
    x, z = torch.randn(2, 3, 32, 16), 0.1 * torch.randn(2, 3, 8, 4)
    with torch.no_grad():
        assert_same(first_stage.encode(x).mode(), reference.encode(x).latents)
        quantized, loss, (_, _, indices) = reference.quantize(z)
        ours = first_stage.quantize(z)
        assert torch.equal(ours.indices.flatten(), indices.flatten())
        assert_same(ours.latent, quantized)
        assert torch.allclose(ours.loss, loss)
        assert_same(first_stage.decode(z), reference.decode(z).sample)


def test_text_transformer_computes_what_diffusers_computes() -> None:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    config = TextTransformerConfig(vocabulary_size=50, max_length=12, width=48, layers=3, heads=4, head_dim=8)
    transformer = randomized(TextTransformer(config)).eval()
    reference = load_reference(
        LDMBertModel(LDMBertConfig(**theirs.text_transformer_config(config))),
        diffusers_weights(transformer),
    )
    tokens = torch.randint(0, 50, (3, 12))
    with torch.no_grad():
        assert_same(transformer(tokens), reference(tokens)[0])
