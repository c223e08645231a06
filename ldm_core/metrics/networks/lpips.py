"""LPIPS, the distance of images in the features of a classifier (Zhang et al. 2018; PSIM in the paper's Table 8).

The backbone is torchvision's, its weights given by path; the learned weights of the channels come with torchmetrics.
torchmetrics' own LPIPS is not used: it downloads the backbone itself, and cannot be given a file.

Shapes: x, y: (B, 3, H, W) images in [-1, 1]; result: (B,).
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_core.metrics.networks.weights import MetricUnavailableError, read_weights

CONTENT = "torchvision's VGG-16 or AlexNet (vgg16-397923af.pth, alexnet-owt-7be5be79.pth)"
SOURCE = "https://download.pytorch.org/models/vgg16-397923af.pth"

# Mean and standard deviation of ImageNet's pixels, carried over to the range [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-8

# A backbone is told by the shape of its first convolution.
FIRST_CONVOLUTION = {(64, 3, 3, 3): "vgg", (64, 3, 11, 11): "alex"}
# Layers whose outputs are compared: the last ReLU at each scale (VGG), every ReLU (AlexNet).
TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}
MINIMUM_SIZE = {"vgg": 16, "alex": 31}


class Lpips(nn.Module):
    """Distance of images by Eq. (1) of Zhang et al., version 0.1: learned weights over a fixed backbone.

    Differentiable in the images, so that a first stage can be trained on it (paper, Sec. 3.1).

    Args:
        weights: file with the state dict of torchvision's VGG-16 (which the paper uses) or AlexNet.

    Raises:
        MetricUnavailableError: if the file, torchvision or torchmetrics is missing.
        ValueError: if the file holds another network.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Path) -> None:
        super().__init__()
        tensors, self.digest = read_weights(Path(weights), content=CONTENT)
        first = tensors.get("features.0.weight", torch.empty(0)).shape
        if first not in FIRST_CONVOLUTION:
            raise ValueError(
                f"{weights} must hold {CONTENT}, got features.0.weight of shape {tuple(first)}: "
                "give the file of that network"
            )
        self.network = FIRST_CONVOLUTION[first]
        self.layers = _backbone(self.network)
        shapes = {f"features.{name}": tensor.shape for name, tensor in self.layers.state_dict().items()}
        wrong = [key for key, shape in shapes.items() if key not in tensors or tensors[key].shape != shape]
        if wrong:
            raise ValueError(f"{weights} must hold {CONTENT}, got another {wrong[0]}: give the file of that network")
        convolutions = {key.removeprefix("features."): tensors[key].float() for key in shapes}
        self.layers.load_state_dict(convolutions, assign=True)
        self.heads = nn.ParameterList(_heads(self.network))
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of each pair.

        Args:
            x, y: (B, 3, H, W) in [-1, 1].

        Returns:
            (B,) float32 on the module's device, zero for equal images.

        Raises:
            ValueError: if the shapes differ or the images are too small for the backbone.
        """
        if x.shape != y.shape or x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"LPIPS compares images (B, 3, H, W), got {tuple(x.shape)} and {tuple(y.shape)}")
        if min(x.shape[-2:]) < MINIMUM_SIZE[self.network]:
            raise ValueError(
                f"LPIPS by {self.network} needs images of at least {MINIMUM_SIZE[self.network]} pixels a side, "
                f"got {tuple(x.shape[-2:])}"
            )
        x, y = x.to(self.shift.device), y.to(self.shift.device)
        with torch.autocast(x.device.type, enabled=False):
            distance = torch.zeros(len(x), device=x.device)
            h = (torch.cat([x, y]).float() - self.shift) / self.scale
            heads = iter(self.heads)
            for number, layer in enumerate(self.layers):
                h = layer(h)
                if number in TAPS[self.network]:
                    # The epsilon stands inside the root, where it also keeps the gradient of dead pixels finite.
                    a, b = (h / (h.square().sum(dim=1, keepdim=True) + EPSILON).sqrt()).chunk(2)
                    distance = distance + ((a - b).square() * next(heads)).sum(dim=1).mean(dim=(1, 2))
        return distance


def _backbone(network: str) -> nn.Sequential:
    """Return the convolutions of torchvision's network up to the last tap, without memory for weights."""
    try:
        # Lazy: torchvision is optional.
        from torchvision import models
    except ImportError as error:
        raise MetricUnavailableError("the library torchvision is missing: pip install torchvision") from error
    with torch.device("meta"):
        whole = models.vgg16(weights=None, init_weights=False) if network == "vgg" else models.alexnet(weights=None)
    return whole.features[: TAPS[network][-1] + 1]


def _heads(network: str) -> list[Tensor]:
    """Return the learned weights of the channels, (1, C, 1, 1) for each compared layer.

    torchmetrics has no public name for them. They are read from its package as a file like any other, since importing
    the module that uses them costs seconds.
    """
    package = find_spec("torchmetrics")
    if package is None or not package.submodule_search_locations:
        raise MetricUnavailableError(
            "the library torchmetrics, with LPIPS's learned weights, is missing: pip install torchmetrics"
        )
    folder = Path(package.submodule_search_locations[0]) / "functional" / "image" / "lpips_models"
    tensors, _ = read_weights(folder / f"{network}.pth", content="LPIPS's learned weights, of torchmetrics 1.9")
    return [tensors[f"lin{level}.model.1.weight"] for level in range(len(TAPS[network]))]
