"""A set of images summed up in the features of one network, so that reference sets are computed once and stored."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm_core.metrics.frechet_distance import Moments

METADATA_KEY = "ldm_image_statistics"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Origin of features; features of different provenance are never compared.

    Args:
        extractor: "inception", "clip" or "lpips".
        digest: sha256 in hex of the extractor's weights.
        resize: how images were resized for the network: "clean" or "tensorflow" for Inception, "clip" for CLIP, "none".
    """

    extractor: str
    digest: str
    resize: str

    def check_same(self, other: "Provenance", *, what: str) -> None:
        """Raise ValueError unless both are the same; `what` names the other features in the message."""
        for field, mine in asdict(self).items():
            if mine != (theirs := getattr(other, field)):
                raise ValueError(
                    f"{what} must come from the same {self.extractor} network as these images' features, got {field} "
                    f"{theirs} instead of {mine}: compute them again with this run's weights and resize mode"
                )


@dataclass(frozen=True, kw_only=True)
class ImageStatistics:
    """A set of images as the metrics see it.

    Args:
        provenance: provenance of the features.
        resolution: height and width of the images before resizing, e.g. "256x256", or "various".
        moments: count, mean (D,) and covariance (D, D), float64.
        features: (N, D) float32 in the order of the images; None if only the moments were kept.
    """

    provenance: Provenance
    resolution: str
    moments: Moments
    features: Tensor | None = None

    def save(self, path: str | Path) -> None:
        """Write to a .safetensors file: mean, covariance, features, and the rest as JSON in its header."""
        tensors = {"mean": self.moments.mean, "covariance": self.moments.covariance}
        if self.features is not None:
            tensors["features"] = self.features
        header = {
            "format_version": FORMAT_VERSION,
            "count": self.moments.count,
            "resolution": self.resolution,
            **asdict(self.provenance),
        }
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path, metadata={METADATA_KEY: json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> "ImageStatistics":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, has another format, or its parts do not fit together.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there must be image statistics at {path}: make them with `summarize`")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[METADATA_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            version = header["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(f"{path} must be of format version {FORMAT_VERSION}, got {version}: compute it again")
            statistics = cls(
                provenance=Provenance(**{field: header[field] for field in ("extractor", "digest", "resize")}),
                resolution=header["resolution"],
                moments=Moments(header["count"], tensors["mean"], tensors["covariance"]),
                features=tensors.get("features"),
            )
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} must hold image statistics, but does not read: {error}: make it again") from error
        statistics._check_shapes(path)
        return statistics

    def _check_shapes(self, path: str | Path) -> None:
        """Raise ValueError unless what was read from `path` is finite and of one width and count."""
        count, mean, covariance = self.moments.count, self.moments.mean, self.moments.covariance
        width = len(mean)
        whole = covariance.shape == (width, width) and mean.dtype == covariance.dtype == torch.float64
        if self.features is not None:
            whole = whole and self.features.shape == (count, width) and bool(self.features.isfinite().all())
        if not whole or not math.isfinite((mean.sum() + covariance.sum()).item()):
            raise ValueError(f"{path} must hold finite moments and features of one width and count: compute it again")
