"""Metrics by name over generated images: each gives a value, or the reason why there is none. The place to start."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Literal

from torch import Tensor

from ldm_core.metrics.catalogue import METRICS, check_names
from ldm_core.metrics.measurement import Measurement, provenance_of
from ldm_core.metrics.networks.extractors import Extractors
from ldm_core.metrics.networks.weights import MetricUnavailableError
from ldm_core.metrics.results import Evaluation, results
from ldm_core.metrics.statistics import ImageStatistics


def evaluate(
    names: Iterable[str],
    *,
    generated: Tensor | Iterable[Tensor],
    reference: Tensor | Iterable[Tensor] | None = None,
    captions: Sequence[str] | None = None,
    statistics: Sequence[ImageStatistics] = (),
    extractors: Extractors | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure generated images.

    Args:
        names: names of metrics, see `METRICS`.
        generated: one batch (B, 3, H, W) in [-1, 1], or several; read once, one batch in memory at a time.
        reference: one or several batches of real images; for metrics of pairs (psnr, ssim, lpips, reconstruction_fid)
            in the order and batches of `generated`.
        captions: one caption for each generated image, for the CLIP score.
        statistics: statistics of reference sets, stored or from `summarize`, at most one a network; used instead of
            the reference images by the metrics that compare distributions.
        extractors: paths of the networks' weights; None for metrics that need no network.
        seed: seed of KID's subsets.

    Returns:
        A result or a reason for each name; a metric that lacks its weights does not stop the others.

    Raises:
        ValueError: for an unknown name; if images, pairs and captions do not fit together, a weights file does not
            hold what it should, or the stored statistics are of another network or resize mode than these images.
    """
    names, extractors = check_names(names), extractors or Extractors()
    generated, reference = _as_batches(generated), None if reference is None else _as_batches(reference)
    networks, unavailable = extractors.load(names)
    available = [name for name in names if name not in unavailable]
    measurement = Measurement(available, stored={stored.provenance.extractor for stored in statistics})
    for stored in statistics:
        # Checked now, since `generated` may be a generator that takes hours to sample.
        network = getattr(networks, stored.provenance.extractor, None)
        if network is not None:
            provenance_of(stored.provenance.extractor, network).check_same(
                stored.provenance, what="stored reference statistics"
            )
    pairs = any(METRICS[name].paired for name in available)
    done = 0
    for images, truth in _batches(generated, reference if pairs else None):
        chosen = None if captions is None else captions[done : done + len(images)]
        measurement.add(networks, images, start=done, reference=truth, captions=chosen)
        done += len(images)
    if captions is not None and len(captions) != done:
        raise ValueError(f"each image must have its caption, got {len(captions)} captions for {done} images")
    if reference is not None and not pairs and measurement.reference:
        seen = 0
        for images in reference:
            measurement.add_reference(networks, images, start=seen)
            seen += len(images)
    found = results(measurement, statistics=statistics, seed=seed, device=extractors.device)
    reasons = unavailable | found.unavailable
    return Evaluation(results=found.results, unavailable={name: reasons[name] for name in names if name in reasons})


def summarize(
    images: Tensor | Iterable[Tensor],
    *,
    network: Literal["inception", "clip"],
    extractors: Extractors,
    keep_features: bool = True,
) -> ImageStatistics:
    """Sum up a reference set, to be stored with `ImageStatistics.save` and given to `evaluate`.

    Args:
        images: one batch (B, 3, H, W) in [-1, 1], or several.
        network: network whose features sum up the images.
        extractors: paths of the networks' weights.
        keep_features: keep each image's features, which kid, precision, recall and cmmd need: 8 KB an image for
            Inception, 3 KB for CLIP ViT-L. The Fréchet distances (fid, clip_fd) do without.

    Raises:
        MetricUnavailableError: if the network's weights are missing.
        ValueError: if there are no images, or they have another shape or range.
    """
    # A measurement keeps what its metric needs, so the metric stands for what is to be kept.
    names = {"inception": ("fid", "kid"), "clip": ("clip_fd", "cmmd")}[network]
    name = names[1] if keep_features else names[0]
    networks, unavailable = extractors.load([name])
    if unavailable:
        raise MetricUnavailableError(unavailable[name])
    measurement = Measurement([name])
    seen = 0
    for batch in _as_batches(images):
        measurement.add_reference(networks, batch, start=seen)
        seen += len(batch)
    return measurement.reference_statistics(network)


def _as_batches(images: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    return [images] if isinstance(images, Tensor) else images


def _batches(generated: Iterable[Tensor], reference: Iterable[Tensor] | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield batches of generated images, each with the batch of its references, or None without a reference."""
    if reference is None:
        yield from ((images, None) for images in generated)
        return
    for number, (images, truth) in enumerate(zip_longest(generated, reference)):
        if images is None or truth is None:
            side = "generated" if truth is None else "reference"
            raise ValueError(
                f"metrics of pairs need a reference image for each generated one, got {side} images alone from batch "
                f"{number} on: give as many of both"
            )
        yield images, truth
