"""How good images are: FID, KID, Inception score, precision and recall, CMMD, CLIP-FD, CLIP score, PSNR, SSIM, LPIPS.

Networks turn images into features, and most metrics are functions of the features of two sets of images.

The metrics, as functions on tensors:

    frechet_distance   FID, CLIP-FD, reconstruction FID
    kernel_distances   KID, CMMD
    precision_recall   improved precision and recall
    inception_score    Inception score
    pixels             PSNR, SSIM
    networks/          lpips: LPIPS; inception, clip: the features of the others, weights given by path

From images to values, by many workers if need be:

    evaluation         evaluate: names of metrics and images in, values and reasons out; the place to start
    catalogue          what each metric is measured from (CLIP score: networks/clip, measurement)
    preprocessing      images as a PNG holds them, resized as each network's published code does
    measurement        what one worker has seen; parts merge
    feature_set        features gathered over batches and workers
    statistics         a set of images summed up; reference sets are stored so
    results            from measurements to values

    >>> from ldm_core.metrics import Extractors, evaluate
    >>> extractors = Extractors(inception="weights-inception-2015-12-05-6726825d.pth")
    >>> evaluate(["fid", "kid", "psnr"], generated=batches, reference=originals, extractors=extractors)
"""

from ldm_core.metrics.catalogue import METRICS
from ldm_core.metrics.evaluation import evaluate, summarize
from ldm_core.metrics.measurement import Measurement
from ldm_core.metrics.networks.extractors import Extractors, Networks
from ldm_core.metrics.networks.weights import MetricUnavailableError
from ldm_core.metrics.pixels import psnr, ssim
from ldm_core.metrics.results import Evaluation, Result, results
from ldm_core.metrics.statistics import ImageStatistics

__all__ = [
    "METRICS",
    "Evaluation",
    "Extractors",
    "ImageStatistics",
    "Measurement",
    "MetricUnavailableError",
    "Networks",
    "Result",
    "evaluate",
    "psnr",
    "results",
    "ssim",
    "summarize",
]
