"""Guidance: its formulas, one batched call, nothing computed in vain, and that it leads where it should."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_core import samplers
from ldm_core.conditioning import Conditioning
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.guidance import classifier_free, combine, image_guidance
from ldm_core.objective import Prediction, to_prediction
from ldm_core.schedule import NoiseSchedule


class Recorder:
    """A network, linear in its context, that remembers what it was called with."""

    def __init__(self) -> None:
        self.contexts: list[int] = []
        self.prepared = 0

    def prepare_context(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
        self.prepared += 1
        return context

    def __call__(self, z: Tensor, t: Tensor, *, context: Any = None, concat: Tensor | None = None) -> Tensor:
        assert len(t) == len(z)
        answer = 0.1 * z if concat is None else 0.1 * z + concat
        if context is None:
            return answer
        self.contexts.append(len(context) // len(z))
        return answer.repeat(len(context) // len(z), 1, 1, 1) + context.mean(dim=(1, 2)).view(-1, 1, 1, 1)


X = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
T = torch.tensor([5, 5, 5])
CONTEXT = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))
EMPTY = torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(2))
CONDITION, NULL = Conditioning(context=CONTEXT), Conditioning(context=EMPTY)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_guidance_extrapolates_from_the_unconditional_prediction(scale: float) -> None:
    network = Recorder()
    unconditional = network(X, T, context=EMPTY.expand(3, -1, -1))
    conditional = network(X, T, context=CONTEXT)
    guided = classifier_free(network, CONDITION, NULL, scale)(X, T)
    torch.testing.assert_close(guided, unconditional + scale * (conditional - unconditional))


def test_both_halves_take_one_call_and_a_scale_of_one_only_half_of_it() -> None:
    network = Recorder()
    classifier_free(network, CONDITION, NULL, 3.0)(X, T)
    classifier_free(network, CONDITION)(X, T)
    assert network.contexts == [2, 1]


def test_what_is_computed_of_a_context_is_computed_once() -> None:
    network = Recorder()
    denoise = classifier_free(network, CONDITION, NULL, 3.0)
    for _ in range(3):
        denoise(X, T)
    assert network.prepared == 1


def test_channels_to_concatenate_reach_both_halves() -> None:
    concat = torch.randn(3, 4, 2, 2)
    plain = classifier_free(Recorder(), CONDITION, NULL, 3.0)(X, T)
    joined = classifier_free(Recorder(), Conditioning(context=CONTEXT, concat=concat), NULL, 3.0)(X, T)
    torch.testing.assert_close(joined, plain + concat)  # type: ignore[operator]


def test_a_condition_without_a_mask_attends_to_all_places_beside_one_with_a_mask() -> None:
    masks = []

    class Masked(Recorder):
        def prepare_context(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
            masks.append(mask)
            return context

    padding = torch.tensor([True] * 4 + [False] * 3).expand(3, -1)
    for null, condition in (
        (NULL, Conditioning(context=CONTEXT, mask=padding)),
        (Conditioning(context=EMPTY, mask=padding[:1]), CONDITION),
    ):
        classifier_free(Masked(), condition, null, 3.0)(X, T)
    everywhere = torch.ones_like(padding)
    assert torch.equal(masks[0], torch.cat([everywhere, padding]))
    assert torch.equal(masks[1], torch.cat([padding, everywhere]))


def test_one_null_condition_serves_a_whole_batch() -> None:
    alone = classifier_free(Recorder(), CONDITION, NULL, 3.0)(X, T)
    repeated = classifier_free(Recorder(), CONDITION, Conditioning(context=EMPTY.expand(3, -1, -1)), 3.0)(X, T)
    assert torch.equal(alone, repeated)


def test_both_parts_of_a_prediction_are_guided() -> None:
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    t = torch.tensor([999, 400, 0])
    convert = partial(to_prediction, "v", schedule)
    guided = classifier_free(Recorder(), CONDITION, NULL, 5.0, convert=convert)(X, t)
    # The formula is linear: guiding both predictions is the same as converting the guided output.
    without, with_it = (
        convert(Recorder()(X, t, context=EMPTY.expand(3, -1, -1)), X, t),
        convert(Recorder()(X, t, context=CONTEXT), X, t),
    )
    assert isinstance(guided, Prediction)
    expected = Prediction(*(u + 5.0 * (c - u) for u, c in zip(without, with_it, strict=True)))
    torch.testing.assert_close(guided, expected)


@pytest.mark.parametrize(("timestep", "contexts"), [(199, 1), (200, 2), (500, 2), (500.9, 1), (501, 1)])
def test_outside_of_the_interval_the_conditional_model_answers_at_half_the_cost(timestep: int, contexts: int) -> None:
    network = Recorder()
    t = torch.full((3,), timestep)
    answer = classifier_free(network, CONDITION, NULL, 3.0, interval=(200, 500))(X, t)
    assert network.contexts == [contexts]
    scale = 3.0 if contexts == 2 else 1.0
    torch.testing.assert_close(answer, classifier_free(Recorder(), CONDITION, NULL, scale)(X, t))


def test_rescaling_brings_back_the_spread_of_the_conditional_prediction_image_by_image() -> None:
    conditional, unconditional = torch.randn(2, *X.shape)
    guided = combine(unconditional, conditional, 7.5)
    rescaled = combine(unconditional, conditional, 7.5, rescale=1.0)
    mixed = combine(unconditional, conditional, 7.5, rescale=0.7)
    torch.testing.assert_close(rescaled.flatten(1).std(dim=1), conditional.flatten(1).std(dim=1))
    torch.testing.assert_close(mixed, 0.7 * rescaled + 0.3 * guided)
    torch.testing.assert_close(mixed[1:2], combine(unconditional[1:2], conditional[1:2], 7.5, rescale=0.7))


def test_guidance_that_cannot_be_is_refused() -> None:
    shorter = Conditioning(context=EMPTY[:, :5])
    with pytest.raises(ValueError, match=r"as long as these, got contexts \(1, 5, 6\) and \(3, 7, 6\)"):
        classifier_free(Recorder(), CONDITION, shorter, 3.0)
    with pytest.raises(ValueError, match="bound to 3 inputs, got 2 latents"):
        classifier_free(Recorder(), CONDITION, NULL, 3.0)(X[:2], T[:2])
    with pytest.raises(ValueError, match="guidance_scale must be a finite number, got nan"):
        classifier_free(Recorder(), CONDITION, NULL, float("nan"))
    with pytest.raises(ValueError, match=r"guidance_scale=3\.0 needs a null condition with a context, got none"):
        classifier_free(Recorder(), CONDITION, None, 3.0)
    with pytest.raises(ValueError, match=r"only a model with a context can be guided: keep guidance_scale 1, got 3\.0"):
        classifier_free(Recorder(), Conditioning(concat=X), NULL, 3.0)
    with pytest.raises(ValueError, match=r"with t_low <= t_high, got \(500, 200\)"):
        classifier_free(Recorder(), CONDITION, NULL, 3.0, interval=(500, 200))
    with pytest.raises(ValueError, match=r"rescale must be between 0 \(none\) and 1, got 1\.5"):
        classifier_free(Recorder(), CONDITION, NULL, 3.0, rescale=1.5)


SCHEDULE = NoiseSchedule(ScheduleConfig())


def of_unit_data(x: Tensor, t: Tensor) -> Tensor:
    """Return the perfect noise prediction for a normal clean latent: linear in x."""
    _, sigma = SCHEDULE.levels(t, like=x)
    return sigma * x


def decode(z: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(z, scale_factor=2)


def distance_to(low_resolution: Tensor):
    def loss(images: Tensor) -> Tensor:
        return 0.5 * (torch.nn.functional.avg_pool2d(images, 4) - low_resolution).square().flatten(1).sum(dim=1)

    return loss


def test_image_guidance_adds_the_gradient_through_decoder_and_network() -> None:
    t = torch.tensor([900, 300, 10])
    target = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(3))

    def loss(images: Tensor) -> Tensor:
        return 0.5 * (images - target).square().flatten(1).sum(dim=1)

    with torch.no_grad():
        guided = image_guidance(of_unit_data, SCHEDULE, lambda z: 3 * z, loss, 2.0)(X, t)
    # x0 = signal x for this data, so the image is 3 signal x, and its derivative 3 signal.
    signal, sigma = SCHEDULE.levels(t, like=X)
    gradient = 3 * signal * (3 * signal * X - target)
    torch.testing.assert_close(guided, sigma * X + 2.0 * sigma * gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.dpm_solver_pp_2m, samplers.unipc])
def test_image_guidance_pulls_samples_towards_a_low_resolution_picture(sampler) -> None:
    x = samplers.initial_noise([0, 1], (3, 8, 8))
    low_resolution = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    loss = distance_to(low_resolution)

    def end(scale: float) -> float:
        denoise = image_guidance(of_unit_data, SCHEDULE, decode, loss, scale)
        return loss(decode(sampler(denoise, x, SCHEDULE, num_steps=50))).mean().item()

    assert end(4.0) < 0.5 * end(1.0) < 0.5 * end(0.0)


def test_an_image_guided_sample_is_the_same_in_a_batch_and_alone() -> None:
    low_resolution = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    denoise = image_guidance(of_unit_data, SCHEDULE, decode, distance_to(low_resolution), 2.0)

    def sample(seeds: list[int]) -> Tensor:
        return samplers.ddim(denoise, samplers.initial_noise(seeds, (3, 8, 8)), SCHEDULE, num_steps=5)

    torch.testing.assert_close(sample([3, 4])[1:], sample([4]))


def test_image_guidance_of_a_prediction_moves_both_parts_alike_and_nothing_without_signal() -> None:
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    t = torch.tensor([999, 600, 10])

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return to_prediction("v", schedule, 0.1 * x, x, t)

    guided = image_guidance(predict, schedule, lambda z: z, lambda z: z.square().flatten(1).sum(dim=1), 1.0)
    plain, moved = predict(X, t), guided(X, t)
    assert isinstance(moved, Prediction)
    torch.testing.assert_close(moved.eps[0], plain.eps[0])
    torch.testing.assert_close(moved.x0[0], plain.x0[0])
    signal, sigma = schedule.levels(t, like=X)
    torch.testing.assert_close(signal * moved.x0 + sigma * moved.eps, X)
    assert (moved.x0[1:].abs() < plain.x0[1:].abs()).all()


def test_losses_that_cannot_guide_are_refused() -> None:
    def guide(loss) -> None:
        image_guidance(of_unit_data, SCHEDULE, decode, loss, 1.0)(X, T)

    with pytest.raises(ValueError, match=r"one number an image, \(3,\), got \(\): sum over channels and pixels only"):
        guide(lambda images: images.square().sum())
    with pytest.raises(ValueError, match=r"must have a gradient, got one without"):
        guide(lambda images: images.detach().square().flatten(1).sum(dim=1))
    with pytest.raises(ValueError, match="scale of image guidance must be a finite number, got inf"):
        image_guidance(of_unit_data, SCHEDULE, decode, torch.sum, float("inf"))
