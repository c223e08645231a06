"""How good images are: FID, KID, Inception score, precision and recall, CMMD, CLIP-FD, CLIP score, PSNR, SSIM, LPIPS.

Features and statistics are separate. Networks turn images into features; metrics are functions of features. Read:

    images           pictures as a PNG holds them, resized as each network's published code does
    weights          weights files read without running code, and their digests
    inception, clip, perceptual    the networks, their weights given by path
    extractors       which of them there are, and what a metric lacks without one
    moments          mean and covariance over a stream of features; the Fréchet distance (FID, CLIP-FD)
    kernels          maximum mean discrepancies (KID, CMMD)
    neighbours       precision and recall
    inception_score  the same over a stream of logits
    pixels           PSNR and SSIM
    statistics       a set of images summed up, stored once for reference sets
    feature_set      features gathered over batches and workers
    catalogue        what each metric is measured from
    measurement      what one worker has seen; parts merge
    results          from there to values
    evaluation       the front: names and images in, values and reasons out

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
