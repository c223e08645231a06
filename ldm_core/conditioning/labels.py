"""Class labels, one learned embedding each (paper, Sec. 4.3.1 and Table 15: class-conditional ImageNet)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm_core.conditioning.interface import Conditioner, Conditioning
from ldm_core.configs.conditioning import ClassConfig
from ldm_core.networks.ids import check_ids


class ClassConditioner(Conditioner):
    """Maps labels (B,) to a context (B, 1, D)."""

    def __init__(self, config: ClassConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.classes, config.width)

    def unconditional(self) -> Tensor | None:
        """Return the label "no class", (1,), or None if the configuration has no such label."""
        return torch.tensor([self.config.classes - 1], device="cpu") if self.config.unconditional_class else None

    def forward(self, labels: Tensor) -> Conditioning:
        """Integer labels (B,) in 0 ... classes - 1 -> context (B, 1, D). Raises ValueError for anything else."""
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(
                f"labels must be integers of shape (B,), got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        labels = labels.long()
        check_ids(labels, self.config.classes, "labels")
        return Conditioning(context=self.embedding(labels)[:, None])
