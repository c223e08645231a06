"""The whole model on a tiny preset: its parts fit, it scales latents, and images depend on caption and seed alone."""

import copy
import dataclasses
import functools
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_core import guidance, presets, samplers
from ldm_core.conditioning import Conditioning, Shared
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.configs.text import TextTransformerConfig
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.objective import DiffusionObjective, Prediction
from ldm_core.schedule import NoiseSchedule
from tests.random_weights import without_zeros

CONFIG = presets.get("tiny-txt2img")
assert isinstance(CONFIG.conditioner, TextTransformerConfig)
LENGTH = CONFIG.conditioner.max_length
EMPTY = torch.tensor([2, 3] + [0] * (LENGTH - 2))


def with_random_outputs(config: LatentDiffusionConfig) -> LatentDiffusion:
    """Build a model whose zero-initialized layers are random too, so that its prediction depends on its inputs."""
    torch.manual_seed(0)
    model = config.build().eval()
    without_zeros(model.unet)
    return model


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return with_random_outputs(dataclasses.replace(CONFIG, scale_factor=0.5))


@pytest.fixture(scope="module")
def unconditional() -> LatentDiffusion:
    unet = dataclasses.replace(CONFIG.unet, context_dim=None)
    return with_random_outputs(dataclasses.replace(CONFIG, unet=unet, conditioner=None))


def captions(*seeds: int) -> Tensor:
    return torch.stack(
        [torch.randint(5, 900, (LENGTH,), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def test_scaling_is_the_models_and_not_the_first_stages(model: LatentDiffusion) -> None:
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    posterior = model.first_stage.encode(x)
    torch.testing.assert_close(model.encode(x), 0.5 * posterior.mode())
    noise = torch.randn(posterior.mode().shape)
    torch.testing.assert_close(model.encode(x, noise=noise), 0.5 * posterior.sample(noise=noise))
    torch.testing.assert_close(model.decode(model.encode(x)), model.first_stage.decode(posterior.mode()))


@torch.no_grad()
def test_the_network_to_train_shares_the_models_weights(model: LatentDiffusion) -> None:
    network = model.network()
    z, t, tokens = torch.randn(2, *latent_shape(model)), torch.tensor([3, 700]), captions(1, 2)
    expected = model.unet(z, t, context=model.conditioner(tokens).context)  # type: ignore[misc]
    assert torch.equal(network(z, t, tokens), expected)
    assert {f"unet.{name}" for name in model.unet.state_dict()} <= network.state_dict().keys()
    assert network.state_dict().keys() <= model.state_dict().keys()
    assert CONFIG.build_network("meta").state_dict().keys() == network.state_dict().keys()


def test_a_training_step_reaches_every_trainable_weight(model: LatentDiffusion) -> None:
    network = model.network()
    z0, noise = torch.randn(2, 2, *latent_shape(model))
    objective = DiffusionObjective(model.schedule)
    tokens = captions(1, 2)
    losses = objective.loss(lambda z, t: network(z, t, tokens), z0, noise, torch.tensor([10, 900]))
    losses.mean().backward()
    without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    network.zero_grad(set_to_none=True)
    assert without == []


def test_captions_that_several_samples_share_are_encoded_once_with_the_same_result(model: LatentDiffusion) -> None:
    network = copy.deepcopy(model).network()
    encoded: list[int] = []
    assert network.conditioner is not None
    network.conditioner.register_forward_pre_hook(lambda _, arguments: encoded.append(len(arguments[0])))
    z, t = torch.randn(3, *latent_shape(model)), torch.tensor([3, 500, 700])
    distinct, row = torch.stack([captions(1)[0], EMPTY]), torch.tensor([1, 0, 1])
    results = []
    for inputs in (distinct[row], Shared(inputs=distinct, row=row)):
        network.zero_grad()
        output = network(z, t, inputs)
        output.square().mean().backward()
        results.append([output, *(weight.grad for weight in network.parameters() if weight.grad is not None)])
    assert encoded == [3, 2]
    for each, shared in zip(*results, strict=True):
        torch.testing.assert_close(shared, each, rtol=1e-4, atol=1e-5)


def test_an_image_depends_on_its_own_caption_and_seed_alone(model: LatentDiffusion) -> None:
    settings: dict[str, Any] = {"unconditional": EMPTY, "num_steps": 4, "guidance_scale": 3.0, "eta": 0.5}
    together = model.sample(captions(1, 2, 3), seeds=[11, 12, 13], **settings)
    size = model.config.unet.latent_size * model.config.first_stage.downsampling_factor
    assert together.shape == (3, 3, size, size)
    assert together.abs().max() <= 1
    alone = model.sample(captions(2), seeds=[12], **settings)
    torch.testing.assert_close(together[1:2], alone, atol=1e-3, rtol=0)
    other_seed = model.sample(captions(2), seeds=[99], **settings)
    other_caption = model.sample(captions(9), seeds=[12], **settings)
    assert (alone - other_seed).abs().max() > 1e-2
    assert (alone - other_caption).abs().max() > 1e-3


def test_guidance_changes_the_image_and_a_scale_of_one_needs_no_empty_caption(model: LatentDiffusion) -> None:
    plain = model.sample(captions(1), seeds=[0], num_steps=3)
    guided = model.sample(captions(1), seeds=[0], num_steps=3, guidance_scale=5.0, unconditional=EMPTY)
    assert (plain - guided).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"guidance_scale=5\.0 needs `unconditional`"):
        model.sample(captions(1), seeds=[0], num_steps=3, guidance_scale=5.0)


def test_an_unconditional_model_samples_from_seeds_alone(unconditional: LatentDiffusion) -> None:
    images = unconditional.sample(seeds=[1, 2], num_steps=3)
    assert images.shape[0] == 2
    with pytest.raises(ValueError, match="only a model with a context can be guided"):
        unconditional.sample(seeds=[1], guidance_scale=2.0)
    with pytest.raises(ValueError, match="an unconditional one takes none"):
        unconditional.sample(captions(1), seeds=[1])


@torch.no_grad()
def test_the_denoiser_predicts_the_noise_whatever_the_network_predicts(model: LatentDiffusion) -> None:
    z, t = torch.randn(1, *latent_shape(model)), torch.tensor([400])
    context = model.conditioner(captions(1)).context  # type: ignore[misc]
    raw = model.unet(z, t, context=context)
    signal, sigma = model.schedule.levels(t, like=z)
    expected = {"eps": raw, "v": signal * raw + sigma * z, "x0": (z - signal * raw) / sigma}
    for parameterization, eps in expected.items():
        config = dataclasses.replace(model.config, parameterization=parameterization)  # type: ignore[arg-type]
        other = config.build()
        other.load_state_dict(model.state_dict())
        answer = other.guided_denoiser(Conditioning(context=context))(z, t)
        assert isinstance(answer, Tensor) == (parameterization == "eps")
        torch.testing.assert_close(answer.eps if isinstance(answer, Prediction) else answer, eps)


@torch.no_grad()
def test_the_guided_denoiser_is_classifier_free_guidance_of_the_networks_output(model: LatentDiffusion) -> None:
    # In double precision: guidance amplifies the rounding of float32, which differs between batch sizes and machines.
    model = copy.deepcopy(model).double()
    z, t = torch.randn(2, *latent_shape(model), dtype=torch.float64), torch.tensor([400, 400])
    contexts = [model.conditioner(tokens).context for tokens in (captions(1, 2), EMPTY.view(1, -1))]  # type: ignore[misc]
    cases: tuple[dict[str, Any], ...] = ({}, {"rescale": 0.7}, {"interval": (0, 399)}, {"interval": (400, 999)})
    for settings in cases:
        with_it, without = (
            model.unet(z, t, context=contexts[0]),
            model.unet(z, t, context=contexts[1].expand(2, -1, -1)),
        )
        guided = settings.get("interval", (0, 999))[1] >= 400
        expected = guidance.combine(without, with_it, 3.0, rescale=settings.get("rescale", 0.0)) if guided else with_it
        fast = model.guided_denoiser(captions(1, 2), unconditional=EMPTY, guidance_scale=3.0, **settings)  # type: ignore[arg-type]
        for _ in range(2):  # the second call uses what the first one kept
            torch.testing.assert_close(fast(z, t), expected, atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="bound to 2 inputs, got 1 latents"):
        fast(z[:1], t[:1])
    with pytest.raises(ValueError, match="tokenize both alike"):
        model.guided_denoiser(captions(1), unconditional=EMPTY[:5], guidance_scale=3.0)


@torch.no_grad()
def test_both_halves_of_guidance_are_blind_to_padding_where_the_model_is(model: LatentDiffusion) -> None:
    conditioner = dataclasses.replace(model.config.conditioner, pad_id=0)  # type: ignore[type-var]
    masked = dataclasses.replace(model.config, conditioner=conditioner).build().eval().double()
    masked.load_state_dict(model.state_dict())
    z, t = torch.randn(2, *latent_shape(model), dtype=torch.float64), torch.tensor([400, 400])
    tokens = captions(1, 2)
    tokens[1, 4:] = 0
    guided = masked.guided_denoiser(tokens, unconditional=EMPTY, guidance_scale=3.0)(z, t)
    network = masked.network()
    with_it, without = network(z, t, tokens), network(z, t, EMPTY.expand(2, -1))
    torch.testing.assert_close(guided, without + 3.0 * (with_it - without), atol=1e-12, rtol=1e-12)
    seen = copy.deepcopy(model).double().guided_denoiser(tokens, unconditional=EMPTY, guidance_scale=3.0)(z, t)
    assert (guided - seen).abs().max() > 1e-3  # type: ignore[operator]


@torch.no_grad()
def test_a_model_of_v_samples_from_pure_noise_under_zero_terminal_snr(model: LatentDiffusion) -> None:
    schedule = dataclasses.replace(model.config.schedule, zero_terminal_snr=True)
    config = dataclasses.replace(model.config, parameterization="v", schedule=schedule)
    other = config.build().eval()
    other.load_state_dict(model.state_dict())
    denoise = other.guided_denoiser(captions(1), unconditional=EMPTY, guidance_scale=2.0, rescale=0.7)
    noise = samplers.seeded_noise([0], latent_shape(other))
    visited: list[int] = []
    z = samplers.ddim(denoise, noise(), other.schedule, num_steps=3, callback=lambda step, t, x0: visited.append(t))
    assert z.isfinite().all()
    assert visited == [999, 666, 332]


def test_every_caption_needs_its_own_seed(model: LatentDiffusion) -> None:
    with pytest.raises(ValueError, match="got 1 seeds for 2 inputs"):
        model.sample(captions(1, 2), seeds=[1])


def test_a_config_survives_a_round_trip_through_json() -> None:
    config = dataclasses.replace(CONFIG, scale_factor=0.7, parameterization="v", loss="l1")
    again = LatentDiffusionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_every_preset_survives_a_round_trip_through_json_and_builds_without_memory() -> None:
    for name in presets.names():
        config = presets.get(name)
        assert LatentDiffusionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert next(presets.get("txt2img-1p4b").build("meta").parameters()).is_meta


@pytest.mark.parametrize(
    ("path", "key", "message"),
    [
        ((), "scale_facto", "model config has no setting 'scale_facto', did you mean 'scale_factor'"),
        (("unet",), "model_chanels", "unet has no setting 'model_chanels', did you mean 'model_channels'"),
        (("schedule",), "zzz", "schedule has no setting 'zzz': it has timesteps"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_known_one(
    path: tuple[str, ...], key: str, message: str
) -> None:
    values = CONFIG.to_dict()
    inner = values
    for name in path:
        inner = inner[name]
    inner[key] = 1
    with pytest.raises(ValueError, match=message):
        LatentDiffusionConfig.from_dict(values)


def test_a_missing_setting_is_refused() -> None:
    values = CONFIG.to_dict()
    del values["unet"]
    with pytest.raises(ValueError, match="model config lacks unet"):
        LatentDiffusionConfig.from_dict(values)
    with pytest.raises(ValueError, match="unet must be a mapping of settings, got 3"):
        LatentDiffusionConfig.from_dict({**values, "unet": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_factor": 0.0}, r"scale_factor must be a positive number, got 0\.0"),
        ({"scale_factor": float("nan")}, "scale_factor must be a positive number, got nan"),
        ({"conditioner": None}, "context_dim must be the conditioner's width"),
        ({"unet": dataclasses.replace(CONFIG.unet, in_channels=9)}, "4 in all, and give 4; got in_channels=9"),
        ({"schedule": ScheduleConfig(zero_terminal_snr=True)}, "use parameterization v or x0"),
        ({"loss": "l3"}, "loss must be l1 or l2, got 'l3'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def latent_shape(model: LatentDiffusion) -> tuple[int, int, int]:
    size = model.config.unet.latent_size
    return model.config.first_stage.embed_dim, size, size


@pytest.mark.parametrize("sampler", [samplers.plms, samplers.dpm_solver_pp_2m, samplers.unipc])
def test_every_few_step_sampler_samples_and_only_ddim_takes_an_eta(
    model: LatentDiffusion, sampler: samplers.Sampler
) -> None:
    images = model.sample(captions(1), seeds=[0], num_steps=3, sampler=sampler)
    assert images.isfinite().all()
    with pytest.raises(ValueError, match=rf"the sampler {sampler.__name__} takes no eta, got 0\.5: leave it out"):
        model.sample(captions(1), seeds=[0], num_steps=3, sampler=sampler, eta=0.5)


def test_any_function_of_a_denoiser_samples_with_the_options_that_it_takes(model: LatentDiffusion) -> None:
    calls: list[dict[str, object]] = []

    def mine(denoise: samplers.Denoise, x: Tensor, schedule: NoiseSchedule, *, num_steps: int, strange: int) -> Tensor:
        calls.append({"num_steps": num_steps, "strange": strange})
        return samplers.unipc(denoise, x, schedule, num_steps=num_steps)

    def sample(sampler: samplers.Sampler, **options: Any) -> Tensor:
        return model.sample(captions(1), seeds=[0], sampler=sampler, **options)

    torch.testing.assert_close(
        sample(functools.partial(mine, strange=7), num_steps=3), sample(samplers.unipc, num_steps=3)
    )
    assert calls == [{"num_steps": 3, "strange": 7}]
    first_order = sample(functools.partial(samplers.unipc, order=1, num_steps=3))
    assert (first_order - sample(samplers.unipc, num_steps=3)).abs().max() > 1e-4
    with pytest.raises(ValueError, match="takes no num_steps, got 3: leave it out"):
        sample(samplers.ddpm, num_steps=3)

    def handing_on(denoise: samplers.Denoise, x: Tensor, schedule: NoiseSchedule, **options: Any) -> Tensor:
        return samplers.ddim(denoise, x, schedule, **options)

    assert torch.equal(sample(handing_on, num_steps=3, eta=0.9), sample(samplers.ddim, num_steps=3, eta=0.9))


def test_ddpm_samples_through_all_timesteps_from_seeds_alone(unconditional: LatentDiffusion) -> None:
    schedule = dataclasses.replace(unconditional.config.schedule, timesteps=6, beta_end=0.5)
    short = dataclasses.replace(unconditional.config, schedule=schedule).build().eval()
    short.load_state_dict(unconditional.state_dict())
    visited: list[int] = []
    both = short.sample(seeds=[3, 4], sampler=samplers.ddpm, callback=lambda step, t, x0: visited.append(t))
    assert visited == [5, 4, 3, 2, 1, 0]
    torch.testing.assert_close(short.sample(seeds=[4], sampler=samplers.ddpm), both[1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("preset", "inputs", "guidance_scale"),
    [
        ("tiny-class", torch.tensor([3]), 2.0),
        ("tiny-super-resolution", torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16), 1.0),
    ],
)
def test_a_unet_in_bf16_samples_what_it_does_in_float32(preset: str, inputs: Tensor, guidance_scale: float) -> None:
    model = with_random_outputs(presets.get(preset))
    expected = model.sample(inputs, seeds=[0], num_steps=2, guidance_scale=guidance_scale)
    model.unet.to(torch.bfloat16)
    found = model.sample(inputs, seeds=[0], num_steps=2, guidance_scale=guidance_scale)
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.05 * expected.std()
    model.first_stage.to(torch.bfloat16)
    assert model.encode(torch.zeros(1, 3, 16, 16)).dtype == torch.float32, "samplers compute in what they start from"


def test_the_first_stage_is_not_among_what_is_trained(model: LatentDiffusion) -> None:
    trained = {name.partition(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {"unet", "conditioner"}


def test_sampling_refuses_settings_that_cannot_work(model: LatentDiffusion) -> None:
    with pytest.raises(ValueError, match=r"size must be positive multiples of 2, in latent pixels, got \(0, 16\)"):
        model.sample(captions(1), seeds=[0], size=(0, 16))
    with pytest.raises(ValueError, match="seeds must be integers of 64 bits, got 18446744073709551616"):
        model.sample(captions(1), seeds=[2**64])
    with pytest.raises(ValueError, match="the unconditional input must be one, or one an input"):
        model.sample(captions(1, 2), seeds=[0, 1], unconditional=EMPTY.repeat(3, 1), guidance_scale=2.0)
    with pytest.raises(ValueError, match="guidance rescale must be between"):
        model.guided_denoiser(captions(1), rescale=3.0)


def test_weights_that_are_not_numbers_give_no_picture(model: LatentDiffusion) -> None:
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(broken.unet.conv_in.bias, torch.nan)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sampling gave NaN or infinity"):
        broken.sample(captions(1), seeds=[0], num_steps=2)


def test_a_seed_gives_one_image_in_training_mode_too(model: LatentDiffusion) -> None:
    unet = dataclasses.replace(CONFIG.unet, dropout=0.5)
    other = dataclasses.replace(model.config, unet=unet).build()
    other.load_state_dict(model.state_dict())
    first, second = (other.sample(captions(1), seeds=[0], num_steps=2) for _ in range(2))
    assert torch.equal(first, second)
    assert other.unet.training


def test_a_sampler_refuses_answers_and_noise_of_another_shape(model: LatentDiffusion) -> None:
    x = torch.randn(2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"denoise must answer in x's shape \(2, 4, 8, 8\), got \(1, 4, 8, 8\)"):
        samplers.ddim(lambda x, t: x[:1], x, model.schedule, num_steps=2)
    with pytest.raises(ValueError, match=r"the noise must have x's shape"):
        samplers.ddim(lambda x, t: x, x, model.schedule, num_steps=2, eta=1.0, noise=lambda: x[:1])
    with pytest.raises(ValueError, match=r"latents must be floating point, got torch.int64"):
        samplers.ddim(lambda x, t: x, x.long(), model.schedule, num_steps=2)
    with pytest.raises(ValueError, match=r"noise must have the latent's shape"):
        model.encode(torch.zeros(1, 3, 64, 64), noise=torch.zeros(5, 4, 8, 8))
