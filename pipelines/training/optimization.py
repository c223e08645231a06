"""Preparing a network for training; its optimiser, learning rate and gradient clipping."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldm_core.networks.text_transformer import TextTransformer
from ldm_core.networks.unet import UNet
from ldm_core.prepare import Prepared, compiles, prepare
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.training.config import TrainingConfig

# One bucket for networks of a few million weights: another gloo call costs more than overlapping several gains.
BUCKET_MIB = 64
# The cosine schedule ends at this share of the peak rate.
FINAL_RATE = 0.1
# torch.nn.utils.clip_grad_norm_ adds it too, against a gradient that is zero.
CLIP_EPSILON = 1e-6


def prepare_network(network: nn.Module, config: TrainingConfig) -> Prepared:
    """Apply activation checkpointing, then make the network fast on its device, in place.

    Before anything holds its weights: their memory format may change.
    """
    for module in network.modules():
        if isinstance(module, (UNet, TextTransformer)):
            module.activation_checkpointing = config.activation_checkpointing
    precision = None if config.precision == "auto" else config.precision
    compile_it = is_compiled(next(network.parameters()).device, config)
    return prepare(network, for_="training", precision=precision, compile=compile_it)


def is_compiled(device: torch.device, config: TrainingConfig) -> bool:
    """Return whether what trains on a device is compiled. Raises UserError if that is asked for and cannot be done."""
    try:
        return compiles(device, config.compile)
    except ValueError as error:
        raise UserError(f"training.compile: {error}") from None


def in_parallel(network: nn.Module, world: int) -> nn.Module:
    """Return the network as one of `world` workers trains it; it shares the network's weights."""
    if world == 1:
        return network
    return DistributedDataParallel(network, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MIB)


def build_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW over the weights that are trained, with one fused kernel per step."""
    return torch.optim.AdamW(
        [weight for weight in network.parameters() if weight.requires_grad],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the rate after `step` steps: linear warm-up to the peak, then constant, or a half cosine to a tenth."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.learning_rate * warmup
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return config.learning_rate * warmup * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def optimize(optimizer: torch.optim.AdamW, maximum: float | None) -> torch.Tensor:
    """Take one step along the gradient, scaled to at most that global norm; return its norm before, a scalar tensor.

    A gradient that is not finite changes nothing. Nothing here reads a tensor's value: on a GPU, reading it would wait
    for the backward pass. Clipping costs no pass of its own over the gradient: the fused kernel divides by a scale.
    """
    gradients = [weight.grad for weight in optimizer.param_groups[0]["params"] if weight.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    # The kernel's own names: the scale of a gradient scaler, and what makes it skip the step.
    optimizer.grad_scale = None if maximum is None else ((norm + CLIP_EPSILON) / maximum).clamp(min=1.0)  # type: ignore[attr-defined]
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
    return norm
