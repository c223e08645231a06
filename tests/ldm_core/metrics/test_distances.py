"""The mathematics of the metrics against other libraries, closed forms and definitions written out."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from ldm_core.metrics import kernel_distances
from ldm_core.metrics import precision_recall as precision_recall_module
from ldm_core.metrics.frechet_distance import Moments, MomentSums, frechet_distance
from ldm_core.metrics.inception_score import InceptionScoreSums
from ldm_core.metrics.kernel_distances import cmmd, kid
from ldm_core.metrics.precision_recall import precision_recall


def features(count: int, width: int, *, seed: int, offset: float = 0.0) -> Tensor:
    """Draw correlated features with a mean, float32 as a network returns them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, width, generator=generator) @ mixing + offset


def moments(x: Tensor) -> Moments:
    sums = MomentSums()
    sums.update(x)
    return sums.moments()


def frechet_by_scipy(x: Tensor, y: Tensor) -> float:
    a, b = np.cov(x.double().numpy(), rowvar=False), np.cov(y.double().numpy(), rowvar=False)
    offset = x.double().mean(0) - y.double().mean(0)
    return float(offset @ offset + np.trace(a + b - 2 * sqrtm(a @ b).real))


def test_frechet_distance_is_that_of_scipys_matrix_square_root() -> None:
    x, y = features(200, 24, seed=0), features(150, 24, seed=1, offset=0.3)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(frechet_by_scipy(x, y), rel=1e-9)


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    a, b = torch.tensor([4.0, 9.0, 0.0]).double(), torch.tensor([1.0, 0.25, 2.0]).double()
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    distance = frechet_distance(Moments(9, mean, a.diag()), Moments(9, torch.zeros(3).double(), b.diag()))
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert distance == pytest.approx(expected.item(), rel=1e-12)


def test_frechet_distance_is_exact_with_fewer_images_than_features() -> None:
    # With centred features as rows, Tr (C_x C_y)^(1/2) is the nuclear norm of their cross product.
    x, y = features(5, 40, seed=0).double(), features(7, 40, seed=1).double()
    centred_x, centred_y = (x - x.mean(0)) / math.sqrt(4), (y - y.mean(0)) / math.sqrt(6)
    nuclear = torch.linalg.matrix_norm(centred_x @ centred_y.T, "nuc")
    offset = (x.mean(0) - y.mean(0)).square().sum()
    expected = offset + centred_x.square().sum() + centred_y.square().sum() - 2 * nuclear
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected.item(), rel=1e-10)
    assert frechet_distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-9)


def test_moments_of_a_stream_are_those_of_the_whole_in_any_grouping() -> None:
    x = features(90, 6, seed=0, offset=50.0)
    parts = []
    for part in x.split([40, 1, 30, 19]):
        parts.append(MomentSums())
        for batch in part.split(8):
            parts[-1].update(batch)
    expected = np.cov(x.double().numpy(), rowvar=False)
    for order in permutations(range(4)):
        whole = MomentSums()
        for number in order:
            whole.merge(parts[number])
        found = whole.moments()
        assert found.count == 90
        np.testing.assert_allclose(found.mean.numpy(), x.double().mean(0).numpy(), rtol=1e-14)
        np.testing.assert_allclose(found.covariance.numpy(), expected, rtol=1e-10, atol=1e-10)


def test_moments_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="of one width, got 6 and 5: use one extractor"):
        frechet_distance(moments(features(9, 6, seed=0)), moments(features(9, 5, seed=0)))
    with pytest.raises(ValueError, match="at least two images, got 1 and 9"):
        frechet_distance(moments(features(1, 6, seed=0)), moments(features(9, 6, seed=0)))
    with pytest.raises(ValueError, match="at least one image, got none"):
        MomentSums().moments()


def test_kid_of_whole_sets_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    x, y = features(60, 16, seed=0), features(60, 16, seed=1, offset=0.4)
    distance = kid(x, y)
    assert distance.mean == pytest.approx(poly_mmd(x.double(), y.double()).item(), rel=1e-9)
    assert (distance.subsets, distance.subset_size, distance.std) == (1, 60, 0.0)


def test_kid_is_the_mean_over_subsets_that_the_seed_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_distances, "SUBSET_SIZE", 20)
    x, y = features(60, 8, seed=0), features(50, 8, seed=1)
    distance = kid(x, y, seed=3)
    assert (distance.subsets, distance.subset_size) == (100, 20)
    assert distance == kid(x, y, seed=3)
    assert distance.mean != kid(x, y, seed=4).mean
    # Each subset gives an unbiased estimate of the distance of the whole sets.
    whole = kid(x[:50], y).mean
    assert abs(distance.mean - whole) < 4 * distance.std / math.sqrt(100) + abs(whole)
    assert distance.std > 0


def test_cmmd_is_its_definition_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_distances, "BLOCK", 3)
    x, y = features(7, 5, seed=0).double(), features(4, 5, seed=1).double()

    def mean_kernel(first: Tensor, second: Tensor) -> float:
        pairs = [(a / a.norm() - b / b.norm()).square().sum().item() for a in first for b in second]
        return sum(math.exp(-pair / 200) for pair in pairs) / len(pairs)

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-10)


def test_precision_and_recall_are_those_of_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    monkeypatch.setattr(precision_recall_module, "BLOCK", 7)
    generated, reference = features(50, 3, seed=0) * 0.7, features(40, 3, seed=1, offset=0.8)
    found = precision_recall(generated, reference)
    assert found == pytest.approx(calculate_precision_recall_full(generated.double(), reference.double(), 3))
    assert 0 < found.recall < found.precision < 1


def test_a_collapsed_generator_is_precise_and_recalls_little() -> None:
    reference = torch.arange(12.0)[:, None]
    # All lie near the first image; balls to their third neighbour are too small to reach another one.
    generated = torch.tensor([[0.0], [0.1], [0.2], [0.3]])
    assert precision_recall(generated, reference) == (1.0, 1 / 12)


def inception_score(logits: Tensor, index: Tensor | None = None) -> InceptionScoreSums:
    sums = InceptionScoreSums()
    sums.update(torch.arange(len(logits)) if index is None else index, logits)
    return sums


def test_inception_score_is_that_of_torch_fidelity_on_the_same_splits() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = features(70, 9, seed=0)
    score = inception_score(logits).score()
    by_split = torch.cat([logits[split::10] for split in range(10)])
    expected = isc_features_to_metric(by_split, splits=10, shuffle=False)
    assert score.mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert score.std == pytest.approx(expected["inception_score_std"], rel=1e-9)
    assert (score.splits, score.smallest_split) == (10, 7)


def test_inception_score_of_certain_and_varied_images_is_the_number_of_classes() -> None:
    # Image i shows class i // 10, so each of the ten splits sees every class once.
    logits = torch.eye(6).repeat_interleave(10, dim=0) * 1000
    score = inception_score(logits).score()
    assert score.mean == pytest.approx(6.0, rel=1e-12)
    assert inception_score(torch.zeros(20, 6)).score().mean == pytest.approx(1.0, rel=1e-12)


def test_inception_score_of_merged_parts_is_that_of_the_whole() -> None:
    logits = features(33, 9, seed=0)
    parts = [inception_score(logits[start : start + 11], torch.arange(start, start + 11)) for start in (22, 0, 11)]
    whole = InceptionScoreSums()
    for part in parts:
        whole.merge(part)
    assert whole.score().mean == pytest.approx(inception_score(logits).score().mean, rel=1e-12)
    with pytest.raises(ValueError, match="at least one image, got none"):
        InceptionScoreSums().score()


def test_sets_that_are_too_small_or_of_two_widths_are_refused() -> None:
    x = features(9, 4, seed=0)
    with pytest.raises(ValueError, match=r"must be \(N, D\) and \(M, D\), got \(9, 4\) and \(9, 3\)"):
        cmmd(x, x[:, :3])
    with pytest.raises(ValueError, match="at least 2 images a set, got 1 and 9"):
        kid(x[:1], x)
    with pytest.raises(ValueError, match="more than 3 images a set, got 9 and 3"):
        precision_recall(x, x[:3])
    with pytest.raises(ValueError, match=r"must be \(N, D\) and \(M, D\), got \(9, 4\) and \(9, 3\)"):
        precision_recall(x, x[:, :3])
