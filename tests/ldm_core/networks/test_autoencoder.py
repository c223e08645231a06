"""First stages: posteriors, the codebook, shapes and refusals."""

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.networks.autoencoder import AutoencoderKL, VQAutoencoder, build_first_stage
from ldm_core.networks.posterior import DiagonalGaussian
from ldm_core.networks.vector_quantizer import CodebookUsage, VectorQuantizer


def config(**changes: Any) -> FirstStageConfig:
    base: dict[str, Any] = {
        "regularization": "kl",
        "base_channels": 16,
        "channel_mult": (1, 2, 2),
        "num_res_blocks": 1,
        "z_channels": 4,
        "embed_dim": 3,
        "trained_at_resolution": 32,
        "norm_groups": 16,
    }
    return FirstStageConfig(**(base | changes))


VQ = {"regularization": "vq", "codebook_size": 32}


@pytest.mark.parametrize(
    ("changes", "kind", "moments"), [({}, AutoencoderKL, 2), (VQ, VQAutoencoder, 1)], ids=["kl", "vq"]
)
def test_images_become_latents_f_times_smaller_and_come_back(changes: dict[str, Any], kind: type, moments: int) -> None:
    first_stage = build_first_stage(config(**changes))
    assert isinstance(first_stage, kind)
    posterior = first_stage.encode(torch.randn(2, 3, 16, 24))
    assert posterior.moments.shape == (2, moments, 3, 4, 6)
    assert posterior.sample().shape == posterior.mode().shape == (2, 3, 4, 6)
    assert first_stage.decode(posterior.mode()).shape == (2, 3, 16, 24)


def test_training_loss_reaches_every_parameter() -> None:
    kl, vq = build_first_stage(config()), build_first_stage(config(**VQ))
    assert isinstance(vq, VQAutoencoder)
    x = torch.randn(1, 3, 16, 16)
    posterior = kl.encode(x)
    assert isinstance(posterior, DiagonalGaussian)
    (kl.decode(posterior.sample()).square().mean() + posterior.kl().mean()).backward()
    latent = vq.encode(x).mode()
    (vq.decode(latent).square().mean() + vq.quantize(latent).loss).backward()
    for first_stage in (kl, vq):
        assert [name for name, each in first_stage.named_parameters() if each.grad is None] == []


@pytest.mark.parametrize("changes", [{}, VQ], ids=["kl", "vq"])
def test_latents_are_not_rounded_by_autocast(changes: dict[str, Any]) -> None:
    first_stage = build_first_stage(config(**changes)).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        plain = first_stage.encode(x)
        with torch.autocast("cpu", torch.bfloat16):
            features = first_stage.encoder(x)
            posterior = first_stage.encode(x)
            sample = posterior.sample()
        exact = first_stage.quant_conv(features.float())
    assert features.dtype == torch.bfloat16
    assert {posterior.moments.dtype, sample.dtype, posterior.mode().dtype} == {torch.float32}
    assert torch.equal(posterior.mode(), exact[:, :3])
    # What comes before is still computed in half precision.
    assert 0 < (posterior.mode() - plain.mode()).abs().max() < 0.1


def test_kl_of_a_posterior_in_half_precision_is_summed_in_float32() -> None:
    moments = torch.randn(2, 2, 4, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    kl = DiagonalGaussian.from_moments(moments).kl()
    assert torch.equal(kl, DiagonalGaussian.from_moments(moments.float()).kl())
    assert DiagonalGaussian.from_moments(moments.double()).kl().dtype == torch.float64


def test_encoder_starts_within_the_clamp_of_the_log_variance() -> None:
    first_stage = build_first_stage(config())
    assert isinstance(first_stage, AutoencoderKL)
    assert first_stage.quant_conv.bias is not None
    with torch.no_grad():
        first_stage.quant_conv.bias[3:] = torch.tensor([1e6, -1e6, 0.0])
    logvar = first_stage.encode(torch.randn(1, 3, 16, 16)).moments[:, 1]
    assert logvar[0, 0].unique().tolist() == [20.0]
    assert logvar[0, 1].unique().tolist() == [-30.0]


def test_posterior_samples_have_its_mean_and_standard_deviation() -> None:
    shape = (1, 1, 200, 200)
    posterior = DiagonalGaussian(torch.full(shape, 2.0), torch.full(shape, math.log(9.0)))
    sample = posterior.sample(generator=torch.Generator().manual_seed(0))
    assert sample.mean().item() == pytest.approx(2.0, abs=0.05)
    assert sample.std().item() == pytest.approx(3.0, rel=0.02)
    again = posterior.sample(generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample, again)
    assert torch.equal(posterior.sample(noise=torch.ones(shape)), torch.full(shape, 5.0))


def test_posterior_kl_is_that_of_torch_and_moments_restore_it() -> None:
    torch.manual_seed(0)
    posterior = DiagonalGaussian(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))
    normal = torch.distributions.Normal(posterior.mean, torch.exp(0.5 * posterior.logvar))
    reference = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(posterior.kl(), reference.sum((1, 2, 3)))
    assert torch.equal(DiagonalGaussian.from_moments(posterior.moments).logvar, posterior.logvar)


def test_codebook_picks_the_nearest_entry_and_lets_gradients_through() -> None:
    quantizer = VectorQuantizer(4, 2)
    with torch.no_grad():
        quantizer.codebook.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    z = torch.tensor([[0.9, 0.2], [0.1, 0.8]]).T.reshape(1, 2, 1, 2).requires_grad_()
    result = quantizer(z)
    assert result.indices.tolist() == [[[1, 2]]]
    assert torch.allclose(result.latent, torch.tensor([[1.0, 0.0], [0.0, 1.0]]).T.reshape(1, 2, 1, 2))
    assert result.perplexity.item() == pytest.approx(2.0)
    (gradient,) = torch.autograd.grad(result.latent.sum(), z)
    assert torch.equal(gradient, torch.ones_like(z))


@pytest.mark.parametrize(("legacy", "to_latent", "to_codebook"), [(True, 1.0, 0.25), (False, 0.25, 1.0)])
def test_codebook_loss_weighs_terms_by_either_published_convention(
    legacy: bool, to_latent: float, to_codebook: float
) -> None:
    quantizer = VectorQuantizer(2, 1, legacy_loss=legacy)
    with torch.no_grad():
        quantizer.codebook.weight.copy_(torch.tensor([[0.0], [10.0]]))
    z = torch.full((1, 1, 1, 1), 0.5, requires_grad=True)
    result = quantizer(z)
    assert result.loss.item() == pytest.approx(1.25 * 0.25)
    result.loss.backward()
    assert z.grad is not None
    assert quantizer.codebook.weight.grad is not None
    assert z.grad.item() == pytest.approx(to_latent * 2 * 0.5)
    assert quantizer.codebook.weight.grad[0].item() == pytest.approx(-to_codebook * 2 * 0.5)


@pytest.mark.parametrize(
    ("legacy", "loss", "gradient_z", "gradient_codebook"),
    [
        # VectorQuantizer2 of taming-transformers, worked out by hand: z = (0.5, -1), (2, 0.25) are 0.5, -1 and 1, -0.75
        # off their entries (0, 0) and (1, 1), mean square 0.703125 over four numbers; legacy=True puts beta = 0.25 on
        # mean((z_q - sg[z])^2), legacy=False on mean((sg[z_q] - z)^2).
        (True, 0.87890625, [[0.25, 0.5], [-0.5, -0.375]], [[-0.0625, 0.125], [-0.125, 0.09375]]),
        (False, 0.87890625, [[0.0625, 0.125], [-0.125, -0.09375]], [[-0.25, 0.5], [-0.5, 0.375]]),
    ],
    ids=["legacy", "corrected"],
)
def test_codebook_loss_has_the_golden_values_of_the_published_code(
    legacy: bool, loss: float, gradient_z: list[list[float]], gradient_codebook: list[list[float]]
) -> None:
    quantizer = VectorQuantizer(3, 2, beta=0.25, legacy_loss=legacy)
    with torch.no_grad():
        quantizer.codebook.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [-9.0, 9.0]]))
    z = torch.tensor([[[[0.5, 2.0]], [[-1.0, 0.25]]]], requires_grad=True)
    result = quantizer(z)
    assert result.indices.tolist() == [[[0, 1]]]
    assert result.loss.item() == pytest.approx(loss)
    result.loss.backward()
    assert z.grad is not None
    assert quantizer.codebook.weight.grad is not None
    torch.testing.assert_close(z.grad[0, :, 0], torch.tensor(gradient_z))
    torch.testing.assert_close(quantizer.codebook.weight.grad[:2], torch.tensor(gradient_codebook))
    assert not quantizer.codebook.weight.grad[2].any()


def test_codebook_usage_accumulates_over_batches() -> None:
    usage = CodebookUsage(4)
    usage.update(torch.tensor([[0, 0], [1, 1]]))
    assert (usage.perplexity(), usage.used_fraction()) == (pytest.approx(2.0), 0.5)
    usage.update(torch.tensor([2, 2]))
    assert usage.counts.tolist() == [2, 2, 2, 0]
    assert (usage.perplexity(), usage.used_fraction()) == (pytest.approx(3.0), 0.75)


def test_codebook_usage_of_a_batch_is_its_perplexity() -> None:
    torch.manual_seed(0)
    quantizer, usage = VectorQuantizer(64, 3), CodebookUsage(64)
    result = quantizer(torch.randn(2, 3, 16, 16) / 64)
    usage.update(result.indices)
    assert usage.perplexity() == pytest.approx(result.perplexity.item())


def test_codebook_usage_refuses_latents_and_has_no_answer_without_counts() -> None:
    with pytest.raises(ValueError, match=r"must be integers, got torch\.float32: pass Quantization\.indices"):
        CodebookUsage(4).update(torch.zeros(1, 4, 2, 2))
    for statistic in (CodebookUsage(4).perplexity, CodebookUsage(4).used_fraction):
        with pytest.raises(ValueError, match="at least one index, got none"):
            statistic()


def test_autocast_does_not_change_the_entries_picked() -> None:
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(512, 3), torch.randn(1, 3, 32, 32) / 512
    expected = quantizer(z).indices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(z).indices, expected)


class RoughMatmuls(TorchDispatchMode):
    """Multiply float32 matrices as TF32 units do under `set_float32_matmul_precision`: in ten bits of mantissa."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            args = [_ten_bits(arg) if isinstance(arg, Tensor) else arg for arg in args]
        return func(*args, **(kwargs or {}))


def _ten_bits(tensor: Tensor) -> Tensor:
    return (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32) if tensor.dtype == torch.float32 else tensor


def test_rough_matmuls_do_not_change_the_entries_picked() -> None:
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(512, 3), torch.randn(1, 3, 32, 32) / 512
    distances = (z.permute(0, 2, 3, 1)[..., None, :] - quantizer.codebook.weight).double().norm(dim=-1)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with RoughMatmuls():
            assert torch.equal(quantizer(z).indices, distances.argmin(-1))
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("changes", [{}, VQ], ids=["kl", "vq"])
def test_half_precision_weights_take_full_precision_images_and_latents(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    first_stage = build_first_stage(config(attention_resolutions=(8,), **changes)).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        z = first_stage.encode(x).mode()
        image = first_stage.decode(z)
        half = copy.deepcopy(first_stage).bfloat16()
        assert (half.encode(x).mode().float() - z).norm() < 0.05 * z.norm()
        decoded = half.decode(z)
    assert decoded.dtype == torch.bfloat16
    assert (decoded.float() - image).norm() < 0.05 * image.norm()


@pytest.mark.parametrize("changes", [{}, VQ], ids=["kl", "vq"])
def test_in_place_shortcuts_without_gradients_change_nothing(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    first_stage = build_first_stage(config(**changes)).eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        z = first_stage.encode(x).mode()
        image = first_stage.decode(z)
    torch.testing.assert_close(first_stage.encode(x).mode(), z.clone())
    torch.testing.assert_close(first_stage.decode(z.clone()), image.clone())


def test_decoding_quantizes_first() -> None:
    first_stage = build_first_stage(config(**VQ)).eval()
    assert isinstance(first_stage, VQAutoencoder)
    z = torch.randn(1, 3, 4, 4)
    assert torch.allclose(first_stage.decode(z), first_stage.decode(first_stage.quantize(z).latent), atol=1e-5)
    assert torch.equal(first_stage.quantizer.lookup(z), first_stage.quantize(z).latent)


def test_wrong_shapes_are_named() -> None:
    for changes in ({}, VQ):
        first_stage = build_first_stage(config(**changes))
        with pytest.raises(ValueError, match=r"multiples of 4, got shape \(1, 3, 18, 16\); crop or resize"):
            first_stage.encode(torch.zeros(1, 3, 18, 16))
        with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\)"):
            first_stage.encode(torch.zeros(1, 4, 16, 16))
        with pytest.raises(ValueError, match=r"latents must be \(B, 3, h, w\), got shape \(1, 4, 4, 4\)"):
            first_stage.decode(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regularization": "gan"}, 'must be "kl" or "vq", got \'gan\''),
        ({"base_channels": 24}, "base_channels must be a multiple of norm_groups=16, got 24"),
        ({"codebook_size": 8}, "codebook_size must be given exactly for .* got 8 with 'kl'"),
        ({"regularization": "vq"}, "codebook_size must be given exactly for .* got None with 'vq'"),
        ({"regularization": "vq", "codebook_size": 1}, "codebook_size must be at least 2, got 1"),
        ({"channel_mult": (1, 0)}, r"channel_mult must list positive factors, got \(1, 0\)"),
        ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
        ({"trained_at_resolution": 30}, "must be a multiple of the downsampling factor 4, got 30"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_configuration_survives_json() -> None:
    original = config(attention_resolutions=(16, 8))
    assert FirstStageConfig(**json.loads(json.dumps(dataclasses.asdict(original)))) == original
