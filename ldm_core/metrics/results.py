"""From measurements to results: each metric has a value, or one line that says what it lacks."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ldm_core.metrics.catalogue import METRICS
from ldm_core.metrics.frechet_distance import frechet_distance
from ldm_core.metrics.kernel_distances import SUBSET_SIZE, cmmd, kid
from ldm_core.metrics.measurement import Measurement
from ldm_core.metrics.networks.weights import MetricUnavailableError
from ldm_core.metrics.precision_recall import NEIGHBOURS, PrecisionRecall, precision_recall
from ldm_core.metrics.statistics import ImageStatistics

# The Inception score of a split is at most its number of images, and at most the number of classes. With fewer images
# than classes the first bound is what one sees.
INCEPTION_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class Result:
    """A metric's value and what it depends on.

    Args:
        value: the metric's value.
        std: standard deviation over subsets (kid), splits (inception_score) or images (clip_score, psnr, ssim, lpips);
            None for the other metrics.
        settings: numbers of images, resize mode, sha256 of the network's weights and the metric's own constants.
        warnings: reasons why the value may not be comparable.
    """

    value: float
    std: float | None = None
    settings: dict[str, str | int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results of several metrics.

    Args:
        results: result by the metric's name.
        unavailable: for each metric without a value, one line that says what it lacks.
    """

    results: dict[str, Result]
    unavailable: dict[str, str]


def results(
    measurement: Measurement,
    *,
    statistics: Iterable[ImageStatistics] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Compute the metrics from all that was measured.

    Args:
        measurement: measurement of all images, the workers' parts merged.
        statistics: stored statistics of reference sets, at most one a network; they take precedence over reference
            images that were measured.
        seed: seed of KID's subsets.
        device: device for the metrics that compare every image with every other (kid, cmmd, precision, recall).

    Returns:
        A result or a reason for each of the measurement's names.

    Raises:
        ValueError: if nothing was measured, an image was measured twice or lacks a score that others have, or the
            stored statistics are of another network or resize mode than the images.
    """
    computation = _Computation(measurement, statistics, seed, device)
    found: dict[str, Result] = {}
    unavailable: dict[str, str] = {}
    for name in measurement.names:
        try:
            found[name] = computation.result(name)
        except MetricUnavailableError as reason:
            unavailable[name] = f"{name}: {reason}"
    return Evaluation(results=found, unavailable=unavailable)


class _Computation:
    """The measured sets, each summed up once however many metrics use it."""

    def __init__(
        self, measurement: Measurement, statistics: Iterable[ImageStatistics], seed: int, device: torch.device | str
    ) -> None:
        self.measurement, self.seed, self.device = measurement, seed, device
        self.count = len(measurement.counted.rows())
        self.generated, self.measured = (
            {
                kind: features.statistics(measurement.provenance[kind])
                for kind, features in sets.items()
                if len(features)
            }
            for sets in (measurement.generated, measurement.reference)
        )
        self.stored: dict[str, ImageStatistics] = {}
        for reference in statistics:
            kind = reference.provenance.extractor
            if kind in self.stored:
                raise ValueError(f"there must be one reference set a network, got two of {kind}: leave one out")
            if kind in measurement.provenance:
                measurement.provenance[kind].check_same(reference.provenance, what="stored reference statistics")
            self.stored[kind] = reference

    def result(self, name: str) -> Result:
        """Compute one metric, or raise MetricUnavailableError with what it lacks."""
        if name in self.measurement.scores:
            return self._mean_score(name)
        if name == "inception_score":
            return self._inception_score()
        generated, reference = self._sides(name)
        settings = self._settings(name) | {"reference_images": reference.moments.count}
        warnings = _resolution_warning(generated, reference)
        if name in ("fid", "clip_fd", "reconstruction_fid"):
            value = frechet_distance(generated.moments, reference.moments)
            return Result(value=value, settings=settings, warnings=warnings + _rank_warning(generated, reference))
        if name in ("precision", "recall"):
            value = getattr(self.precision_recall, name)
            warnings += _balance_warning(generated, reference)
            return Result(value=value, settings=settings | {"neighbours": NEIGHBOURS}, warnings=warnings)
        x, y = self._features(generated), self._features(reference)
        if name == "cmmd":
            return Result(value=cmmd(x, y), settings=settings, warnings=warnings)
        return self._kid(x, y, settings, warnings)

    @cached_property
    def precision_recall(self) -> PrecisionRecall:
        """Both at once, as both need all distances within each set and between the sets."""
        generated, reference = self._sides("precision")
        return precision_recall(self._features(generated), self._features(reference))

    def _kid(self, x: Tensor, y: Tensor, settings: dict[str, str | int], warnings: tuple[str, ...]) -> Result:
        distance = kid(x, y, seed=self.seed)
        size = distance.subset_size
        settings |= {"subsets": distance.subsets, "subset_size": size, "seed": self.seed}
        if size < SUBSET_SIZE:
            warnings += (f"subsets of {size} images instead of {SUBSET_SIZE}, all that the smaller set has",)
        return Result(value=distance.mean, std=distance.std, settings=settings, warnings=warnings)

    def _mean_score(self, name: str) -> Result:
        rows = self.measurement.scores[name]
        if not len(rows):
            wanted = "captions=, one caption" if METRICS[name].captions else "reference=, the one true image"
            raise MetricUnavailableError(f"nothing to hold the images against: give {wanted} for each generated image")
        if len(rows) != self.count:
            raise ValueError(f"{name} must be measured for all {self.count} images or none, got {len(rows)}")
        scores = rows.rows().double()
        # The PSNR of equal images is infinite, and infinite values have no standard deviation.
        std = scores.std(correction=0).item() if scores.isfinite().all() else None
        return Result(value=scores.mean().item(), std=std, settings=self._settings(name))

    def _inception_score(self) -> Result:
        score = self.measurement.inception_score.score()
        warnings: tuple[str, ...] = ()
        if score.smallest_split < INCEPTION_CLASSES:
            warnings = (
                f"{score.smallest_split} images a split, which bounds the score: take {INCEPTION_CLASSES * 5} or more",
            )
        settings = self._settings("inception_score") | {"splits": score.splits}
        return Result(value=score.mean, std=score.std, settings=settings, warnings=warnings)

    def _sides(self, name: str) -> tuple[ImageStatistics, ImageStatistics]:
        """Return the generated and the reference set of a metric, or raise MetricUnavailableError."""
        metric, kind = METRICS[name], METRICS[name].network or ""
        reference = self.measured.get(kind)
        if metric.paired:
            if (
                self.measurement.paired_count != self.count
                or reference is None
                or reference.moments.count != self.count
            ):
                raise MetricUnavailableError("no true image for each generated one: give reference= in the same order")
        else:
            reference = self.stored.get(kind, reference)
        if reference is None:
            raise MetricUnavailableError(f"no reference set: give reference= images or stored statistics= of {kind}")
        if metric.features and reference.features is None:
            raise MetricUnavailableError(
                "the stored reference statistics hold no single features: compute them with keep_features=True"
            )
        if (fewest := min(self.count, reference.moments.count)) < metric.minimum:
            raise MetricUnavailableError(f"needs at least {metric.minimum} images a set, got {fewest}: take more")
        return self.generated[kind], reference

    def _features(self, images: ImageStatistics) -> Tensor:
        assert images.features is not None
        return images.features.to(self.device)

    def _settings(self, name: str) -> dict[str, str | int]:
        settings: dict[str, str | int] = {"images": self.count}
        if network := METRICS[name].network:
            provenance = self.measurement.provenance[network]
            settings |= {"resize": provenance.resize, "weights_sha256": provenance.digest}
        return settings


def _resolution_warning(generated: ImageStatistics, reference: ImageStatistics) -> tuple[str, ...]:
    if generated.resolution == reference.resolution:
        return ()
    return (f"generated images are {generated.resolution}, the reference {reference.resolution}",)


def _rank_warning(generated: ImageStatistics, reference: ImageStatistics) -> tuple[str, ...]:
    fewest, width = min(generated.moments.count, reference.moments.count), len(generated.moments.mean)
    if fewest > width:
        return ()
    return (f"{fewest} images for {width} features, the covariance is rank deficient: compare at equal counts only",)


def _balance_warning(generated: ImageStatistics, reference: ImageStatistics) -> tuple[str, ...]:
    if generated.moments.count == reference.moments.count:
        return ()
    return (f"sets of {generated.moments.count} and {reference.moments.count} images: compare at equal counts only",)
