"""LPIPS, the distance of images in the features of a classifier (Zhang et al. 2018; PSIM in the paper's Table 8).

Shapes: x, y: (B, 3, H, W) images in [-1, 1]; result: (B,).
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_core.metrics.networks.weights import MetricUnavailableError, read_weights

CONTENT = "torchvision's VGG-16 or AlexNet (vgg16-397923af.pth, alexnet-owt-7be5be79.pth)"
SOURCE = "https://download.pytorch.org/models/vgg16-397923af.pth"

# Of ImageNet's pixels, in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-8

# Layers whose outputs are compared: the last ReLU at each scale (VGG), every ReLU (AlexNet).
TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}
MINIMUM_SIZE = {"vgg": 16, "alex": 31}


class Lpips(nn.Module):
    """Distance of images by Eq. (1) of Zhang et al., version 0.1: learned weights over a fixed backbone.

    Differentiable in the images, so that it can also be trained on. The backbone is told by its weights; the learned
    weights come with torchmetrics.

    Args:
        weights: file with the state dict of torchvision's VGG-16 (which the paper uses) or AlexNet.

    Raises:
        MetricUnavailableError: when the file or the library torchmetrics is missing.
        ValueError: when the file holds another network.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Path) -> None:
        super().__init__()
        tensors, self.digest = read_weights(Path(weights), content=CONTENT)
        first = tensors.get("features.0.weight", torch.empty(0)).shape
        with torch.device("meta"):
            builders: dict[tuple[int, ...], tuple[str, Callable[[], nn.Sequential]]] = {
                (64, 3, 3, 3): ("vgg", _vgg16),
                (64, 3, 11, 11): ("alex", _alexnet),
            }
            self.network, build = builders.get(first, ("", nn.Sequential))
            self.layers = build()
        shapes = {f"features.{name}": tensor.shape for name, tensor in self.layers.state_dict().items()}
        wrong = [key for key, shape in shapes.items() if key not in tensors or tensors[key].shape != shape]
        if not self.network or wrong:
            found = f"another {wrong[0]}" if wrong else f"features.0.weight of shape {tuple(first)}"
            raise ValueError(f"{weights} must hold {CONTENT}, got {found}: give the file of that network")
        convolutions = {key.removeprefix("features."): tensors[key].float() for key in shapes}
        self.layers.load_state_dict(convolutions, assign=True)
        self.heads = nn.ParameterList(_heads(self.network))
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each pair.

        Args:
            x, y: (B, 3, H, W) in [-1, 1].

        Returns:
            (B,) float32 on the module's device, zero for equal images.

        Raises:
            ValueError: when the shapes differ or the images are too small for the backbone.
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


def _heads(network: str) -> list[Tensor]:
    """The learned weights of the channels, (1, C, 1, 1) a compared layer."""
    package = find_spec("torchmetrics")
    folders = list(package.submodule_search_locations or ()) if package else []
    if not folders:
        raise MetricUnavailableError("the library torchmetrics, with LPIPS's learned weights, is missing: install it")
    path = Path(folders[0]) / "functional" / "image" / "lpips_models" / f"{network}.pth"
    tensors, _ = read_weights(path, content="LPIPS's learned weights")
    return [tensors[f"lin{level}.model.1.weight"] for level in range(len(TAPS[network]))]


def _vgg16() -> nn.Sequential:
    """The convolutions of VGG-16 (Simonyan and Zisserman 2015, configuration D) as torchvision numbers them."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])


def _alexnet() -> nn.Sequential:
    """The convolutions of AlexNet (Krizhevsky 2014) as torchvision numbers them."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )
