"""One training step, ours and diffusers': forward, backward, clip, AdamW, EMA on a batch that is already there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_core.configs.unet import UNetConfig
from ldm_core.ema import EMA
from ldm_core.networks.unet import UNet
from tests.benchmarks import peers
from tests.benchmarks.shapes import OURS, THEIRS, Call, Shape

LEARNING_RATE = 1e-5
GRADIENT_NORM = 1.0
TIMESTEPS = 1000


@dataclass(frozen=True)
class Batch:
    """What both sides train on: z_t, noise (B, C, h, w); t (B,); context (B, L, D) or None."""

    z_t: Tensor
    noise: Tensor
    t: Tensor
    context: Tensor | None


def random_batch(config: UNetConfig, size: int, tokens: int, device: torch.device) -> Batch:
    """Return a batch of normal latents for a UNet, with `tokens` context vectors each."""
    torch.manual_seed(0)
    shape = (size, config.in_channels, config.latent_size, config.latent_size)
    return Batch(
        torch.randn(shape, device=device),
        torch.randn(size, config.out_channels, *shape[2:], device=device),
        torch.randint(0, TIMESTEPS, (size,), device=device),
        None if config.context_dim is None else torch.randn(size, tokens, config.context_dim, device=device),
    )


def sides(config: UNetConfig, batch: Batch, device: torch.device) -> dict[str, Callable[[Shape], Call]]:
    """Build both sides' training steps from the same initial weights; ours alone without diffusers."""

    def ours(shape: Shape) -> Call:
        return our_step(initial_unet(config, device), batch, shape)

    def theirs(shape: Shape) -> Call:
        return their_step(peers.diffusers_unet(initial_unet(config, device)), batch, shape)

    return {OURS: ours, THEIRS: theirs} if peers.available() else {OURS: ours}


def initial_unet(config: UNetConfig, device: torch.device) -> UNet:
    """Build the UNet with the same random weights at every call."""
    torch.manual_seed(1)
    with device:
        return UNet(config)


def our_step(unet: UNet, batch: Batch, shape: Shape) -> Callable[[], Tensor]:
    """Return a training step of our UNet with our EMA."""
    shape.for_training(unet.train())
    return training_step(unet, lambda z, t: unet(z, t, context=batch.context), EMA(unet).update, batch, shape)


def their_step(unet: Any, batch: Batch, shape: Shape) -> Callable[[], Tensor]:
    """Return a training step of diffusers' UNet with diffusers' EMA, both in their fastest setting."""
    from diffusers.training_utils import EMAModel

    shape.for_training(unet.train())
    context = {} if batch.context is None else {"encoder_hidden_states": batch.context}
    ema = EMAModel(unet.parameters(), foreach=True)
    return training_step(
        unet, lambda z, t: unet(z, t, **context).sample, lambda: ema.step(unet.parameters()), batch, shape
    )


def training_step(
    network: nn.Module,
    predict: Callable[[Tensor, Tensor], Tensor],
    update_average: Callable[[], None],
    batch: Batch,
    shape: Shape,
) -> Callable[[], Tensor]:
    """Return the step that both sides run, down to the optimizer; it returns the loss."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, fused=True)
    z_t = shape.input(batch.z_t, cast=False)

    def step() -> Tensor:
        with shape.autocast(z_t.device):
            loss = F.mse_loss(predict(z_t, batch.t).float(), batch.noise)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average()
        return loss.detach()

    return step
