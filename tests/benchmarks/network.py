"""Training the whole network, text transformer and UNet: images/s, FLOP/s and memory by batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.networks.text_transformer import TextTransformer
from ldm_core.networks.unet import UNet
from tests.benchmarks.timing import Timing, count_flops, interleaved, is_out_of_memory, release_memory
from tests.benchmarks.train_step import prepared_step, random_batch


@dataclass(frozen=True)
class NetworkRun:
    """One batch size of the sweep; `timing` is None where memory did not suffice."""

    batch_size: int
    activation_checkpointing: bool
    timing: Timing | None


def training_flops(config: LatentDiffusionConfig) -> dict[str, int]:
    """Count FLOPs an image of each part's forward pass, and of both passes through both, on the meta device.

    Recomputation by activation checkpointing is not counted: these are the model's FLOPs, not the hardware's.
    """
    network = config.build_network("meta")
    size = config.unet.latent_size
    z, t = torch.empty(1, config.unet.in_channels, size, size, device="meta"), torch.zeros(1, device="meta")
    tokens = _tokens(config, 1, torch.device("meta"))
    assert network.conditioner is not None
    conditioner = network.conditioner

    def text() -> Tensor:
        context = conditioner(tokens).context
        assert context is not None
        return context

    context = text().detach()
    return {
        "text_forward": count_flops(text),
        "unet_forward": count_flops(lambda: network.unet(z, t, context=context)),
        "train": count_flops(lambda: network(z, t, tokens).sum().backward()),
    }


def sweep(
    config: LatentDiffusionConfig,
    batch_sizes: Sequence[int],
    device: torch.device,
    *,
    rounds: int,
    report: Callable[[NetworkRun], None],
) -> list[NetworkRun]:
    """Time a training step at each batch size until memory is full; from there on with activation checkpointing."""
    runs: list[NetworkRun] = []
    for checkpointing in (False, True):
        # Smaller batches, for which memory suffices, are slower with it.
        fitting = max((run.batch_size for run in runs if run.timing), default=0)
        for batch_size in sorted(size for size in batch_sizes if size >= fitting):
            timing = _time_step(config, batch_size, checkpointing, device, rounds)
            release_memory()
            runs.append(NetworkRun(batch_size, checkpointing, timing))
            report(runs[-1])
            if timing is None:
                break
    return runs


def _time_step(
    config: LatentDiffusionConfig, batch_size: int, checkpointing: bool, device: torch.device, rounds: int
) -> Timing | None:
    """Time a step; None if memory does not suffice. Its own function, so that the network is gone when it returns."""
    try:
        step = _step(config, batch_size, checkpointing, device)
        return interleaved({"step": step}, device, rounds=rounds)["step"]
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise


def _step(
    config: LatentDiffusionConfig, batch_size: int, checkpointing: bool, device: torch.device
) -> Callable[[], Tensor]:
    torch.manual_seed(1)
    network = config.build_network(device).train()
    for part in network.modules():
        if isinstance(part, (UNet, TextTransformer)):
            part.activation_checkpointing = checkpointing
    tokens = _tokens(config, batch_size, device)
    batch = random_batch(config.unet, batch_size, tokens.shape[1], device)
    return prepared_step(network, batch, lambda z, t: network(z, t, tokens), None)


def _tokens(config: LatentDiffusionConfig, batch_size: int, device: torch.device) -> Tensor:
    text = config.conditioner
    return torch.randint(0, text.vocabulary_size, (batch_size, text.max_length), device=device)  # type: ignore[union-attr]
