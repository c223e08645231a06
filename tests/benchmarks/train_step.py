"""One training step, ours and diffusers': forward, backward, clip, AdamW, EMA on a batch that is already there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_core.configs.unet import UNetConfig
from ldm_core.ema import EMA
from ldm_core.networks.unet import UNet
from ldm_core.prepare import prepare
from pipelines.training.optimization import optimize
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


def our_step(unet: UNet, batch: Batch, shape: Shape | None) -> Callable[[], Tensor]:
    """Return a training step of our UNet with our EMA; without a shape `prepare` chooses."""
    return prepared_step(unet.train(), batch, lambda z, t: unet(z, t, context=batch.context), shape)


def prepared_step(
    network: nn.Module, batch: Batch, predict: Callable[[Tensor, Tensor], Tensor], shape: Shape | None
) -> Callable[[], Tensor]:
    """Return a training step of a network of ours, as the trainer makes it; without a shape `prepare` chooses."""
    prepared = shape.prepare(network, "training") if shape else prepare(network, for_="training")
    average = EMA(network)

    def update(optimizer: torch.optim.AdamW) -> None:
        optimize(optimizer, GRADIENT_NORM)
        average.update()

    return training_step(network, predict, update, batch, prepared.autocast)


def their_step(unet: Any, batch: Batch, shape: Shape) -> Callable[[], Tensor]:
    """Return a training step of diffusers' UNet with diffusers' EMA, both in their fastest setting."""
    from diffusers.training_utils import EMAModel

    autocast = shape.train_theirs(unet.train())
    z_t = batch.z_t.contiguous(memory_format=shape.memory_format)
    context = {} if batch.context is None else {"encoder_hidden_states": batch.context}
    average = EMAModel(unet.parameters(), foreach=True)

    def update(optimizer: torch.optim.AdamW) -> None:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], GRADIENT_NORM)
        optimizer.step()
        average.step(unet.parameters())

    return training_step(unet, lambda z, t: unet(z, t, **context).sample, update, replace(batch, z_t=z_t), autocast)


def training_step(
    network: nn.Module,
    predict: Callable[[Tensor, Tensor], Tensor],
    update: Callable[[torch.optim.AdamW], None],
    batch: Batch,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Callable[[], Tensor]:
    """Return the step that both sides run, but for `update`, which clips, optimises and averages; it gives the loss."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = F.mse_loss(predict(batch.z_t, batch.t).float(), batch.noise)
        loss.backward()
        update(optimizer)
        return loss.detach()

    return step
