"""Normal noise in which every sample has its own seed.

Shapes: drawn noise: (B, *shape), one sample of `shape` for each of B seeds.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Each call draws the next noise of one fixed shape.
NoiseSource = Callable[[], Tensor]


def seeded_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> NoiseSource:
    """Return a source of (B, *shape) float32 normal noise in which sample i depends on seeds[i] alone.

    Each sample has its own generator on the CPU, so that an image is the same whatever the batch it is drawn in and
    whatever the device. A second call of the source continues where the first one ended.

    Args:
        seeds: B integers of 64 bits.
        shape: shape of one sample, without the batch dimension.
        device: device to put the noise on.

    Raises:
        ValueError: without seeds, or for seeds that are not integers of 64 bits.
    """
    if len(seeds) == 0:
        raise ValueError("sampling needs at least one seed, got none")
    if wrong := [seed for seed in seeds if not -(2**63) <= int(seed) < 2**64 or int(seed) != seed]:
        raise ValueError(f"seeds must be integers of 64 bits, got {wrong[0]}")
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]

    def draw() -> Tensor:
        drawn = [torch.randn(tuple(shape), generator=generator, device="cpu") for generator in generators]
        return torch.stack(drawn).to(device)

    return draw


def noise_like(x: Tensor, noise: NoiseSource | None) -> NoiseSource:
    """Return a source of noise of x's shape: the given one, checked, or else torch's global generator.

    Raises:
        ValueError: (on a draw) if the given source draws another shape.
    """

    def draw() -> Tensor:
        if noise is None:
            return torch.randn_like(x)
        drawn = noise()
        if drawn.shape != x.shape:
            raise ValueError(f"the noise must have x's shape {tuple(x.shape)}, got {tuple(drawn.shape)}")
        return drawn

    return draw


def initial_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return the (B, *shape) noise that sampling starts from: the first draw of `seeded_noise`."""
    return seeded_noise(seeds, shape, device)()
