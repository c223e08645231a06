"""The metrics by name, and what each is measured from."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from ldm_core.metrics.precision_recall import NEIGHBOURS


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a metric needs besides the generated images.

    Args:
        network: "inception", "clip" or "lpips"; None if the pixels are enough.
        reference: needs a set of real images, or its stored statistics.
        paired: needs, for each generated image, the one that it should equal.
        captions: needs a caption for each generated image.
        features: needs the features of every image, not only their mean and covariance.
        minimum: smallest number of images a set must have for the value to be defined.
    """

    network: str | None = None
    reference: bool = False
    paired: bool = False
    captions: bool = False
    features: bool = False
    minimum: int = 1


METRICS = {
    "fid": Metric(network="inception", reference=True, minimum=2),
    "kid": Metric(network="inception", reference=True, features=True, minimum=2),
    "inception_score": Metric(network="inception"),
    "precision": Metric(network="inception", reference=True, features=True, minimum=NEIGHBOURS + 1),
    "recall": Metric(network="inception", reference=True, features=True, minimum=NEIGHBOURS + 1),
    "cmmd": Metric(network="clip", reference=True, features=True),
    "clip_fd": Metric(network="clip", reference=True, minimum=2),
    "clip_score": Metric(network="clip", captions=True),
    "psnr": Metric(paired=True),
    "ssim": Metric(paired=True),
    "lpips": Metric(network="lpips", paired=True),
    "reconstruction_fid": Metric(network="inception", paired=True, minimum=2),
}


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of metrics, each once, in the order given.

    Raises:
        ValueError: for an unknown name; the message suggests the nearest.
    """
    unique = tuple(dict.fromkeys(names))
    for name in unique:
        if name not in METRICS:
            near = get_close_matches(name, METRICS, n=1) or ["one of " + ", ".join(METRICS)]
            raise ValueError(f"there is no metric {name!r}: did you mean {near[0]}?")
    return unique
