"""Load the networks that metrics need from paths, or say what a metric lacks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm_core.metrics.catalogue import METRICS, check_names
from ldm_core.metrics.networks import clip, inception, lpips
from ldm_core.metrics.networks.weights import MetricUnavailableError
from ldm_core.metrics.preprocessing import Resize


class FeatureExtractor(Protocol):
    """Provenance of a network's features: the sha256 of its weights in hex, and how it resizes images."""

    @property
    def digest(self) -> str: ...

    @property
    def resize(self) -> str: ...


class InceptionNetwork(FeatureExtractor, Protocol):
    """Maps images (B, 3, H, W) in [-1, 1] to features (B, D) and logits (B, K); `Inception` is one."""

    def __call__(self, images: Tensor) -> inception.InceptionOutput: ...


class ClipNetwork(FeatureExtractor, Protocol):
    """Maps images (B, 3, H, W) in [-1, 1] or captions to embeddings (B, D), not normalised; `Clip` is one."""

    def __call__(self, images: Tensor) -> Tensor: ...

    def text(self, captions: Sequence[str]) -> Tensor: ...


class PairNetwork(Protocol):
    """Maps pairs of images (B, 3, H, W) in [-1, 1] to distances (B,); `Lpips` is one."""

    @property
    def digest(self) -> str: ...

    @property
    def network(self) -> str: ...

    def __call__(self, x: Tensor, y: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks in memory; None for one that is not needed or unavailable. Each worker has its own."""

    inception: InceptionNetwork | None = None
    clip: ClipNetwork | None = None
    lpips: PairNetwork | None = None


@dataclass(frozen=True, kw_only=True)
class Extractors:
    """Paths of the networks' weights. Nothing is ever downloaded.

    Args:
        inception: file of the FID Inception-v3, see `inception.SOURCE`.
        clip: folder of a CLIP model, of transformers or open_clip; CMMD's is ViT-L/14 at 336 px, see `clip.SOURCE`.
        lpips: file of torchvision's VGG-16 (the paper's) or AlexNet, see `lpips.SOURCE`.
        resize: how images are resized for the Inception network, "clean" or "tensorflow"; see `resize_for_inception`.
        device: device to run the networks on.
    """

    inception: str | Path | None = None
    clip: str | Path | None = None
    lpips: str | Path | None = None
    resize: Resize = "clean"
    device: torch.device | str = "cpu"

    def load(self, names: Iterable[str]) -> tuple[Networks, dict[str, str]]:
        """Load the networks that metrics need.

        Args:
            names: names of metrics, see `METRICS`.

        Returns:
            The networks, and for each metric that lacks its network or tokenizer one line that says what it lacks.

        Raises:
            ValueError: for an unknown name, or a file that does not hold what it should.
        """
        names = check_names(names)
        loaders: dict[str, Callable[[Path], Any]] = {
            "inception": lambda path: inception.Inception(path, resize=self.resize, device=self.device),
            "clip": lambda path: clip.load_clip(path, device=self.device),
            "lpips": lambda path: lpips.Lpips(path).to(self.device),
        }
        loaded: dict[str, Any] = {}
        lacking: dict[str, str] = {}
        for kind in dict.fromkeys(METRICS[name].network for name in names):
            if kind is None:
                continue
            try:
                loaded[kind] = loaders[kind](self._path(kind))
            except MetricUnavailableError as error:
                lacking[kind] = str(error)
        unavailable = {
            name: f"{name}: {lacking[kind]}" for name in names if (kind := METRICS[name].network) in lacking and kind
        }
        if "clip" in loaded and "clip_score" in names and loaded["clip"].encode_text is None:
            unavailable["clip_score"] = (
                f"clip_score: no tokenizer in {self.clip}: put tokenizer.json, or vocab.json and merges.txt, there"
            )
        return Networks(**loaded), unavailable

    def _path(self, kind: str) -> Path:
        """Return the path given for a network, or raise MetricUnavailableError with where to get its weights."""
        module = {"inception": inception, "clip": clip, "lpips": lpips}[kind]
        path = getattr(self, kind)
        advice = f"get {module.SOURCE} and give its path as Extractors({kind}=PATH)"
        if path is None:
            raise MetricUnavailableError(f"no weights of {module.CONTENT}: {advice}")
        if not Path(path).exists():
            raise MetricUnavailableError(f"no {path} with {module.CONTENT}: {advice}")
        return Path(path)
