"""The shape of the text transformer that is trained jointly with the UNet (paper, Appendix E.2.1: tau_theta)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class TextTransformerConfig:
    """Shape of a text transformer; the defaults are the paper's.

    Args:
        vocabulary_size: number of token ids.
        max_length: longest token sequence.
        width: D of the context.
        layers: number of transformer layers.
        heads, head_dim: of the attention; heads * head_dim need not equal the width.
        embedding_std: of the embeddings before training; with 1 a small model learns what words mean in fewer steps.

    Raises:
        ValueError: a field is not positive.
    """

    vocabulary_size: int
    max_length: int = 77
    width: int
    layers: int
    heads: int = 8
    head_dim: int = 64
    embedding_std: float = 0.02

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "max_length", "width", "layers", "heads", "head_dim", "embedding_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"TextTransformerConfig.{name} must be positive, got {getattr(self, name)}")
