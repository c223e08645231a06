"""The scale of the latents."""

import numpy as np
import pytest

from pipelines.stages.latents.statistics import LatentSums, scale_factor, total


def test_std_is_that_of_samples_drawn_from_the_posteriors() -> None:
    random = np.random.default_rng(0)
    mean = random.normal(0.5, 2.0, (200, 4, 8, 8))
    logvar = random.uniform(-3, 1, mean.shape)
    moments = np.stack([mean, logvar], axis=1).astype(np.float16)
    sums = total(LatentSums.of(sample) for sample in moments)
    drawn = mean + np.exp(0.5 * logvar) * random.normal(size=(20, *mean.shape))
    assert sums.std == pytest.approx(drawn.std(), rel=2e-3)
    assert sums.mean == pytest.approx(drawn.mean(), abs=2e-3)
    assert scale_factor(sums) == 1 / sums.std


def test_latents_without_variance_count_as_they_are() -> None:
    latents = np.random.default_rng(0).normal(size=(10, 1, 3, 4, 4)).astype(np.float16)
    assert total(LatentSums.of(sample) for sample in latents).std == pytest.approx(latents.astype(float).std())


def test_sums_survive_json() -> None:
    sums = LatentSums.of(np.ones((2, 3, 4, 4), np.float16))
    assert LatentSums.from_dict(sums.to_dict() | {"shape": [2, 3, 4, 4]}) == sums


@pytest.mark.parametrize("sums", [LatentSums(), LatentSums.of(np.ones((1, 3, 4, 4), np.float16))])
def test_collapsed_latents_have_no_scale(sums: LatentSums) -> None:
    with pytest.raises(ValueError, match="latents must vary to have a scale"):
        scale_factor(sums)
