"""The codebook of VQ first stages (van den Oord et al. 2017; paper, Sec. 3.1).

Shapes: z: (B, C, h, w) latent before quantization.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Quantization:
    """Result of `VectorQuantizer`: what the decoder takes, and how the codebook did.

    Attributes:
        latent: (B, C, h, w) nearest codebook entries; gradients pass straight through to the input.
        indices: (B, h, w) int64 entries chosen.
        loss: () codebook plus commitment loss.
        perplexity: () exp of the entropy of the entries chosen in this batch; codebook_size at even use.
    """

    latent: Tensor
    indices: Tensor
    loss: Tensor
    perplexity: Tensor


class VectorQuantizer(nn.Module):
    """Nearest-neighbour codebook with a straight-through gradient (van den Oord et al. 2017).

    Args:
        codebook_size: number of entries.
        embed_dim: channels of an entry.
        beta: weight of the commitment term, or of the codebook term where `legacy_loss`.
        legacy_loss: the convention of the published models, in which beta weighs the other term.
    """

    def __init__(self, codebook_size: int, embed_dim: int, *, beta: float = 0.25, legacy_loss: bool = True) -> None:
        super().__init__()
        self.beta = beta
        self.legacy_loss = legacy_loss
        self.codebook = nn.Embedding(codebook_size, embed_dim)
        nn.init.uniform_(self.codebook.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    def forward(self, z: Tensor) -> Quantization:
        """(B, C, h, w) latent before quantization -> Quantization."""
        indices = self._nearest(z)
        quantized = self.codebook(indices).permute(0, 3, 1, 2)
        commitment = F.mse_loss(quantized.detach(), z)
        codebook = F.mse_loss(quantized, z.detach())
        loss = commitment + self.beta * codebook if self.legacy_loss else codebook + self.beta * commitment
        ones = torch.ones(indices.numel(), device=z.device)
        usage = torch.zeros(self.codebook.num_embeddings, device=z.device).index_add(0, indices.flatten(), ones)
        usage = usage / indices.numel()
        perplexity = torch.exp(-torch.special.xlogy(usage, usage).sum())
        return Quantization(z + (quantized - z).detach(), indices, loss, perplexity)

    @torch.no_grad()
    def _nearest(self, z: Tensor) -> Tensor:
        """(B, h, w) index of the entry nearest to each latent vector."""
        batch, channels, height, width = z.shape
        with _full_precision(z.device):  # bf16 distances would pick wrong entries
            vectors = z.permute(0, 2, 3, 1).reshape(-1, channels).float()
            codebook = self.codebook.weight.float()
            squared_norms = codebook.square().sum(1)
            # In slices: all distances of a large batch at once would take gigabytes.
            nearest = [(squared_norms - 2 * part @ codebook.T).argmin(1) for part in vectors.split(16_384)]
        return torch.cat(nearest).view(batch, height, width)


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off; the meta device has none to switch."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
