"""Guidance: its formulas, one batched call, nothing computed in vain, and that it leads where it should."""

import pytest
import torch
from torch import Tensor

from ldm_core import samplers
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.guidance import classifier_free, image_guidance
from ldm_core.objective import Prediction, to_prediction
from ldm_core.schedule import NoiseSchedule


class Recorder:
    """A conditional denoiser, linear in its context, that remembers what it was called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.concat: list[Tensor | None] = []

    def __call__(self, x: Tensor, t: Tensor, *, context: Tensor | None = None, concat: Tensor | None = None) -> Tensor:
        assert len(t) == len(x)
        self.batches.append(len(x))
        self.concat.append(concat)
        answer = 0.1 * x
        if context is not None:
            answer = answer + context.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return answer if concat is None else answer + concat


X = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
T = torch.tensor([5, 5, 5])
CONTEXT = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))
EMPTY = torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_guidance_extrapolates_from_the_unconditional_prediction(scale: float) -> None:
    denoise = Recorder()
    unconditional = denoise(X, T, context=EMPTY.expand(3, -1, -1))
    conditional = denoise(X, T, context=CONTEXT)
    guided = classifier_free(denoise, CONTEXT, EMPTY, scale)(X, T)
    torch.testing.assert_close(guided, unconditional + scale * (conditional - unconditional))


def test_both_halves_take_one_call_and_a_scale_of_one_only_half_of_it() -> None:
    denoise = Recorder()
    classifier_free(denoise, CONTEXT, EMPTY, 3.0)(X, T)
    classifier_free(denoise, CONTEXT, EMPTY, 1.0)(X, T)
    assert denoise.batches == [6, 3]


def test_channels_to_concatenate_reach_both_halves() -> None:
    denoise = Recorder()
    concat = torch.randn(3, 1, 2, 2)
    classifier_free(denoise, CONTEXT, EMPTY, 3.0, concat)(X, T)
    assert denoise.concat[0] is not None
    assert torch.equal(denoise.concat[0], torch.cat([concat, concat]))


def test_one_context_serves_a_whole_batch() -> None:
    alone = classifier_free(Recorder(), CONTEXT[:1], EMPTY, 3.0)(X, T)
    repeated = classifier_free(Recorder(), CONTEXT[:1].expand(3, -1, -1), EMPTY.expand(3, -1, -1), 3.0)(X, T)
    assert torch.equal(alone, repeated)


def test_contexts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"alike in length and width, got \(3, 7, 6\) and \(1, 5, 6\)"):
        classifier_free(Recorder(), CONTEXT, EMPTY[:, :5], 3.0)
    with pytest.raises(ValueError, match="one for each of the 3 samples, got 2"):
        classifier_free(Recorder(), CONTEXT[:2], EMPTY, 3.0)(X, T)
    with pytest.raises(ValueError, match="guidance_scale must be a finite number, got nan"):
        classifier_free(Recorder(), CONTEXT, EMPTY, float("nan"))


def test_both_parts_of_a_prediction_are_guided() -> None:
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    t = torch.tensor([999, 400, 0])

    def denoise(x: Tensor, t: Tensor, *, context: Tensor | None = None, concat: Tensor | None = None) -> Prediction:
        return to_prediction("v", schedule, Recorder()(x, t, context=context), x, t)

    guided = classifier_free(denoise, CONTEXT, EMPTY, 5.0)(X, t)
    # The formula is linear: guiding the network's own output and converting it is the same.
    expected = to_prediction("v", schedule, classifier_free(Recorder(), CONTEXT, EMPTY, 5.0)(X, t), X, t)
    assert isinstance(guided, Prediction)
    torch.testing.assert_close(guided, expected)


@pytest.mark.parametrize(("timestep", "evaluations"), [(199, 3), (200, 6), (500, 6), (501, 3)])
def test_outside_of_the_interval_the_conditional_model_answers_at_half_the_cost(
    timestep: int, evaluations: int
) -> None:
    denoise = Recorder()
    t = torch.full((3,), timestep)
    answer = classifier_free(denoise, CONTEXT, EMPTY, 3.0, interval=(200, 500))(X, t)
    assert denoise.batches == [evaluations]
    scale = 3.0 if evaluations == 6 else 1.0
    torch.testing.assert_close(answer, classifier_free(Recorder(), CONTEXT, EMPTY, scale)(X, t))


def test_rescaling_brings_back_the_spread_of_the_conditional_prediction_image_by_image() -> None:
    def denoise(x: Tensor, t: Tensor, *, context: Tensor | None = None, concat: Tensor | None = None) -> Tensor:
        assert context is not None
        return x * (1 + context[:, :1, :1, None])

    conditional = denoise(X, T, context=CONTEXT)
    guided = classifier_free(denoise, CONTEXT, EMPTY, 7.5)(X, T)
    rescaled = classifier_free(denoise, CONTEXT, EMPTY, 7.5, rescale=1.0)(X, T)
    mixed = classifier_free(denoise, CONTEXT, EMPTY, 7.5, rescale=0.7)(X, T)
    torch.testing.assert_close(rescaled.flatten(1).std(dim=1), conditional.flatten(1).std(dim=1))  # type: ignore[union-attr]
    torch.testing.assert_close(mixed, 0.7 * rescaled + 0.3 * guided)  # type: ignore[operator]
    alone = classifier_free(denoise, CONTEXT[1:2], EMPTY, 7.5, rescale=0.7)(X[1:2], T[1:2])
    torch.testing.assert_close(mixed[1:2], alone)


def test_channels_alone_may_be_guided() -> None:
    denoise = Recorder()
    concat, without = torch.ones(3, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    guided = classifier_free(denoise, None, None, 3.0, concat, unconditional_concat=without)(X, T)
    assert denoise.batches == [6]
    torch.testing.assert_close(guided, 0.1 * X + 3.0)
    plain = classifier_free(denoise, None, None, 1.0, concat)(X, T)
    assert denoise.batches == [6, 3]
    torch.testing.assert_close(plain, 0.1 * X + 1.0)


def test_guidance_that_cannot_be_is_refused() -> None:
    concat = torch.ones(3, 4, 2, 2)
    with pytest.raises(ValueError, match="needs context and unconditional_context, or neither, got no unconditional"):
        classifier_free(Recorder(), CONTEXT, None, 3.0)
    with pytest.raises(ValueError, match="without a context needs concat and unconditional_concat"):
        classifier_free(Recorder(), None, None, 3.0, concat)
    with pytest.raises(ValueError, match=r"alike concat in channels and size, got \(1, 2, 2, 2\) for \(3, 4, 2, 2\)"):
        classifier_free(Recorder(), None, None, 3.0, concat, unconditional_concat=torch.ones(1, 2, 2, 2))
    with pytest.raises(ValueError, match=r"with t_low <= t_high, got \(500, 200\)"):
        classifier_free(Recorder(), CONTEXT, EMPTY, 3.0, interval=(500, 200))
    with pytest.raises(ValueError, match=r"rescale must be between 0 \(none\) and 1, got 1\.5"):
        classifier_free(Recorder(), CONTEXT, EMPTY, 3.0, rescale=1.5)
    with pytest.raises(ValueError, match="needs the network's own output, got a Prediction"):
        classifier_free(lambda x, t, **_: Prediction(x, x), CONTEXT, EMPTY, 3.0, rescale=0.5)(X, T)


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
