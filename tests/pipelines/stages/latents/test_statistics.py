"""The scale of the latents."""

import json

import numpy as np
import pytest

from pipelines.errors import UserError
from pipelines.stages.latents.statistics import LatentSums, ShardStatistics, scale_factor, total


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


def test_channels_have_their_own_mean_std_and_bounds() -> None:
    random = np.random.default_rng(0)
    scale, shift = np.array([0.1, 1.0, 10.0]), np.array([-3.0, 0.0, 5.0])
    mean = random.normal(size=(50, 3, 8, 8)) * scale[:, None, None] + shift[:, None, None]
    logvar = np.broadcast_to(np.log(scale)[:, None, None], mean.shape)
    moments = np.stack([mean, logvar], axis=1).astype(np.float16)
    channels = total(LatentSums.of(sample) for sample in moments).channels()
    stored = moments[:, 0].astype(float)
    variance = stored.var(axis=(0, 2, 3)) + np.exp(moments[:, 1].astype(float)).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(channels["mean"], stored.mean(axis=(0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(channels["std"], np.sqrt(variance), rtol=1e-9)
    assert channels["min"] == stored.min(axis=(0, 2, 3)).tolist()
    assert channels["max"] == stored.max(axis=(0, 2, 3)).tolist()


def test_nothing_added_to_sums_leaves_them_as_they_are() -> None:
    sums = LatentSums.of(np.ones((2, 3, 4, 4), np.float16))
    assert total([LatentSums(), sums, LatentSums()]) == sums


def test_statistics_survive_json() -> None:
    statistics = ShardStatistics(unencodable={"a": 3})
    assert ShardStatistics.from_json(json.loads(json.dumps(statistics.to_json()))) == statistics
    statistics.add("b", np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float16))
    assert ShardStatistics.from_json(json.loads(json.dumps(statistics.to_json()))) == statistics


def test_latents_of_two_shapes_are_refused() -> None:
    statistics = ShardStatistics()
    statistics.add("a", np.ones((2, 3, 4, 4), np.float16))
    with pytest.raises(UserError, match=r"that of b has \(2, 3, 4, 8\) and those before it \(2, 3, 4, 4\): set pairs"):
        statistics.add("b", np.ones((2, 3, 4, 8), np.float16))


@pytest.mark.parametrize("sums", [LatentSums(), LatentSums.of(np.ones((1, 3, 4, 4), np.float16))])
def test_collapsed_latents_have_no_scale(sums: LatentSums) -> None:
    with pytest.raises(ValueError, match="latents must vary to have a scale"):
        scale_factor(sums)
