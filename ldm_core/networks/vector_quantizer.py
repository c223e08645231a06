"""The codebook of VQ first stages (van den Oord et al. 2017; paper, Sec. 3.1).

Shapes: z: (B, C, h, w) latent before quantization.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Half a GiB of float64.
DISTANCES_AT_ONCE = 2**26


@dataclass(frozen=True)
class Quantization:
    """Result of `VectorQuantizer`: the quantized latent, and statistics of the codebook.

    Attributes:
        latent: (B, C, h, w) nearest codebook entries; gradients pass straight through to the input.
        indices: (B, h, w) int64 indices of these entries.
        loss: () codebook plus commitment loss.
        perplexity: () exp of the entropy of the indices in this batch; codebook_size if all are used equally.
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
        beta: weight of the commitment term or, with `legacy_loss`, of the codebook term.
        legacy_loss: let beta weigh the codebook term, as in the published models.
    """

    def __init__(self, codebook_size: int, embed_dim: int, *, beta: float = 0.25, legacy_loss: bool = True) -> None:
        super().__init__()
        self.beta = beta
        self.legacy_loss = legacy_loss
        self.codebook = nn.Embedding(codebook_size, embed_dim)
        nn.init.uniform_(self.codebook.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    def forward(self, z: Tensor) -> Quantization:
        """(B, C, h, w) latent before quantization -> Quantization, with the loss of training and its statistics."""
        indices = self._nearest(z)
        quantized = self._entries(indices)
        commitment = F.mse_loss(quantized.detach(), z)
        codebook = F.mse_loss(quantized, z.detach())
        loss = commitment + self.beta * codebook if self.legacy_loss else codebook + self.beta * commitment
        perplexity = _perplexity(_counts(indices, self.codebook.num_embeddings))
        return Quantization(_straight_through(z, quantized), indices, loss, perplexity)

    def lookup(self, z: Tensor) -> Tensor:
        """Return the `latent` of a `Quantization` alone, (B, C, h, w): what decoding needs."""
        return _straight_through(z, self._entries(self._nearest(z)))

    def _entries(self, indices: Tensor) -> Tensor:
        """(B, h, w) indices -> (B, C, h, w) entries."""
        entries: Tensor = self.codebook(indices).permute(0, 3, 1, 2)
        return entries

    @torch.no_grad()
    def _nearest(self, z: Tensor) -> Tensor:
        """Return the index, (B, h, w), of the entry nearest to each latent vector.

        In float64, which autocast and `torch.set_float32_matmul_precision` leave alone: bf16 or TF32 distances would
        pick wrong entries.
        """
        batch, channels, height, width = z.shape
        vectors = z.permute(0, 2, 3, 1).reshape(-1, channels).double()
        codebook = self.codebook.weight.double()
        squared_norms = codebook.square().sum(1)
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for every entry e.
        # In slices: all distances of a large batch at once would take gigabytes.
        nearest = [
            torch.addmm(squared_norms, part, codebook.T, alpha=-2).argmin(1)
            for part in vectors.split(max(1, DISTANCES_AT_ONCE // len(codebook)))
        ]
        return torch.cat(nearest).view(batch, height, width)


class CodebookUsage:
    """Counts of how often each entry is used over many batches, which shows dead entries; one batch cannot.

    Args:
        codebook_size: number of entries.
        device: where the counts are kept; the device of the indices saves a copy per batch.

    Attributes:
        counts: (codebook_size,) int64; those of several workers may be added.
    """

    def __init__(self, codebook_size: int, *, device: torch.device | str | None = None) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def update(self, indices: Tensor) -> None:
        """Count the `indices` of a `Quantization`, of any shape.

        Raises:
            ValueError: indices are not integers.
        """
        if indices.is_floating_point():
            raise ValueError(f"codebook indices must be integers, got {indices.dtype}: pass Quantization.indices")
        self.counts += _counts(indices.to(self.counts.device), len(self.counts))

    def perplexity(self) -> float:
        """Return exp of the entropy of the indices: 1 if one entry is used always, codebook_size if all equally.

        Raises:
            ValueError: nothing was counted yet.
        """
        self._require_counts()
        return float(_perplexity(self.counts))

    def used_fraction(self) -> float:
        """Return the share of entries used at least once, in (0, 1].

        Raises:
            ValueError: nothing was counted yet.
        """
        self._require_counts()
        return float((self.counts > 0).double().mean())

    def _require_counts(self) -> None:
        if not self.counts.any():
            raise ValueError("codebook usage needs at least one index, got none: call update first")


def _counts(indices: Tensor, codebook_size: int) -> Tensor:
    """Count indices, (codebook_size,) int64."""
    # index_add of integers is deterministic on every device, bincount is not.
    flat = indices.flatten()
    return torch.zeros(codebook_size, dtype=torch.int64, device=flat.device).index_add(
        0, flat, torch.ones_like(flat, dtype=torch.int64)
    )


def _perplexity(counts: Tensor) -> Tensor:
    usage = counts.float() / counts.sum()
    return torch.exp(-torch.special.xlogy(usage, usage).sum())


def _straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """Return the quantized latent, whose gradient is z's."""
    return z + (quantized - z).detach()
