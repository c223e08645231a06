"""The Inception-v3 network of FID, KID and the Inception score: torch-fidelity's port of the TensorFlow graph.

torch-fidelity's own metrics are not used: they read whole data sets in one process; ours merge what many workers saw.

Shapes: images: (B, 3, H, W) in [-1, 1]; features: (B, 2048); logits: (B, 1008).
"""

import io
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm_core.metrics.networks.weights import MetricUnavailableError, read_weights
from ldm_core.metrics.preprocessing import Resize, quantize, resize_for_inception

INPUT_SIZE = 299
CONTENT = "the FID Inception-v3 (weights-inception-2015-12-05-6726825d.pth)"
SOURCE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


class InceptionOutput(NamedTuple):
    """features: (B, 2048) float32 after the last pooling; logits: (B, 1008) float32 without the bias."""

    features: Tensor
    logits: Tensor


class Inception:
    """Images to the features of FID and the logits of the Inception score.

    The logits have no bias, as in the graph that the Inception score is defined by (Salimans et al. 2016).

    Args:
        weights: file with the state dict in the layout of pytorch-fid and torch-fidelity (.pth or .safetensors).
        resize: how images are resized to 299x299 pixels, see `resize_for_inception`.
        device: device to run on.

    Raises:
        MetricUnavailableError: if the file or the library torch-fidelity is missing.
        ValueError: if the file does not hold this network, or `resize` is unknown.
    """

    def __init__(self, weights: Path, *, resize: Resize = "clean", device: torch.device | str = "cpu") -> None:
        if resize not in ("clean", "tensorflow"):
            raise ValueError(f"the resize mode of FID must be 'clean' or 'tensorflow', got {resize!r}")
        self.resize = resize
        self.device = torch.device(device)
        tensors, self.digest = read_weights(Path(weights), content=CONTENT)
        network = _build(tensors, Path(weights)).to(self.device)
        # The children stand in the order of the graph, the classifier last. Running them here, not through the
        # network's forward, leaves the choice of resizing to us.
        children = list(network.children())
        self._trunk, self._classifier = nn.Sequential(*children[:-1]), children[-1]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> InceptionOutput:
        """Return features and logits of (B, 3, H, W) images in [-1, 1], float32 on the network's device."""
        pixels = quantize(images.to(self.device))
        with torch.autocast(self.device.type, enabled=False):
            x = resize_for_inception(pixels, INPUT_SIZE, self.resize)
            # (x - 128) / 128 is what the TensorFlow graph does, though x ends at 255.
            features = self._trunk((x - 128) / 128).flatten(1)
            return InceptionOutput(features, features @ self._classifier.weight.T)


def _build(tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """Build torch-fidelity's network from tensors that were read from `path`."""
    try:
        # Lazy: torch-fidelity is optional.
        from torch_fidelity import FeatureExtractorInceptionV3
    except ImportError as error:
        raise MetricUnavailableError("the library torch-fidelity is missing: pip install torch-fidelity") from error
    # torch-fidelity unpickles its file without restriction, so it is given a new one of tensors that were read safely.
    vetted = io.BytesIO()
    torch.save(tensors, vetted)
    vetted.seek(0)
    try:
        # It initialises the weights before it loads them; the caller's random numbers must not depend on that.
        with torch.random.fork_rng(devices=[]):
            return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=vetted)
    except RuntimeError as error:
        difference = " ".join(str(error).split()[:40])
        raise ValueError(f"{path} must hold {CONTENT}: {difference}") from error
