"""Wrapping a network for training; its optimiser, learning rate and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldm_core.networks.unet import UNet

if TYPE_CHECKING:
    from pipelines.training.config import TrainingConfig

# One bucket for networks of a few million weights: another gloo call costs more than overlapping several gains.
BUCKET_MIB = 64
# The cosine schedule ends at this share of the peak rate.
FINAL_RATE = 0.1


def wrap(network: nn.Module, config: TrainingConfig, world: int) -> nn.Module:
    """Apply activation checkpointing, then compilation, then data parallelism, in that order.

    Args:
        network: the network; the wrapped one shares its weights.
        config: the optimisation section of the recipe.
        world: number of workers.
    """
    if config.activation_checkpointing:
        for module in network.modules():
            if isinstance(module, UNet):
                module.activation_checkpointing = True
    wrapped = network
    if config.compile:
        wrapped = cast(nn.Module, torch.compile(network))
    if world == 1:
        return wrapped
    return DistributedDataParallel(wrapped, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MIB)


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


def clip_gradient(weights: Sequence[nn.Parameter], maximum: float | None) -> torch.Tensor:
    """Scale the gradient to at most that global norm; return its norm before, a scalar tensor.

    Nothing here reads the tensor's value: on a GPU, reading it would wait for the backward pass.
    """
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if maximum is not None:
        torch.nn.utils.clip_grads_with_norm_(weights, maximum, norm, foreach=True)
    return norm
